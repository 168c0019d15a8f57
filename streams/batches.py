"""Faust with whole-batch delivery: one topic's records, a fetch at a time, read from the offsets of our own stores.

Stock Faust is not exact under kill -9: it books offsets of its own, and an agent sees one event at a time. Here Faust
does what it is good at (group membership, rebalances, the flow of a worker's life), and a `Feed` owns the offsets:

    class Counting:                                            # a Feed; its store keeps (count, next offset) together
        async def open(self, partitions):
            return {p: self.store.next_offset(p) for p in partitions}
        async def take(self, partition, records):
            expected = self.store.next_offset(partition)
            if records[0].offset > expected:
                return expected                                # some are missing: go back to them
            new = [r for r in records if r.offset >= expected]
            if new:
                self.store.write(partition, len(new), new[-1].offset + 1)   # one atomic write
        async def close(self, partitions):
            ...

    app.run(lambda stop: serve_feed(Intake("127.0.0.1:9092", "events", "counting"), Counting(), stop))

How it works:

1. `Batches` hands the agent everything a fetch brought for one partition as one value.
2. Faust commits nothing of the topic. Offsets live in the feed's store, beside the state that they belong to.
3. At the end of each rebalance (`perform_seek`) the feed opens its stores, and the consumer goes to *their* offsets.
4. At a revocation, and at the end, Faust first waits for the batch in flight; then the feed closes what goes away.
5. Whatever goes wrong ends the process with one line. A failed batch is never skipped, nor tried again in silence.

Promised: with a feed that writes state and offset in one piece, each record counts once, whatever is killed when.
Not promised: where batches begin and end (a restart cuts the same records otherwise), nor that every record comes only
once to `take`: a feed drops what lies below its next offset and goes back where some are missing.

Other topics of the same app keep Faust's ordinary path: `prepare(app)` declares their agents, which see one event at a
time, and Faust commits what they have acknowledged: each event at least once, as always. They share the consumer, so
its fetch sizes and isolation level too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import faust
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import IllegalStateError
from faust.serializers import codecs
from faust.transport.drivers import aiokafka as driver
from faust.transport.utils import DefaultSchedulingStrategy
from faust.types import TP
from faust.types.auth import CredentialsT
from mode.threads import ServiceThread, WorkerThread

from embedding_store.errors import StoreError, UsageError
from streams.app import die
from streams.kafka_clients import Bootstrap, client_arguments

log = logging.getLogger("headrace")

STOP_SECONDS = 20.0  # a stop that takes longer is an error: something hangs
SESSION_SECONDS = 6.0
OPEN_SECONDS = 86_400.0  # a rebalance that takes longer Faust gives up, without a word and for ever: a feed has its own


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

    bootstrap: Bootstrap
    topic: str
    group: str
    member: str | None = None  # a name that outlives the process: started again, it has its partitions back at once
    committed_only: bool = False  # read_committed: what aborted transactions wrote is never seen
    wait_ms: int = 50  # the broker collects for so long …
    min_bytes: int = 16_384  # … or until there is so much
    max_partition_bytes: int = 4 << 20
    max_records: int = 5_000  # of all partitions together, in one delivery


class Batches(DefaultSchedulingStrategy):
    """Of `topics` one message per partition and fetch, its value the list of the records; the others as always."""

    def __init__(self, topics: Collection[str]) -> None:
        self._topics = frozenset(topics)

    def iterate(self, records: Mapping[TP, list]) -> Iterator[tuple[TP, Any]]:
        others = {}
        for tp, batch in records.items():
            if tp.topic not in self._topics:
                others[tp] = batch
            elif batch:
                yield tp, dataclasses.replace(batch[-1], key=None, value=batch)
        yield from super().iterate(others)


class _Thread(WorkerThread):
    """Keeps no process alive: one that is stopped while it starts would else wait for it for ever."""

    def __init__(self, service: ServiceThread, **more: Any) -> None:
        super().__init__(service, **more)
        self.daemon = True


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread, on an aiokafka consumer whose fetch sizes and isolation level are ours."""

    Worker = _Thread
    app: BatchApp

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        self._assignor = RoundRobinPartitionAssignor
        intake = self.app.intake
        return AIOKafkaConsumer(
            **client_arguments(intake.bootstrap),
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
    """Seeks to the feed's offsets, commits none of them. Other topics are Faust's."""

    app: BatchApp
    _ours = False  # between an assignment and the next revocation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler = Batches({self.app.intake.topic})
        self._opening = asyncio.Lock()

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """A batch skips offsets by design: nothing to book. Elsewhere a gap ends before the message after it.

        Faust counts that message in (`offset_to`), and would commit it before its agent has seen it.
        """
        if not self._is_batch(tp):
            await super()._add_gap(tp, offset_from, offset_to - 1)

    def _new_offset(self, tp: TP) -> int | None:
        """Offsets of batches are committed with the state they belong to, by the feed."""
        if not self._is_batch(tp):
            return super()._new_offset(tp)
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        return None

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's alarm for streams that do not commit: as batches do not."""
        if not self._is_batch(tp):
            super().verify_event_path(now, tp)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        self._ours = False
        await super().on_partitions_revoked(revoked)  # waits for the batch in flight
        await self.app.close_feed(self._batch_partitions(revoked))

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self._ours = True
        await super().on_partitions_assigned(assigned, generation_id)

    async def perform_seek(self) -> None:
        """The last step of a rebalance: open the stores, go to their offsets.

        Faust calls this too when a fetch comes back in the middle of a revocation: then nothing is ours to open.
        """
        async with self._opening:
            if not self._ours:
                return
            if any(not self._is_batch(tp) for tp in self.assignment()):
                await super().perform_seek()  # the batch topic as well: it is sent where it belongs below
            assigned = self._batch_partitions(self.assignment())
            if not assigned:
                return
            offsets = await self.app.guard(self.app.feed.open(assigned))
            self.app.opened |= assigned
            await self.app.guard(self.go_to(await self.app.guard(self._there(offsets))))

    def _is_batch(self, tp: TP) -> bool:
        return tp.topic == self.app.intake.topic

    def _batch_partitions(self, places: Collection[TP]) -> set[int]:
        return {tp.partition for tp in places if self._is_batch(tp)}

    async def _there(self, offsets: Mapping[int, int]) -> dict[int, int]:
        """Where to read on. Raises StoreError unless Kafka has what is read next: it would silently begin elsewhere.

        What Kafka has deleted after a long rest may be but the marker of a transaction, behind the last record that was
        read. If it was more, the feed sees it by the record that comes next.
        """
        places = {p: TP(self.app.intake.topic, p) for p in offsets}
        first = await self.earliest_offsets(*places.values())
        end = await self.highwaters(*places.values())
        there = {}
        for partition, offset in offsets.items():
            have = first[places[partition]], end[places[partition]]
            there[partition] = max(offset, have[0]) if offset else offset
            if not have[0] <= there[partition] <= have[1]:
                raise StoreError(
                    f"partition {partition} of {self.app.intake.topic} has the offsets {have[0]} to {have[1]}, the "
                    f"store goes on from {offset}: the topic was made anew, or what is to be read is gone (raise the "
                    "retention); start with another topic prefix and data directory"
                )
        return there

    async def go_to(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets. Where the group has moved on meanwhile, the rebalance that follows does it."""
        try:
            await self.seek_wait({TP(self.app.intake.topic, p): offset for p, offset in offsets.items()})
        except IllegalStateError:
            log.info("partitions %s are not ours any more: the group moves on", ", ".join(map(str, sorted(offsets))))


class BatchTransport(driver.Transport):
    Consumer = BatchConsumer


def _unpickles(codec: Any) -> bool:
    nodes = codec.split("|") if isinstance(codec, str) else getattr(codec, "nodes", ())
    names = [node if isinstance(node, str) else type(node).__name__ for node in nodes]
    return any("pickle" in name.lower() for name in names)


def _refuse_pickle(codec: Any, what: str) -> None:
    if _unpickles(codec):
        raise UsageError(f"{what} is pickle, which runs whatever code a record brings: use raw or json")


def _forget_pickle() -> None:
    """Faust knows codecs that unpickle, and takes more from packages that are installed; here they have no name.
    Raises UsageError where something else was given such a codec under another name."""
    codecs.get_codec("raw")  # Faust looks for those of packages when it is first asked
    for name in [name for name in codecs.codecs if "pickle" in name]:
        del codecs.codecs[name]
    for name, codec in codecs.codecs.items():
        _refuse_pickle(codec, f"Faust's codec {name}")


def _credentials(to: Bootstrap) -> CredentialsT | None:
    """For Faust's own producer, which is always there."""
    given = client_arguments(to)
    if "sasl_mechanism" in given:
        return faust.SASLCredentials(
            username=given["sasl_plain_username"], password=given["sasl_plain_password"],
            mechanism=given["sasl_mechanism"], ssl_context=given.get("ssl_context"),
        )  # fmt: skip
    return faust.SSLCredentials(given["ssl_context"]) if "ssl_context" in given else None


class BatchApp(faust.App):
    """A Faust app with an agent that takes whole batches of one topic for a feed; others are added before `start`."""

    def __init__(self, intake: Intake, feed: Feed) -> None:
        _forget_pickle()
        self.intake, self.feed = intake, feed
        self.opened: set[int] = set()
        super().__init__(
            intake.group,
            broker=f"kafka://{intake.bootstrap}",
            broker_credentials=_credentials(intake.bootstrap),
            loop=asyncio.get_running_loop(),
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
            broker_request_timeout=OPEN_SECONDS,  # of `perform_seek`; our consumer's own requests have theirs
            datadir=Path(os.devnull),
        )
        self.transport = BatchTransport(self.conf.broker_consumer, self)
        self.agent(self.topic(intake.topic, value_serializer="raw", key_serializer="raw"), name="batches")(self._take)

    def topic(self, *topics: str, **options: Any) -> Any:
        """As of faust.App. Raises UsageError where its records would be unpickled."""
        for name in ("key_serializer", "value_serializer"):
            _refuse_pickle(options.get(name), f"{name} of {', '.join(map(str, topics))}")
        return super().topic(*topics, **options)

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


async def serve_feed(
    intake: Intake, feed: Feed, stop: asyncio.Event, prepare: Callable[[BatchApp], None] | None = None
) -> None:
    """Feed the records of the intake's topic to `feed` until `stop`; then drain, close everything, leave the group.

    `prepare(app)` declares agents of other topics.
    """
    app = BatchApp(intake, feed)
    if prepare is not None:
        prepare(app)
    starting = asyncio.create_task(app.guard(app.start()))
    await stop.wait()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await app.stop()
            await app.close_feed(set(app.opened))
    finally:
        starting.cancel()
