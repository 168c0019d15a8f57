"""Whatever happens to the topic `parameters`: nothing is applied wrongly, nobody who asks sees an error, and the
replica is up to date again within seconds, by itself."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import uvicorn

from embedding_store.delta import Assembler, Version, encode
from embedding_store.kept import KeptCheckpoints
from embedding_store.signing import SigningSettings
from embedding_store.snapshot import Request, requests, snapshots, write_snapshot
from online_model.features import ITEM
from online_model.serving.api import RankRequest
from online_model.serving.app import create_app
from online_model.serving.holder import Holder
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings
from streams.early import Early
from streams.follower import Follower
from streams.settings import ServeWorkerSettings, TrainWorkerSettings
from streams.topics import TopicSettings, create_topics
from streams.train_copies import TrainCopies
from tests.streams.source import SETTINGS, Source

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("one_thread")]

RESYNC_SECONDS = 5
ASKED: dict[str, Any] = {"user": 1, "scenario": "video", "candidates": list(range(12))}
PART_BYTES = 200_000  # so that a version has several
Records = list[bytes | None]


class Serving:
    """A replica behind HTTP, as the serve worker runs it, in a thread; and somebody who asks it all the time."""

    def __init__(self, settings: ServeWorkerSettings) -> None:
        self._settings, self._end = settings, threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._begun = threading.Event()
        self._pool = ThreadPoolExecutor(2)
        self._running = self._pool.submit(lambda: asyncio.run(self._run()))
        assert self._begun.wait(20)
        self.answers: list[dict[str, Any]] = []
        self.errors: list[object] = []
        self._asking = self._pool.submit(self._ask)

    async def _run(self) -> None:
        empty = Replica(self._settings.serve, FeatureSettings(), RankerSettings())
        self.holder = Holder(empty)
        self.follower = Follower(self._settings, self.holder)
        server = uvicorn.Server(uvicorn.Config(create_app(self.holder), log_level="error", lifespan="off"))
        tasks = [asyncio.create_task(self.follower.run()), asyncio.create_task(server.serve([self._socket]))]
        self._begun.set()
        while not self._end.is_set():
            await asyncio.sleep(0.02)
            assert not any(task.done() for task in tasks), tasks
        server.should_exit = True
        await tasks[1]
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=10) as http:
            while not self._end.wait(0.01):
                if self.holder.replica.sequence < 0:
                    continue
                try:
                    answer = http.post("/v1/rank", json=ASKED)
                    answer.raise_for_status()
                    self.answers.append(answer.json())
                except httpx.HTTPError as error:
                    self.errors.append(error)

    @property
    def held(self) -> tuple[int, int]:
        return self.holder.replica.epoch, self.holder.replica.sequence

    def reaches(self, place: tuple[int, int], seconds: float = RESYNC_SECONDS) -> float:
        """Seconds until it holds exactly that and says nothing against it."""
        return until(lambda: self.held == place and not self.holder.behind, seconds, lambda: (self.held, place,
                                                                                           self.holder.behind))

    def end(self) -> None:
        self._end.set()
        self._asking.result(20)
        self._running.result(20)
        self._pool.shutdown()


class Answering:
    """What answers replicas in the train worker, round a trainer of the test."""

    def __init__(self, source: Source, settings: TrainWorkerSettings) -> None:
        self.source, self._settings = source, settings
        self._end, self._pool = threading.Event(), ThreadPoolExecutor(1)
        self._running = self._pool.submit(lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        with ThreadPoolExecutor(1) as thread:
            kept = KeptCheckpoints(self._settings.checkpoints_url)
            copies = TrainCopies(self._settings, self.source.trainer, kept, thread, lambda: False)
            task = asyncio.create_task(copies.snapshots())
            while not self._end.is_set():
                await asyncio.sleep(0.02)
                assert not task.done(), task
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def end(self) -> None:
        self._end.set()
        self._running.result(20)
        self._pool.shutdown()


def until(true: Callable[[], Any], seconds: float = 20, what: Callable[[], Any] = lambda: "") -> float:
    """Seconds until it is true."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() < start + seconds, f"not within {seconds} s: {what()}"
        time.sleep(0.01)
    return time.monotonic() - start


