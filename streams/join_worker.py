"""The join worker: whole batches of `events` in, blocks of joined rows out, each exactly once.

Per partition there is a lane: a joiner, its store and a transactional producer. For a slice of records a lane does

1. join:     `Joiner.process`, in memory;
2. commit:   state, next offset and the outbox (the block, the dead letters), ONE atomic write to the lane's RocksDB;
3. publish:  the outbox, and the offset of the group `<group>.store`, ONE Kafka transaction;
4. go on with the next slice.

Killed before 2, nothing has happened. Killed between 2 and 3, the store is ahead of the group's offset, and the next
owner sends the same bytes again. So each block [from, to) is in `examples` once, and goes on where the last one ended.
Where the store is behind the group's offset (a power cut undid commits that did not wait for the disk, or it is an old
copy), the records between them are joined again and nothing is sent: the joiner is a function of the records.
Not guaranteed: that the blocks of two runs over the same log have the same boundaries. Their rows are the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from embedding_store.errors import BrokerError, StoreError, StoreLocked
from online_model.examples import Counts
from streams import app, batches, events
from streams.blocks import encode_block
from streams.dead_letters import DeadLetter
from streams.join_store import JoinStore
from streams.joiner import Joiner, Record
from streams.metrics import JoinMetrics, serve_metrics
from streams.outlet import Message, Outlet
from streams.settings import JoinWorkerSettings

log = logging.getLogger("headrace")

LOCK_SECONDS = 15.0  # an old owner has so long to let go of a store
MAX_SLICE = 2_000  # records that are joined and committed at once; about 100 ms of work
MAX_WAITING = 10_000  # records of a lane in memory; the others stay in Kafka
MAX_WAITING_BYTES = 32 << 20
BLOCK_BYTES = 900_000  # slices shrink so that blocks stay below
COMMIT_SECONDS = 0.15  # between two commits of a partition, while it keeps up; each costs some 7 ms of a core
TICK_SECONDS = 0.2  # without a record, while events are held
SLOW_TICK_SECONDS = 1.0  # while only timers can fire


def run_join(settings: JoinWorkerSettings) -> None:
    """Join in the foreground until SIGTERM or SIGINT. Fatal errors end the process with exit 1 and one line."""
    app.run(lambda stop: _join(settings, stop))


async def _join(settings: JoinWorkerSettings, stop: asyncio.Event) -> None:
    worker = JoinWorker(settings)
    await worker.start()
    try:
        intake = batches.Intake(
            bootstrap=settings.bootstrap,
            topic=settings.topics.events,
            group=worker.group,
            member=app.member_name("join", settings.data_dir / "join"),
        )
        await batches.serve_feed(intake, worker, stop)
    finally:
        await worker.stop()


class Lane:
    """One partition that is ours, from its opening to its closing. A lane that failed is not used again."""

    def __init__(self, worker: JoinWorker, partition: int) -> None:
        self.partition = partition
        self.next_offset = 0  # all below has been committed and published
        self.counts = Counts()  # as of there
        self.expected = 0  # all below has been committed, or waits here
        self._sent = 0  # all below has been published before; more than `next_offset` after a power cut
        self._last_record = self._last_event = time.monotonic()
        self._held = False  # some records below `next_offset` wait for the watermark
        self._worker, self._settings = worker, worker.settings
        self._outlet = Outlet(worker.settings.bootstrap, f"{worker.group}-{partition}")
        self._waiting: deque[ConsumerRecord] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Condition()
        self._slice = MAX_SLICE
        self._hole: int | None = None
        self._closing = False
        self._running: asyncio.Task | None = None

    async def open(self) -> None:
        """Fence the old owner, open the store, send what it had committed but perhaps not sent.

        Raises StoreLocked, StoreError, BrokerError, FencedError.
        """
        self._store = await self._open_store()
        await self._outlet.start()  # only now is the group's offset final: an unfinished transaction is undone
        group_offset = await self._worker.group_offset(self.partition)
        self.next_offset = await self._agree(group_offset)
        self.expected = self.next_offset
        self._joiner = Joiner(self._settings.join, self.partition, self.next_offset, self._store.state())
        self.counts = replace(self._joiner.counts)
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(app.fail_loudly)

    async def take(self, records: list[ConsumerRecord]) -> int | None:
        """The next records; waits until there is room. Returns the offset to go back to, if a hole is before them."""
        first = records[0].offset
        if first > self.expected:
            if first != self._hole:
                self._hole = first  # if the log itself has this hole, the same record comes again
                return self.expected
            if await self._worker.earliest(self.partition) > self.expected:
                raise StoreError(
                    f"partition {self.partition}: Kafka has deleted records from {self.expected} on before they were "
                    f"joined: raise retention.ms of {self._settings.topics.events}, start with another topic prefix"
                )
        fresh = [record for record in records if record.offset >= self.expected]
        if fresh:
            self._hole = None
            self.expected = fresh[-1].offset + 1
            self._last_record = time.monotonic()
            async with self._changed:
                await self._changed.wait_for(self._has_room)
                self._waiting.extend(fresh)
                self._waiting_bytes += sum(len(record.value or b"") for record in fresh)
                self._changed.notify_all()
        return None

    def needs_tick(self) -> bool:
        """Whether it is idle, and time alone would let something happen in it."""
        now, join = time.monotonic(), self._settings.join
        last_timer = join.future_ms + join.disorder_ms + max(join.wait_ms, join.watch_wait_ms)
        if now - self._last_event > last_timer / 1000 + 2 * SLOW_TICK_SECONDS or self._waiting:
            return False
        if now - self._last_record < (TICK_SECONDS if self._held else SLOW_TICK_SECONDS):
            return False
        self._last_record = now
        return True

    async def close(self) -> None:
        """Finish the slice in flight, let go of the store. What still waits is read again by the next owner."""
        self._closing = True
        async with self._changed:
            self._changed.notify_all()
        if self._running is not None:
            await self._running
            self._store.close()
        await self._outlet.stop()

    async def _open_store(self) -> JoinStore:
        path = self._settings.data_dir / "join" / str(self.partition)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return JoinStore(path, self._settings.join, self._settings.sync, self._settings.in_memory)
            except StoreLocked:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.1)  # its old owner is still in its last slice

    async def _agree(self, group_offset: int | None) -> int:
        """Bring Kafka and the store together. Returns the offset to go on from."""
        stored, where = self._store.next_offset, f"partition {self.partition}"
        if stored is None:
            if group_offset is not None:
                raise StoreError(
                    f"no join store for {where}, which was joined up to {group_offset}: start the worker with the "
                    f"data directory of its last owner, or with another topic prefix"
                )
            return await self._worker.earliest(self.partition)
        if group_offset is not None and group_offset > stored:
            log.warning("%s: the store forgot what lies from %s to %s: joining it again", where, stored, group_offset)
            self._sent = group_offset
        elif group_offset != stored:
            log.info("partition %s: sending again what was committed up to %s", self.partition, stored)
            await self._publish(self._store.outbox(), stored)
        return stored

    async def _run(self) -> None:
        """Slice after slice: at once under load, at most every COMMIT_SECONDS otherwise."""
        not_before = 0.0
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._waiting or self._closing)
                pause = not_before - time.monotonic()
                if pause > 0 and not self._closing:
                    try:
                        async with asyncio.timeout(pause):
                            await self._changed.wait_for(lambda: len(self._waiting) >= self._slice or self._closing)
                    except TimeoutError:
                        pass
                if self._closing:
                    return
                records = self._next_slice()
                self._waiting_bytes -= sum(len(record.value or b"") for record in records)
                self._changed.notify_all()
            not_before = time.monotonic() + COMMIT_SECONDS
            await self._advance(records)

    def _next_slice(self) -> list[ConsumerRecord]:
        """What waits, but never beyond what has been published: there a block ends."""
        end = self._sent if self._waiting[0].offset < self._sent else None
        records: list[ConsumerRecord] = []
        while self._waiting and len(records) < self._slice and (end is None or self._waiting[0].offset < end):
            records.append(self._waiting.popleft())
        return records

    async def _advance(self, records: list[ConsumerRecord]) -> None:
        joined = self._joiner.process(Record(r.offset, r.timestamp, r.value) for r in records)
        block = encode_block(joined.block)
        outbox: list[bytes | DeadLetter] = [block, *joined.dead] if joined.block.to_offset > self._sent else []
        metrics = self._worker.metrics
        with metrics.commit.time():
            self._store.commit(joined, outbox)
        self._joiner.trim(self._settings.in_memory)
        if outbox:
            with metrics.publish.time():
                await self._publish(outbox, joined.block.to_offset)
            for letter in joined.dead:
                metrics.rejected.labels(letter.reason).inc()
        if joined.block.counts.events_in > self.counts.events_in:
            self._last_event = time.monotonic()
        self._held = joined.block.handled < joined.block.to_offset
        self.next_offset, self.counts = joined.block.to_offset, joined.block.counts
        metrics.age.observe(max(0.0, time.time() - records[-1].timestamp / 1000))
        if len(block) > BLOCK_BYTES // 2:
            self._slice = max(1, self._slice // 2)
        elif len(block) < BLOCK_BYTES // 8:
            self._slice = min(MAX_SLICE, self._slice * 2)

    async def _publish(self, outbox: list[bytes | DeadLetter], to_offset: int) -> None:
        topics = self._settings.topics
        messages = [
            Message(topics.events_dead, sent.value, key=sent.key(), headers=sent.headers())
            if isinstance(sent, DeadLetter)
            else Message(topics.examples, sent, partition=self.partition)
            for sent in outbox
        ]
        await self._outlet.send(
            messages, {TopicPartition(topics.events, self.partition): to_offset}, self._worker.store_group
        )

    def _has_room(self) -> bool:
        room = len(self._waiting) < MAX_WAITING and self._waiting_bytes < MAX_WAITING_BYTES
        return room or self._closing


class JoinWorker:
    """The feed of `events`: lanes that come and go with the group's rebalances, and the ticks of idle partitions."""

    def __init__(self, settings: JoinWorkerSettings) -> None:
        self.settings = settings
        self.group = f"{settings.topics.prefix}headrace-join"
        self.store_group = f"{self.group}.store"
        self.lanes: dict[int, Lane] = {}
        self._kafka = AIOKafkaConsumer(
            bootstrap_servers=settings.bootstrap, group_id=self.store_group, enable_auto_commit=False
        )
        self._ticks = AIOKafkaProducer(bootstrap_servers=settings.bootstrap, acks="all", linger_ms=0)
        self._ticking: asyncio.Task | None = None
        self.metrics = JoinMetrics(lambda: {p: (lane.counts, lane.next_offset) for p, lane in list(self.lanes.items())})

    async def start(self) -> None:
        """Connect. Raises BrokerError, UsageError."""
        serve_metrics(self.metrics.registry, self.settings.metrics_port)
        try:
            await self._kafka.start()
            if self.settings.ticks == "live":
                await self._ticks.start()
                self._ticking = asyncio.create_task(self._tick())
                self._ticking.add_done_callback(app.fail_loudly)
        except KafkaError as error:
            raise BrokerError(
                f"no Kafka at {self.settings.bootstrap} ({error}): start one (`headrace broker start`) or set bootstrap"
            ) from error

    async def open(self, partitions: set[int]) -> Mapping[int, int]:
        new = {p: Lane(self, p) for p in sorted(partitions - self.lanes.keys())}
        self.lanes.update(new)
        await asyncio.gather(*(lane.open() for lane in new.values()))
        if new:
            log.info("joining partitions %s", ", ".join(map(str, sorted(self.lanes))))
        return {p: self.lanes[p].expected for p in partitions}

    async def take(self, partition: int, records: list[ConsumerRecord]) -> int | None:
        lane = self.lanes.get(partition)
        return None if lane is None else await lane.take(records)

    async def close(self, partitions: set[int]) -> None:
        going = [self.lanes.pop(p) for p in sorted(partitions & self.lanes.keys())]
        await asyncio.gather(*(lane.close() for lane in going))

    async def stop(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        await self._ticks.stop()
        await self._kafka.stop()

    async def group_offset(self, partition: int) -> int | None:
        """Up to where the blocks of a partition are in `examples`; None: there are none."""
        return await self._kafka.committed(TopicPartition(self.settings.topics.events, partition))

    async def earliest(self, partition: int) -> int:
        """The first offset that Kafka still has."""
        where = TopicPartition(self.settings.topics.events, partition)
        return (await self._kafka.beginning_offsets([where]))[where]

    async def _tick(self) -> None:
        """Carry the time in partitions that have no records: written to the log, so that a replay sees it too."""
        while True:
            await asyncio.sleep(TICK_SECONDS / 4)
            for lane in list(self.lanes.values()):
                if lane.needs_tick():
                    ts = time.time_ns() // 1_000_000
                    tick = events.encode(events.Tick(event_id=f"tick-{lane.partition}-{ts}", ts=ts))
                    await self._ticks.send(self.settings.topics.events, tick, partition=lane.partition)
