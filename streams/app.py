"""Faust with whole-batch delivery: one topic's records, a fetch at a time, read from the offsets of our own stores.

Stock Faust is not exact under kill -9: it books offsets of its own, and an agent sees one event at a time. Here Faust
does what it is good at (group membership, rebalances, the flow of a worker's life), and a `Feed` owns the offsets:

1. `Batches` hands the agent everything a fetch brought for one partition as one value.
2. Faust commits nothing. Offsets live in the feed's store, beside the state that they belong to.
3. At the end of each rebalance (`perform_seek`) the feed opens its stores, and the consumer goes to *their* offsets.
4. At a revocation Faust first waits for the batch in flight; then the feed closes what goes away.
5. Whatever goes wrong ends the process with one line. A failed batch is never skipped, nor tried again in silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import faust
import filelock
import xxhash
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from faust.transport.drivers import aiokafka as driver
from faust.transport.utils import DefaultSchedulingStrategy
from faust.types import TP

from embedding_store.errors import HeadraceError, StoreError

log = logging.getLogger("headrace")

_member_locks: list[filelock.BaseFileLock] = []  # held until the process ends

STOP_SECONDS = 20.0  # a stop that takes longer is an error: something hangs
SESSION_SECONDS = 6.0


class Feed(Protocol):
    """What a worker does with the partitions of one topic. Every method runs on the event loop of the worker."""

    async def open(self, partitions: set[int]) -> Mapping[int, int]:
        """These are ours now. Returns the offset from which each is to be read; calling it twice is harmless."""

    async def take(self, partition: int, records: list[ConsumerRecord]) -> int | None:
        """The next records of one partition. Returns None, or the offset to go back to, because some are missing.

        Waits while there is no room for them: that is all the back-pressure there is. Round a rebalance records may
        come that were asked for before it: of other offsets than the next one, or of a partition that is not open.
        """

    async def close(self, partitions: set[int]) -> None:
        """These are no longer ours: finish the batch in flight, let go of their stores. Unknown ones are no error."""


@dataclasses.dataclass(frozen=True)
class Intake:
    """Where a feed's records come from, and how they are fetched."""

    bootstrap: str
    topic: str
    group: str
    member: str | None = None  # a name that outlives the process: started again, it has its partitions back at once
    committed_only: bool = False  # read_committed: what aborted transactions wrote is never seen
    wait_ms: int = 50  # the broker collects for so long …
    min_bytes: int = 16_384  # … or until there is so much
    max_partition_bytes: int = 4 << 20
    max_records: int = 5_000  # of all partitions together, in one delivery