class World:
    """A trainer that answers, a replica that is asked, and between them a topic that is the test's."""

    def __init__(self, broker: str, folder: Path, serve: bool = True, signing: SigningSettings | None = None) -> None:
        topics = TopicSettings(prefix=f"test-{uuid.uuid4().hex[:12]}.", partitions=1)
        create_topics(broker, topics)
        common: dict[str, Any] = {"bootstrap": broker, "data_dir": folder / "data", "topics": topics}
        common["signing"] = signing or SigningSettings()
        self.serve_settings = ServeWorkerSettings(**common)
        self.train_settings = TrainWorkerSettings(**common)
        self.snapshots = folder / "data" / "snapshots"
        self.source = Source(broker, topics, folder, rows=6_000, block=50, signer=self.train_settings.signer)
        self.truth = Replica(ReplicaSettings(), SETTINGS.features, SETTINGS.ranker, clock=lambda: self.moment_ms)
        self.moment_ms = 0
        self.answering: Answering | None = None
        self.serving = Serving(self.serve_settings) if serve else None
        self.served: list[dict[str, Any]] = []  # answers that were held to the truth

    @property
    def replica(self) -> Serving:
        assert self.serving is not None
        return self.serving

    @property
    def place(self) -> tuple[int, int]:
        return self.source.trainer.epoch, self.source.trainer.sequence

    def answers(self) -> None:
        """The trainer is there for who asks."""
        self.answering = Answering(self.source, self.train_settings)

    def version(self) -> Version:
        version = decoded(self.source.version())
        return version

    def check(self, versions: list[Version]) -> None:
        """Each answer since the last check is what its version gives at its moment; those are `versions` or held."""
        answers, self.replica.answers = self.replica.answers, []
        for version in [None, *versions]:
            if version is not None:
                assert self.truth.apply(version)
            mine = [answer for answer in answers if answer["model_version"] == self.truth.version]
            answers = [answer for answer in answers if answer["model_version"] != self.truth.version]
            for answer in mine[:: 1 + len(mine) // 20]:
                self.moment_ms = answer["moment_ms"]
                wanted = {ranked.item: ranked.score for ranked in self.truth.rank(RankRequest(**ASKED)).items}
                assert {item["item"]: item["score"] for item in answer["items"]} == pytest.approx(wanted, rel=1e-5)
                self.served.append(answer)
        assert not answers, f"versions that never were: {({a['model_version'] for a in answers})}"
        assert not self.replica.errors

    def end(self) -> None:
        for part in (self.serving, self.answering):
            if part is not None:
                part.end()
        self.source.close()


def decoded(parts: list[bytes]) -> Version:
    assembler = Assembler()
    *_, version = [assembler.add(part) for part in parts]
    assert version is not None
    return version


def parts_of(version: Version, **changed: Any) -> list[bytes]:
    return encode(dataclasses.replace(version, **changed), PART_BYTES)


@pytest.fixture(scope="module")
def world(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One for all faults: each finds what the one before it left behind."""
    made = World(broker, tmp_path_factory.mktemp("followed"))
    first = made.version()
    made.source.send(*parts_of(first))
    made.replica.reaches((1, 1), 30)
    made.answers()
    until(lambda: snapshots(made.snapshots))
    made.truth.apply(first)
    until(lambda: made.replica.answers)
    made.check([])
    yield made
    made.end()


def flipped(part: bytes, seed: int = 1) -> bytes:
    """One bit of it."""
    broken = bytearray(part)
    broken[random.Random(seed).randrange(len(broken))] ^= 4
    return bytes(broken)


def other_model(version: Version, **features: Any) -> dict[str, Any]:
    """What a version of a trainer with other settings says of itself."""
    settings = version.info["settings"]
    return {**version.info, "settings": {**settings, "features": {**settings["features"], **features}}}


def made_up(version: Version, **changed: Any) -> list[bytes]:
    """As if the next version came from elsewhere: all of its rows are wrong."""
    tables = {name: dataclasses.replace(rows, columns=rows.columns | {"weights": rows.columns["weights"] + 5})
              for name, rows in version.tables.items()}  # fmt: skip
    return parts_of(version, **({"tables": tables} | changed))


# What is sent instead of three versions that go on from one another.
FAULTS: dict[str, Callable[[Version, Version, Version], list[Any]]] = {
    "one is missing": lambda a, b, c: [parts_of(a), parts_of(c)],
    "the last two are missing, and something damaged is there": lambda a, b, c: [parts_of(a), [b"rubbish"]],
    "each comes twice": lambda a, b, c: [parts_of(a) * 2, parts_of(b), parts_of(a), parts_of(c), parts_of(c)],
    "the order is another": lambda a, b, c: [parts_of(c), parts_of(b), parts_of(a)],
    "parts are in another order": lambda a, b, c: [parts_of(a)[::-1], parts_of(b), parts_of(c)],
    "a part is missing": lambda a, b, c: [parts_of(a), parts_of(b)[:1] + parts_of(b)[2:], parts_of(c)],
    "the last part is missing": lambda a, b, c: [parts_of(a), parts_of(b)[:-1], parts_of(c)],
    "a bit is another": lambda a, b, c: [parts_of(a), [flipped(p) for p in parts_of(b)], parts_of(c)],
    "it is cut off": lambda a, b, c: [parts_of(a), [p[: len(p) // 2] for p in parts_of(b)], parts_of(c)],
    "it is empty, or nothing": lambda a, b, c: [parts_of(a), [b"", None], parts_of(b), [None], parts_of(c)],
    "rubbish between its parts": lambda a, b, c: [[parts_of(a)[0], b"{}", *parts_of(a)[1:]], parts_of(b), parts_of(c)],
    "one from the future": lambda a, b, c: [made_up(a, epoch=9, sequence=99, base=(9, 98)), *map(parts_of, (a, b, c))],
    "one from far ahead, then none": lambda a, b, c: [made_up(a, sequence=10**6, base=(a.epoch, 10**6 - 1))],
    "another first version": lambda a, b, c: [made_up(a, epoch=7, base=None), *map(parts_of, (a, b, c))],
    "other settings": lambda a, b, c: [made_up(a, info=other_model(a, eps=0.5)), *map(parts_of, (b, c))],
    "other settings of an epoch to come": lambda a, b, c: [
        made_up(a, epoch=a.epoch + 1, info=other_model(a, dim=16)), *map(parts_of, (a, b, c))],
    "no settings": lambda a, b, c: [made_up(a, info={}), *map(parts_of, (a, b, c))],
    "other shapes": lambda a, b, c: [
        made_up(a, dense={name: np.zeros((3, 3), np.float32) for name in a.dense}), *map(parts_of, (a, b, c))],
    "other tables": lambda a, b, c: [
        made_up(a, tables={"stranger": a.tables[ITEM]}), *map(parts_of, (a, b, c))],
    "other columns": lambda a, b, c: [
        made_up(a, tables={ITEM: a.tables[ITEM].without("heat")}), *map(parts_of, (a, b, c))],
    "numbers that are none": lambda a, b, c: [
        made_up(a, dense={name: np.full_like(w, np.nan) for name, w in a.dense.items()}), parts_of(b), parts_of(c)],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_never_applied_nor_seen_by_who_asks_and_mended_at_once(world: World, fault: str) -> None:
    versions = [world.version() for _ in range(3)]
    for records in FAULTS[fault](*versions):
        world.source.send(*records)
    world.replica.reaches(world.place)
    asked = len(world.replica.answers)
    until(lambda: len(world.replica.answers) > asked + 1)
    world.check(versions)
    assert not requests(world.snapshots), "nothing is asked for any more"


@pytest.fixture
def own(broker: str, tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Worlds of this test alone."""
    made: list[World] = []

    def make(serve: bool = True) -> World:
        made.append(World(broker, tmp_path, serve))
        return made[-1]

    yield make
    for world in made:
        world.end()


def test_a_trainer_that_goes_back_and_one_that_changes_its_shape_reach_a_replica(
    own: Callable[..., World], tmp_path: Path
) -> None:
    world = own()
    for number in range(4):
        if number == 2:
            world.source.trainer.store.checkpoint(tmp_path / "old")
        world.source.send(*world.source.version())
    world.replica.reaches((1, 4), 20)
    world.source.go_back(tmp_path / "old")
    world.answers()
    world.source.send(*world.source.version())
    world.replica.reaches((2, 3))
    assert world.answering is not None
    world.answering.end()
    wide = msgspec.structs.replace(SETTINGS, features=msgspec.structs.replace(SETTINGS.features, dim=16))
    world.source.change(wide)
    world.answers()
    world.source.send(*world.source.version())
    world.replica.reaches(world.place)
    assert world.place[0] == 3
    assert world.replica.holder.replica.state.users.columns["weights"].shape[1] == 16
    asked = len(world.replica.answers)
    until(lambda: len(world.replica.answers) > asked)
    assert not world.replica.errors


def test_a_replica_that_starts_under_full_publishing_is_ready_when_it_is_where_the_topic_ended(
    own: Callable[..., World],
) -> None:
    world = own(serve=False)
    for number in range(12):
        world.source.send(*world.source.version())
        if number == 5:
            world.source.snapshot()
    more = [world.source.version() for _ in range(30)]
    end = threading.Event()

    def publish() -> None:
        for parts in more:
            world.source.send(*parts)
            end.wait(0.02)

    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(publish)
        world.serving = Serving(world.serve_settings)
        answers = []
        with httpx.Client(base_url=world.replica.url, timeout=10) as http:
            while not answers or answers[-1].status_code != 200:
                answers.append(http.get("/readyz"))
                assert answers[-1].status_code == 200 or answers[-1].json()["detail"], "it says why it is not ready"
        assert world.replica.follower.caught_up.is_set()
        assert world.replica.held >= (1, 12)
        publishing.result(30)
    world.replica.reaches((1, 42))
    assert not world.replica.errors


def test_a_damaged_snapshot_is_passed_over_and_written_anew(own: Callable[..., World]) -> None:
    world = own(serve=False)
    for _ in range(2):
        world.version()  # no longer in the topic
        world.source.snapshot()
    broken = snapshots(world.snapshots)[0] / "part-000000"
    broken.write_bytes(flipped(broken.read_bytes()))
    world.serving = Serving(world.serve_settings)
    world.replica.reaches((1, 1), 20)  # from the older one
    world.source.send(*parts_of(dataclasses.replace(world.version(), base=(1, 2))))
    until(lambda: requests(world.snapshots))
    assert world.replica.held == (1, 1), "the trainer is away"
    world.answers()
    world.replica.reaches((1, 3))
    shutil.rmtree(world.snapshots / "1-3")
    assert not world.replica.errors


def test_a_folder_of_snapshots_that_fails_is_not_the_end_of_a_replica(own: Callable[..., World]) -> None:
    world = own(serve=False)
    world.snapshots.parent.mkdir(parents=True, exist_ok=True)
    world.snapshots.symlink_to(world.snapshots)  # to itself: nothing is read, written or removed there
    world.serving = Serving(world.serve_settings)
    world.source.send(*parts_of(world.version()))
    world.replica.reaches((1, 1), 20)
    world.version()  # is lost
    world.source.send(*parts_of(world.version()))
    until(lambda: world.replica.holder.behind)
    assert world.replica.held == (1, 1)
    world.snapshots.unlink()
    world.answers()
    world.replica.reaches((1, 3))
    assert not world.replica.errors


def test_what_is_there_of_another_trainer_is_seen_by_the_versions_that_come(own: Callable[..., World]) -> None:
    world = own(serve=False)
    first = world.version()
    long_ago = first.created_ms - 3_600_000
    write_snapshot(world.snapshots, dataclasses.replace(first, epoch=9, sequence=500, base=None, created_ms=long_ago))
    world.serving = Serving(world.serve_settings)
    until(lambda: world.replica.held == (9, 500))
    world.answers()
    world.source.send(*parts_of(world.version()))
    world.replica.reaches((1, 2))


def test_however_many_ask_the_trainer_answers_all_with_one_snapshot(own: Callable[..., World]) -> None:
    world = own(serve=False)
    world.source.version()
    asking = [Request(world.snapshots) for _ in range(20)]
    for request in asking:
        request.make()
    (world.snapshots / ".wanted-left-behind").write_bytes(b"\xff/../../etc\n" * 1_000)
    world.answers()
    until(lambda: all(request.open is False for request in asking))
    assert [path.name for path in snapshots(world.snapshots)] == ["1-1"]
    assert not requests(world.snapshots)
    made = snapshots(world.snapshots)[0].stat().st_mtime_ns
    again = Request(world.snapshots)
    again.make()
    until(lambda: again.open is False)
    assert snapshots(world.snapshots)[0].stat().st_mtime_ns == made, "it is there already"
    again.make(snapshots(world.snapshots))
    until(lambda: again.open is False)
    assert snapshots(world.snapshots)[0].stat().st_mtime_ns > made, "but cannot be read"


def test_what_comes_too_early_is_kept_in_bounded_memory() -> None:
    def version(sequence: int) -> Version:
        return Version(1, sequence, (1, sequence - 1), dense={"w": np.zeros(10_000, np.float32)})

    early = Early(1_000_000)
    for sequence in range(10, 60):
        early.add(version(sequence), sequence)
    assert early.nbytes <= 1_000_000
    assert len(early) == 22
    assert early.lost == (1, 37)
    assert early.after((1, 37)) is not None
    assert early.after((1, 36)) is None
    assert early.leads_from((1, 37))
    assert not early.leads_from((1, 36))
    early.forget((1, 50), before=55)
    assert [early.after((1, n)) is not None for n in range(50, 60)] == [n >= 54 for n in range(50, 59)] + [False]
    early.forget((1, 59))
    assert (len(early), early.nbytes) == (0, 0)
