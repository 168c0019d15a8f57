"""Follows the topic `parameters`: a holder's replica, kept fresh from versions and snapshots.

Start: the newest good snapshot, if there is one, then the versions after it, each as soon as it is committed. A version
is applied only if it goes on from the one held and is of the same model. Any other is kept (early.py), and after a
moment in which what is missing may still come:

1. The holder says why it is behind, and its replica serves on.
2. The trainer is asked for a snapshot (embedding_store/snapshot.py, `Request`). The answer was begun after the request,
   so it holds all that had been published by then: what was read before and is not in it comes from elsewhere.
3. A fresh replica is made of it, on another thread, of the model that the snapshot says. It takes the old one's place
   by one assignment, and the versions kept lead on from there.

So it does not matter what was wrong: a version lost, damaged, out of order, made up, or a trainer that went back or
became another one. Not guaranteed: that a version that is well-formed, names the version held as its base, and has the
same settings, comes from the trainer: whoever can write into the topic can do that, unless [signing] is set. Then
what is not signed as what it says it is counts for nothing, and is counted (signing.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client import Counter

from embedding_store.delta import Assembler, Version
from embedding_store.errors import BrokerError, CorruptRecord, Forged, StoreError
from embedding_store.snapshot import Request, place_of, read_snapshot, snapshots
from online_model.features import FeatureSettings
from online_model.ranker import RankerSettings
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.serving.replica import Replica, ReplicaSettings, wall_clock_ms
from online_model.settings import Feedback
from streams.early import Early, Place, place
from streams.kafka_clients import client_arguments
from streams.published import require_signed
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")

CLOCK_MARGIN_MS = 60_000  # by so much the trainer's clock may differ from the broker's
EARLY_BYTES = 64 << 20  # of versions that wait for what is missing before them
GRACE_SECONDS = 0.3  # in which that may still come by itself
LOOK_SECONDS = 0.2  # for the snapshot, while one is waited for
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 2.0, 30.0  # between two requests for one
QUIET_SECONDS = 1.0  # between two lines on what is forged, or on a folder that cannot be read
REASONS = ("damaged", "unsigned", "forged", "replayed")  # the last: it was there already, sent again by whoever
POLL_SECONDS = 1.0  # for versions, where nothing is missing


class Follower:
    """Feeds a holder's replica from the topic `parameters` and the snapshots. `caught_up` is set once it is where the
    topic ended when it was started, or past it; until then `holder.behind` says how far it is."""

    def __init__(
        self,
        settings: ServeWorkerSettings,
        holder: Holder,
        live: LiveUsers | None = None,
        topic: str = "",
        folder: Path | None = None,
        clock: Callable[[], int] = wall_clock_ms,
    ) -> None:
        """`live`, `clock`: for the replicas that it makes. `topic`, `folder`: of versions and of snapshots, where they
        are not those of the settings."""
        self._live, self._clock = live, clock
        self._settings, self._holder = settings.serve, holder
        self.caught_up = asyncio.Event()
        self._folder = folder or settings.data_dir / "snapshots"
        self._partition = TopicPartition(topic or settings.topics.parameters, 0)
        self._assembler, self._early = Assembler(), Early(EARLY_BYTES)
        self._when = 0  # records read: what is said to be "as `when`" is a moment, by this
        self._model: dict[str, Any] = {}  # settings of the trainer whose versions are held
        self._wrong, self._wrong_since, self._wrong_when = "", 0.0, 0  # why it is behind; monotonic seconds; as `when`
        self._starting = "starting: the newest snapshot is being loaded"  # until it has caught up
        self._signer = settings.signing.signer(self._partition.topic)
        self._said = -QUIET_SECONDS  # monotonic seconds: of the last such line
        self._old = 0  # offset below which there may be versions that are held: what is read again, or in a snapshot
        self._end = 0  # offset at which the topic ended at the start
        self._request = Request(self._folder)
        self._asked_at, self._asked_when, self._asked_held = 0.0, 0, (0, -1)  # monotonic seconds; as `when`; held then
        self._again = AGAIN_SECONDS  # longer and longer, while answers do not help
        self._snapshot: Path | None = None  # the one that the replica was made of
        self._damaged: set[Path] = set()  # those that could not be read, until they are written anew
        self._named: set[Path] = set()  # those of them that the request names
        self._others: set[Path] = set()  # those of another trainer
        self._foreign = False  # what is held is of another trainer than the topic
        self._refused = Counter(
            "headrace_replica_records_refused", "Corrupt records of `parameters`", registry=holder.metrics.registry
        )
        self._refusals = Counter(
            "headrace_replica_refused", "Parts of versions, and snapshots, that were not taken", ["reason"],
            registry=holder.metrics.registry,
        )  # fmt: skip
        for reason in REASONS:
            self._refusals.labels(reason)
        self._requests = Counter(
            "headrace_replica_snapshots_asked", "Times that the trainer was asked for a snapshot",
            registry=holder.metrics.registry,
        )  # fmt: skip
        self._consumer = AIOKafkaConsumer(
            **client_arguments(settings.connection),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # where what is next was deleted, the replica will see a gap
            fetch_max_wait_ms=500,  # the broker answers as soon as there is one byte
            max_partition_fetch_bytes=16 << 20,
        )
        self._say()

    async def run(self) -> None:
        """Follow until cancelled. Raises BrokerError."""
        try:
            await self._consumer.start()
            try:
                self._consumer.assign([self._partition])
                self._end = self._old = await self._topic_end()
                _, found = await self._look()
                if not await self._load_newest(found, lead=False):
                    self._note("no version yet, and no snapshot: is the trainer running?")
                while True:
                    await self._follow()
                    if self._wrong:
                        await self._mend()
                    await self._look_whether_caught_up()
            finally:
                self._request.withdraw()
                await self._consumer.stop()
        except KafkaError as error:
            topic = self._partition.topic
            raise BrokerError(f"cannot read {topic} ({error}): is the broker up? `headrace broker status`") from error

    # --- versions -----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """One fetch."""
        timeout = LOOK_SECONDS if self._wrong else POLL_SECONDS
        fetched = await self._consumer.getmany(timeout_ms=round(1_000 * timeout), max_records=100)
        for record in fetched.get(self._partition, ()):
            self._when += 1
            await self._holder.let_by()
            await self._take(record)

    async def _take(self, record: ConsumerRecord) -> None:
        try:
            require_signed(record, self._signer)
            version = self._assembler.add(record.value)
        except Forged as error:  # not of the trainer: nothing of what it sends is missing
            self._count(error)
            self._say_seldom("refused the record at offset %s of %s: %s", record.offset, record.topic, error)
            return
        except CorruptRecord as error:  # what it was part of may be missing now, or may have come all the same
            self._refuse(f"the record at offset {record.offset} of {record.topic}", error)
            return
        if version is None:
            return
        if not self._empty and place(version) <= self._held:
            self._look_askance(version)
            if record.offset >= self._old:
                self._refusals.labels("replayed").inc()
                log.warning("left out version %s at offset %s: it is there already", _name(version), record.offset)
            return
        self._early.add(version, self._when)
        await self._advance()

    async def _advance(self) -> None:
        """Apply what goes on from the version held, as far as that leads; from another trainer's it leads nowhere."""
        while (version := self._early.after(None if self._empty else self._held)) is not None:
            if self._foreign:
                return
            if not self._empty and not self._same_model(version):
                return
            await self._holder.let_by()
            try:
                if self._empty:
                    self._holder.swap(_replica_of(version, self._settings, self._live, self._clock))
                else:
                    self._holder.apply(version)
            except CorruptRecord as error:
                self._early.forget(place(version))
                self._refuse(f"version {_name(version)}", error)
                return
            self._model = version.info["settings"]
            self._early.forget(self._held)
            if not len(self._early):
                self._all_is_right()
            self._say()
        if not self._wrong and (first := self._early.first()) is not None:
            self._note("a version is missing: a snapshot that leads past it is waited for")
            base = "nothing" if first.base is None else "{}.{}".format(*first.base)
            held = "none" if self._empty else "{}.{}".format(*self._held)
            of = _fields(place(first))
            log.warning("version %s goes on from %s, this replica holds %s", _name(first), base, held, extra=of)

    def _same_model(self, version: Version) -> bool:
        """Settings change with an epoch only; those that answers are made with need another replica even then."""
        model: Any = version.info.get("settings")
        later = version.epoch > self._held[0] and isinstance(model, dict)
        if model == self._model or (later and _served(model) == _served(self._model)):
            return True
        if not self._wrong:
            self._note(f"version {_name(version)} is of a model with other settings: a snapshot of it is waited for")
            log.warning("%s", self._wrong)
        return False

    def _look_askance(self, version: Version) -> None:
        """At a version that is there already. One that is younger than what is held: that is of another trainer."""
        behind_ms = version.created_ms - self._holder.replica.created_ms
        if self._snapshot is not None and behind_ms > CLOCK_MARGIN_MS and not self._foreign:
            log.error("the snapshot %s is of another trainer than the versions that come", self._snapshot)
            self._others.add(self._snapshot)
            self._foreign = True
            self._note("what is served is not of the trainer whose versions come: its snapshot is waited for")

    def _refuse(self, what: str, error: CorruptRecord) -> None:
        log.error("refused %s: %s", what, error)
        self._refused.inc()
        self._count(error)
        self._note("a damaged version was refused: the next one, or a snapshot, is waited for")

    def _say_seldom(self, line: str, *values: Any) -> None:
        """Whoever sends them, and a disk that is asked again and again, is not to fill the log."""
        if time.monotonic() >= self._said + QUIET_SECONDS:
            self._said = time.monotonic()
            log.error(line, *values)

    def _count(self, error: CorruptRecord) -> None:
        self._refusals.labels(error.reason).inc()

    def _note(self, wrong: str) -> None:
        """Something may be missing, as of now."""
        if not self._wrong:
            self._wrong_since = time.monotonic()
        self._wrong, self._wrong_when = wrong, self._when
        self._say()

    def _all_is_right(self) -> None:
        """Nothing is missing, up to what is held."""
        self._again = AGAIN_SECONDS
        if self._wrong and not self._foreign:
            self._wrong = ""
            self._request.withdraw()
        self._say()

    # --- snapshots ----------------------------------------------------------------------------------------------

    async def _mend(self) -> None:
        """Load a snapshot that leads past what is missing, if there is one, and ask for it if there is none."""
        now = time.monotonic()
        if now < self._wrong_since + GRACE_SECONDS:
            return
        waits, found = await self._look()
        answered = waits is False and self._asked_when >= self._wrong_when
        if answered:
            self._damaged -= self._named  # they were written anew, or there is a newer one
        newest, unsure = next(filter(self._usable, found), None), not len(self._early)
        if await self._load_newest(found, lead=not answered):
            self._foreign = False
            if unsure and not answered:
                return  # it has led on, but whether past what may be missing nobody knows
        elif not answered or newest is None or not self._asked_held <= place_of(newest) <= self._held:
            await self._ask(now, bool(waits))
            return
        if answered:
            self._early.forget(self._held, self._asked_when + 1)
        self._early.forget(self._held)
        self._all_is_right()
        await self._advance()

    async def _look(self) -> tuple[bool | None, list[Path]]:
        """(whether a request waits, the snapshots that are there, the newest first: of a moment later). Not on this
        thread: the folder may be a disk that is far away, or gone; then nobody waits and there are none."""

        def looked() -> tuple[bool | None, list[Path]]:
            waits = self._request.open
            return waits, snapshots(self._folder)

        try:
            return await asyncio.to_thread(looked)
        except StoreError as error:
            self._say_seldom("%s", error)
            return None, []

    async def _ask(self, now: float, waits: bool) -> None:
        """For a snapshot, unless that was just done, or the trainer is away: it will see the request that `waits`."""
        waits = waits and self._asked_when >= self._wrong_when and self._named == self._damaged
        if waits or now < self._asked_at + self._again:
            return
        self._again = min(2 * self._again, MOST_AGAIN_SECONDS) if self._asked_when >= self._wrong_when else self._again
        self._asked_at, self._asked_when, self._asked_held = now, self._when, self._held
        self._named = set(self._damaged)
        try:
            await asyncio.to_thread(self._request.make, self._named)
            self._requests.inc()
        except StoreError as error:  # then there will be one at the trainer's next interval
            log.error("the trainer cannot be asked for a snapshot: %s", error)

    def _usable(self, path: Path) -> bool:
        """Whether that snapshot may be good."""
        return path not in self._damaged | self._others

    async def _load_newest(self, found: list[Path], lead: bool) -> bool:
        """Serve the newest of these snapshots that can be read, if it is past what is held (or that is foreign); False:
        there is none. lead: not one from which the versions kept do not lead on."""
        anything = self._empty or self._foreign
        for path in filter(self._usable, found):
            at = place_of(path)
            if not anything and (at <= self._held or (lead and len(self._early) and not self._early.leads_from(at))):
                continue
            try:
                version = await asyncio.to_thread(read_snapshot, path, self._signer)
                replica = await asyncio.to_thread(_replica_of, version, self._settings, self._live, self._clock)
                await asyncio.to_thread(replica.prepare)
            except (StoreError, CorruptRecord) as error:  # damaged, or just replaced by a newer one
                log.error("%s", error)
                if isinstance(error, CorruptRecord):
                    self._count(error)
                self._damaged.add(path)
                continue
            self._old = await self._topic_end()
            self._holder.swap(replica)  # it says nothing is missing: nobody is to read that before `_say`
            self._snapshot, self._model = path, version.info["settings"]
            self._say()
            log.info("serving snapshot %s", path.name, extra=_fields(at))
            if anything or (self._early.after(at) is None and self._early.lost > at):
                await self._read_from(version.created_ms - CLOCK_MARGIN_MS)
            return True
        return False

    async def _read_from(self, time_ms: int) -> None:
        """Go on with the first record that the broker has got since, and what is there already is left out."""
        self._assembler, self._early = Assembler(), Early(EARLY_BYTES)
        # The end as it was before anybody looked for a younger record: one that comes meanwhile is behind it.
        end = await self._topic_end()
        found = (await self._consumer.offsets_for_times({self._partition: max(0, time_ms)}))[self._partition]
        self._consumer.seek(self._partition, end if found is None else found.offset)

    async def _topic_end(self) -> int:
        """The offset that the next record gets."""
        return (await self._consumer.end_offsets([self._partition]))[self._partition]

    # --- what it says -------------------------------------------------------------------------------------------

    @property
    def _held(self) -> Place:
        return self._holder.replica.epoch, self._holder.replica.sequence

    @property
    def _empty(self) -> bool:
        return self._holder.replica.sequence < 0

    def _say(self) -> None:
        """Bring `holder.behind` up to date: the holder clears it whenever a version comes."""
        self._holder.behind = self._wrong or self._starting

    async def _look_whether_caught_up(self) -> None:
        if not self._starting or self._empty:
            return
        at = await self._consumer.position(self._partition)
        self._starting = f"catching up: {self._end - at:,} records of the topic are still to be read"
        if at >= self._end and not self._wrong:
            self._starting = ""
            self.caught_up.set()
            log.info("caught up at version %s.%s", *self._held, extra=_fields(self._held))
        self._say()


def _replica_of(
    version: Version, settings: ReplicaSettings, live: LiveUsers | None, clock: Callable[[], int]
) -> Replica:
    """A replica at a version that holds everything; what its model is like, the version says. Raises CorruptRecord."""
    try:
        model = version.info["settings"]
        features = msgspec.convert(model["features"], FeatureSettings)
        ranker = msgspec.convert(model["ranker"], RankerSettings)
        feedback: Feedback = msgspec.convert(model["feedback"], Feedback)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise CorruptRecord(
            f"version {_name(version)} does not say what its model is like ({error}): it is left out"
        ) from error
    replica = Replica(settings, features, ranker, clock, feedback=feedback, live=live)
    replica.apply(version)
    return replica


def _served(model: dict[str, Any]) -> tuple[Any, ...]:
    """What of a trainer's settings a replica is made of."""
    features = model.get("features")
    return features.get("dim") if isinstance(features, dict) else None, model.get("ranker"), model.get("feedback")


def _fields(of: Place) -> dict[str, int]:
    """Of a log line that is about a version."""
    return {"epoch": of[0], "sequence": of[1]}


def _name(version: Version) -> str:
    return f"{version.epoch}.{version.sequence}"
