"""Watches the replicas from outside: does every answer come from one whole version?

Two threads each ask a replica for the same ranking again and again, as fast as it answers. Afterwards every version
that was seen is made once more from `parameters`, one whole version after the other, and must give the very same answer
at the same moment.
"""

from __future__ import annotations

import http.client
import itertools
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import orjson

from deploy.settings import Settings
from embedding_store.columns import TableRows
from embedding_store.delta import Assembler, Version
from embedding_store.errors import CorruptRecord
from online_model.serving.api import RankRequest, Scenario
from online_model.serving.errors import VersionGap
from online_model.serving.replica import Replica
from replay.oracle import read_topic
from streams.kafka_clients import client_arguments

Place: TypeAlias = tuple[int, int]  # epoch, sequence

USER = "u1"  # the most active one
SCENARIO: Scenario = "live"
ITEMS: list[str | int] = [*(f"i{n}" for n in range(1, 41)), "never seen"]
BETWEEN_S = 0.01
COMPARED = ("items", "model_version", "feature_hash", "learned_to_ms")  # all else hangs on the request
KEPT = 10  # answers of one version and replica, the first; and as many of the last


@dataclass
class Seen:
    """`wrong`: how many answers are not those of their version, are of an older one than the answer before, or none, by
    what is wrong. `missing_versions`: records of `parameters` that do not go on from the one before. `replica`: at the
    last version."""

    answers: int
    wrong: Counter[str]
    replica: Replica
    versions: int = 0  # of which an answer was looked at
    compared: int = 0  # answers that were
    missing_versions: int = 0

    @property
    def torn(self) -> int:
        return self.wrong.total()

    def differing_rows(self, stored: Mapping[str, TableRows]) -> int:
        """Rows that the last version's replica has otherwise than the trainer's store, or one of them has alone."""
        differing = 0
        for name, rows in stored.items():
            table = self.replica.state.tables[name]
            at = table.find(rows.ids)
            same = at > 0
            for column in table.carried:
                theirs, own = table.columns[column][at], rows.columns[column]
                same &= (theirs == own).reshape(len(at), -1).all(1)
            differing += int((~same).sum()) + len(table) - int((at > 0).sum())
        return differing


@dataclass
class _Kept:
    """Answers of one replica at one version: the first ones, and the last, when the next version is on its way."""

    first: list[dict[str, Any]] = field(default_factory=list)
    last: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, answer: dict[str, Any]) -> None:
        (self.first if len(self.first) < KEPT else self.last).append(answer)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.chain(self.first, self.last)

    def __len__(self) -> int:
        return len(self.first) + len(self.last)


@dataclass
class Watch:
    """Asks the replicas at `ports` until `stop`."""

    ports: list[int]
    answers: dict[str, list[_Kept]] = field(default_factory=dict)  # by version; of each port
    asked: int = 0
    backward: Counter[str] = field(default_factory=Counter)  # older than an earlier answer of the same process
    failed: Counter[str] = field(default_factory=Counter)  # by status; but for those that say: not now
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for port in self.ports:
            thread = threading.Thread(target=self._ask, args=(port,), name=f"watch {port}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, port: int) -> None:
        body = orjson.dumps({"user": USER, "scenario": SCENARIO, "candidates": ITEMS})
        connection, last = None, [0, -1]
        while not self._stop.wait(BETWEEN_S):
            try:
                if connection is None:
                    connection, last = http.client.HTTPConnection("127.0.0.1", port, timeout=2), [0, -1]
                connection.request("POST", "/v1/rank", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                raw = response.read()
            except (OSError, http.client.HTTPException):  # killed, frozen or not up yet
                if connection is not None:
                    connection.close()
                connection = None
                self._stop.wait(0.1)
                continue
            if response.status not in (200, 429, 503):
                with self._lock:
                    self.failed[f"with status {response.status}"] += 1
            if response.status == 200:
                answer = orjson.loads(raw)
                version = answer["model_version"]
                place = [int(number) for number in version.split(".")]
                with self._lock:
                    self.asked += 1
                    if place < last:
                        self.backward["{}.{} after {}.{}".format(*place, *last)] += 1
                    kept = self.answers.setdefault(version, [_Kept() for _ in self.ports])
                    kept[self.ports.index(port)].add(answer)
                last = place
        if connection is not None:
            connection.close()

    def held_to(self, settings: Settings) -> Seen:
        """What the answers and the versions are worth. Reads `parameters` from its beginning.

        An epoch may begin with a version that goes on from an older one: where the trainer's store is an old copy of
        itself. What that one was is made anew.
        """
        moment, model = 0, settings.model

        def empty() -> Replica:
            return Replica(
                settings.serve.serve, model.features, model.ranker, lambda: moment, feedback=model.feedback
            )

        seen = Seen(self.asked, self.backward + self.failed, replica=empty())
        bases: dict[Place, Place | None] = {}
        published = set()
        for version in _versions(settings):
            if version is None:
                seen.missing_versions += 1
                continue
            place, held = (version.epoch, version.sequence), (seen.replica.epoch, seen.replica.sequence)
            bases.setdefault(place, version.base)
            if version.base not in (None, held) and version.base in bases and version.epoch > held[0]:
                seen.replica = _made_anew(empty(), _line(version.base, bases), settings)
            try:
                applied = seen.replica.apply(version)
            except (CorruptRecord, VersionGap):
                seen.missing_versions += 1
                continue
            if not applied:
                continue
            name = seen.replica.version
            published.add(name)
            for answer in itertools.chain(*self.answers.get(name, ())):
                seen.compared += 1
                moment = answer["moment_ms"]
                right = orjson.loads(msgspec.json.encode(seen.replica.rank(RankRequest(USER, ITEMS, SCENARIO))))
                if differing := [of for of in COMPARED if right[of] != answer[of]]:
                    seen.wrong[f"other {', '.join(differing)} than those of {name}"] += 1
        seen.versions = len(published & set(self.answers))
        for name in self.answers.keys() - published:
            seen.wrong[f"of {name}, which was never published"] += sum(map(len, self.answers[name]))
        return seen


def _versions(settings: Settings) -> Iterator[Version | None]:
    """Those in `parameters`; None for one that cannot be read."""
    assembler = Assembler()
    # The client's own sums are made in Python, minutes of them, and parts have their own.
    where = {**client_arguments(settings.connection), "check_crcs": False}
    for _, _, value, _ in read_topic(where, settings.topics.parameters):
        try:
            version = assembler.add(value or b"")
        except CorruptRecord:
            yield None
        else:
            if version is not None:
                yield version


def _line(place: Place, bases: Mapping[Place, Place | None]) -> set[Place]:
    """The version at `place`, and all that it goes on from."""
    line: set[Place] = set()
    at: Place | None = place
    while at is not None:
        line.add(at)
        at = bases.get(at)
    return line


def _made_anew(replica: Replica, line: set[Place], settings: Settings) -> Replica:
    for version in _versions(settings):
        if version is not None and (version.epoch, version.sequence) in line:
            replica.apply(version)
    return replica