class Batches(DefaultSchedulingStrategy):
    """One message per partition and fetch: its value is the list of the records."""

    def iterate(self, records: Mapping[TP, list]) -> Iterator[tuple[TP, Any]]:
        for tp, batch in records.items():
            if batch:
                yield tp, dataclasses.replace(batch[-1], key=None, value=batch)


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread, on an aiokafka consumer whose fetch sizes and isolation level are ours."""

    app: BatchApp

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        self._assignor = RoundRobinPartitionAssignor
        intake = self.app.intake
        return AIOKafkaConsumer(
            bootstrap_servers=intake.bootstrap,
            client_id=intake.group,
            group_id=intake.group,
            group_instance_id=intake.member,
            partition_assignment_strategy=[RoundRobinPartitionAssignor],
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # before our seek; `perform_seek` makes sure that it goes where it is told
            isolation_level="read_committed" if intake.committed_only else "read_uncommitted",
            fetch_min_bytes=intake.min_bytes,
            fetch_max_wait_ms=intake.wait_ms,
            max_partition_fetch_bytes=intake.max_partition_bytes,
            max_poll_records=intake.max_records,
            session_timeout_ms=int(SESSION_SECONDS * 1000),
            heartbeat_interval_ms=1_000,
            rebalance_timeout_ms=20_000,
            request_timeout_ms=30_000,
        )


class BatchConsumer(driver.Consumer):
    """Seeks to the feed's offsets, commits none."""

    app: BatchApp
    _ours = False  # between an assignment and the next revocation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opening = asyncio.Lock()

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """A batch skips offsets by design; nothing to book."""

    def _new_offset(self, tp: TP) -> int | None:
        """Offsets are committed with the state they belong to, by the feed."""
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return None

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's alarm for streams that do not commit."""

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        self._ours = False
        await super().on_partitions_revoked(revoked)  # waits for the batch in flight
        await self.app.close_feed({tp.partition for tp in revoked})

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self._ours = True
        await super().on_partitions_assigned(assigned, generation_id)

    async def perform_seek(self) -> None:
        """The last step of a rebalance: open the stores, go to their offsets.

        Faust calls this too when a fetch comes back in the middle of a revocation: then nothing is ours to open.
        """
        async with self._opening:
            assigned = {tp.partition for tp in self.assignment()}
            if not self._ours or not assigned:
                return
            offsets = await self.app.guard(self.app.feed.open(assigned))
            self.app.opened |= assigned
            await self.app.guard(self._check(offsets))
            await self.app.guard(self.go_to(offsets))

    async def _check(self, offsets: Mapping[int, int]) -> None:
        """Raises StoreError unless Kafka has what is to be read next: it would silently begin elsewhere."""
        places = {p: TP(self.app.intake.topic, p) for p in offsets}
        first = await self.earliest_offsets(*places.values())
        end = await self.highwaters(*places.values())
        for partition, offset in offsets.items():
            have = first[places[partition]], end[places[partition]]
            if not have[0] <= offset <= have[1]:
                raise StoreError(
                    f"partition {partition} of {self.app.intake.topic} has the offsets {have[0]} to {have[1]}, the "
                    f"store goes on from {offset}: its records are gone (raise the retention), or the topic was made "
                    "anew; start with another topic prefix and data directory"
                )

    async def go_to(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets."""
        await self.seek_wait({TP(self.app.intake.topic, p): offset for p, offset in offsets.items()})


class BatchTransport(driver.Transport):
    Consumer = BatchConsumer


class BatchApp(faust.App):
    """A Faust app of one agent, which takes whole batches of one topic for a feed."""

    def __init__(self, intake: Intake, feed: Feed) -> None:
        self.intake, self.feed = intake, feed
        self.opened: set[int] = set()
        super().__init__(
            intake.group,
            broker=f"kafka://{intake.bootstrap}",
            loop=asyncio.get_running_loop(),
            ConsumerScheduler=Batches,
            value_serializer="raw",
            key_serializer="raw",
            stream_wait_empty=True,
            stream_buffer_maxsize=8,  # batches
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
            broker_session_timeout=SESSION_SECONDS,
            broker_heartbeat_interval=1.0,
            broker_rebalance_timeout=20.0,
            broker_request_timeout=30.0,
            datadir=Path(os.devnull),
        )
        self.transport = BatchTransport(self.conf.broker_consumer, self)
        self.agent(self.topic(intake.topic, value_serializer="raw", key_serializer="raw"), name="batches")(self._take)

    async def _take(self, stream: Any) -> None:
        async for records in stream:
            back_to = await self.guard(self.feed.take(records[0].partition, records))
            if back_to is not None:
                await self.guard(cast(BatchConsumer, self.consumer).go_to({records[0].partition: back_to}))

    async def close_feed(self, partitions: set[int]) -> None:
        self.opened -= partitions
        await self.guard(self.feed.close(partitions))

    async def guard(self, awaitable: Awaitable[Any]) -> Any:
        """Faust restarts what fails; we must not go on after it."""
        try:
            return await awaitable
        except Exception as error:  # noqa: BLE001 - every error at all is the end of the process
            die(error)

    def _crash(self, reason: BaseException) -> None:
        super()._crash(reason)
        die(reason)

    def _create_directories(self) -> None:
        """Faust keeps nothing on disk."""


def member_name(kind: str, folder: Path) -> str:
    """A name for this process in its group, the same when it is started again over `folder`.

    Kafka then gives it its partitions back at once, instead of waiting for the session of the one that was killed.
    Several workers may share the folder: each holds a lock there, as long as it lives, that numbers it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = xxhash.xxh3_64_hexdigest(f"{socket.gethostname()}\0{folder.resolve()}".encode())
    for number in itertools.count():
        lock = filelock.FileLock(folder / f"worker-{number}.lock")
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(blocking=False)
            _member_locks.append(lock)
            return f"{kind}-{where}-{number}"
    raise AssertionError("not reached")


def die(error: BaseException) -> NoReturn:
    """End the process at once: one line on stderr, exit 1. What is on disk and in Kafka is sound at any moment."""
    if isinstance(error, HeadraceError):
        line = str(error)
    else:
        log.error("not foreseen", exc_info=error)
        line = f"{type(error).__name__}: {error}"
    sys.stderr.write(f"headrace: {line}\n")
    sys.stderr.flush()
    os._exit(1)


def fail_loudly(task: asyncio.Task) -> None:
    """For `add_done_callback` of a task that nobody awaits: its error is the end of the process."""
    if not task.cancelled() and (error := task.exception()) is not None:
        die(error)


class _Sparse(logging.Filter):
    """Of the libraries' lines of a kind one in ten seconds: they repeat themselves while a broker is away."""

    def __init__(self) -> None:
        super().__init__()
        self._again: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == log.name:
            return True
        kind, now = str(record.msg), time.monotonic()
        if now < self._again.get(kind, 0.0):
            return False
        self._again[kind] = now + 10.0
        return True


def settle() -> None:
    """What is loaded stays: a full collection need not walk through all of torch (a stall of half a second)."""
    gc.collect()
    gc.freeze()


def configure_logging() -> None:
    """Our own lines on stderr, of the libraries only what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Sparse())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    # it logs each topic that it was told not to create, and each rejoin
    logging.getLogger("faust").setLevel(logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    logging.getLogger("aiokafka.producer.sender").setLevel(logging.CRITICAL)  # tracebacks of what it raises anyway


def run(
    main: Callable[[asyncio.Event], Awaitable[None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run `main(stop)` on an event loop of its own until it returns; SIGTERM and SIGINT set `stop`.

    Any error that `main` raises ends the process (`die`).
    """

    async def supervised() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        settle()
        await main(stop)

    configure_logging()
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(supervised())
    except Exception as error:  # noqa: BLE001 - the end of the process, whatever it is
        die(error)


async def serve_feed(intake: Intake, feed: Feed, stop: asyncio.Event) -> None:
    """Feed the records of the intake's topic to `feed` until `stop`; then drain, close everything, leave the group."""
    app = BatchApp(intake, feed)
    starting = asyncio.create_task(app.guard(app.start()))
    await stop.wait()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await app.stop()
            await app.close_feed(set(app.opened))
    finally:
        starting.cancel()
