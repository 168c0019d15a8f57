"""The serve worker: a replica kept fresh from the topic `parameters`, behind HTTP on the loopback.

Start: the newest snapshot, if there is one, then the versions after it, each as soon as it is committed. A version that
does not go on from what the replica has (a gap, a rollback, a corrupt record before it) is never applied: the replica
keeps serving what it has, says so in `/readyz`, and loads the first snapshot that leads past the gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch
import uvicorn
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client import Counter

from embedding_store.delta import Assembler, Version
from embedding_store.errors import BrokerError, CorruptRecord, StoreError, UsageError
from embedding_store.snapshot import latest_snapshot, place_of, read_snapshot
from online_model.features import FeatureSettings
from online_model.ranker import RankerSettings
from online_model.serving.app import create_app
from online_model.serving.errors import VersionGap
from online_model.serving.holder import Holder
from online_model.serving.replica import Replica, ReplicaSettings
from online_model.settings import Feedback
from streams import app
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")

HOST = "127.0.0.1"
CLOCK_MARGIN_MS = 60_000  # by so much the trainer's clock may differ from the broker's
DRAIN_SECONDS = 5
LOOK_SECONDS = 0.5  # for a snapshot that is being waited for


def run_serve(settings: ServeWorkerSettings) -> None:
    """Serve in the foreground until SIGTERM or SIGINT. Fatal errors end the process with exit 1 and one line."""
    app.run(lambda stop: _serve(settings, stop), uvloop.new_event_loop)


async def _serve(settings: ServeWorkerSettings, stop: asyncio.Event) -> None:
    # A request is a millisecond of small matrices: threads that meet at each of them cost more than they bring, and
    # on shared cores much more.
    torch.set_num_threads(1)
    listening = _listen(settings.port)
    holder = Holder(Replica(settings.serve, FeatureSettings(), RankerSettings()))  # empty: never asked to score
    server = _Server(
        uvicorn.Config(
            create_app(holder, settings.serve.max_age_ms),
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # there is none in front of the loopback
            ws="none",
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    follower = Follower(settings, holder)
    following, serving = asyncio.create_task(follower.run()), asyncio.create_task(server.serve([listening]))
    for task in (following, serving):
        task.add_done_callback(app.fail_loudly)
    log.info("serving on http://%s:%s", *listening.getsockname())
    await stop.wait()
    holder.close()
    server.should_exit = True
    await serving
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port), backlog=2048)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port}: choose another port") from error


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM is handled by the worker: the long polls are let go first."""
        yield


class Follower:
    """Feeds a holder's replica from the topic `parameters` and the snapshots."""

    def __init__(self, settings: ServeWorkerSettings, holder: Holder) -> None:
        self._settings, self._holder = settings.serve, holder
        self._snapshots = settings.data_dir / "snapshots"
        self._partition = TopicPartition(settings.topics.parameters, 0)
        self._useless: Path | None = None  # a snapshot that could not be read
        self._assembler = Assembler()
        self._refused = Counter(
            "headrace_replica_records_refused", "Corrupt records of `parameters`", registry=holder.metrics.registry
        )
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=settings.bootstrap,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # where what is next was deleted, the replica will see a gap
            fetch_max_wait_ms=500,  # the broker answers as soon as there is one byte
            max_partition_fetch_bytes=16 << 20,
        )

    async def run(self) -> None:
        """Follow until cancelled. Raises BrokerError."""
        try:
            await self._consumer.start()
            try:
                self._consumer.assign([self._partition])
                await self._load_snapshot(lambda place: True)
                while True:
                    await self._follow()
            finally:
                await self._consumer.stop()
        except KafkaError as error:
            topic = self._partition.topic
            raise BrokerError(f"cannot read {topic} ({error}): is the broker up? `headrace broker status`") from error

    async def _follow(self) -> None:
        """One fetch."""
        fetched = await self._consumer.getmany(timeout_ms=1_000, max_records=100)
        for record in fetched.get(self._partition, ()):
            try:
                version = self._assembler.add(record.value)
                if version is not None:
                    try:
                        self._apply(version)
                    except VersionGap as gap:
                        log.warning("%s", gap)
                        await self._recover(version)
                        return  # the position has changed
            except CorruptRecord as error:
                # What it belonged to is now missing: the next version will show a gap.
                log.error("refused the record at offset %s of %s: %s", record.offset, record.topic, error)
                self._refused.inc()
                self._assembler = Assembler()
                self._holder.behind = "a corrupt version was refused; waiting for the next one, or a snapshot"

    def _apply(self, version: Version) -> None:
        if version.base is None and self._holder.replica.sequence < 0:
            self._holder.swap(_replica_of(version, self._settings))
        else:
            self._holder.apply(version)

    async def _recover(self, version: Version) -> None:
        """Wait for a snapshot that leads past the gap before `version`, and load it."""
        self._holder.behind = "a version is missing; waiting for a snapshot that leads past it"
        replica = self._holder.replica
        held = replica.epoch, replica.sequence
        while not await self._load_snapshot(lambda place: _leads_past(place, version, held)):
            await asyncio.sleep(LOOK_SECONDS)

    async def _load_snapshot(self, wanted: Callable[[tuple[int, int]], bool]) -> bool:
        """Serve the newest snapshot, and read on from its time; False if there is none that is wanted."""
        path = latest_snapshot(self._snapshots)
        if path is None or path == self._useless or not wanted(place_of(path)):
            return False
        try:
            version = await asyncio.to_thread(read_snapshot, path)
            replica = await asyncio.to_thread(_replica_of, version, self._settings)
            await asyncio.to_thread(replica.prepare)
        except (StoreError, CorruptRecord) as error:  # damaged, or just replaced by a newer one
            log.error("%s", error)
            self._useless = path
            return False
        self._holder.swap(replica)
        self._holder.behind = ""
        self._assembler = Assembler()
        since = {self._partition: max(0, version.created_ms - CLOCK_MARGIN_MS)}
        found = (await self._consumer.offsets_for_times(since))[self._partition]
        if found is None:
            await self._consumer.seek_to_end(self._partition)
        else:
            self._consumer.seek(self._partition, found.offset)
        log.info("serving snapshot %s", path.name)
        return True


def _replica_of(version: Version, settings: ReplicaSettings) -> Replica:
    """A replica at a version that holds everything; what its model is like, the version says. Raises CorruptRecord."""
    try:
        model = version.info["settings"]
        features = msgspec.convert(model["features"], FeatureSettings)
        ranker = msgspec.convert(model["ranker"], RankerSettings)
        feedback: Feedback = msgspec.convert(model["feedback"], Feedback)
    except (KeyError, msgspec.ValidationError) as error:
        name = f"{version.epoch}.{version.sequence}"
        raise CorruptRecord(f"version {name} does not say what its model is like ({error}): it is left out") from error
    replica = Replica(settings, features, ranker, feedback=feedback)
    replica.apply(version)
    return replica


def _leads_past(place: tuple[int, int], version: Version, held: tuple[int, int]) -> bool:
    """Whether a snapshot at `place` closes the gap before `version`: that goes on from it, or is in it.

    One from before what is `held` does not, though the version may go on from it, as after a rollback: answers would
    go back, and the versions after it in the topic lead to the same gap.
    """
    return place > held and (place == version.base or place >= (version.epoch, version.sequence))
