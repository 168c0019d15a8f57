"""A lane of the join worker: one partition, whole batches of `events` in, blocks of joined rows out, each exactly once.

It has a joiner, its store and a transactional producer. For a slice of records it does

1. join:     `Joiner.process`, in memory;
2. commit:   state, next offset and the outbox (the block, the dead letters), ONE atomic write to the lane's RocksDB;
3. publish:  the outbox, and the offset of the group `<group>.store`, ONE Kafka transaction;
4. go on with the next slice.

Killed before 2, nothing has happened. Killed between 2 and 3, the store is ahead of the group's offset, and the next
owner sends the same bytes again. So each block [from, to) is in `examples` once, and goes on where the last one ended.
Where the store is behind the group's offset (a power cut undid commits that did not wait for the disk, or the partition
has been elsewhere), it is replaced by a shared snapshot that is further, if there is one; the records from there to
the group's offset are joined again and nothing is sent: the joiner is a function of the records, and of what was set
aside, which is written beside the group's offset.
While Kafka is away a worker waits for it, up to OUTAGE_SECONDS; what it was sending is then there once. Longer than
that, it ends with exit 1 and one line, and goes on when it is started again. Either way nothing is lost or sent twice.
Not guaranteed: that the blocks of two runs over the same log have the same boundaries. Their rows are the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import replace
from itertools import chain
from typing import Protocol

import filelock
import orjson
from aiokafka import ConsumerRecord, TopicPartition

from embedding_store.copies import settle_directory
from embedding_store.errors import BrokerError, FencedError, StoreError, StoreLocked
from online_model.examples import Block, Counts
from online_model.positions import add_range
from streams import app
from streams.backfill import Backfill
from streams.blocks import decode_block, encode_block
from streams.dead_letters import DeadLetter
from streams.health import Progress
from streams.join_snapshots import LaneSnapshots
from streams.join_state import NEVER
from streams.join_store import JoinStore
from streams.joiner import Joiner, Record
from streams.metrics import JoinMetrics
from streams.outlet import Message, Outlet
from streams.settings import JoinWorkerSettings

log = logging.getLogger("headrace")

Ranges = list[list[int]]  # [from, to) of a partition, disjoint, in order

LOCK_SECONDS = 15.0  # an old owner has so long to let go of a store
MAX_SLICE = 2_000  # records that are joined and committed at once; about 100 ms of work
SLICE_BYTES = 2 << 20  # … nor of more bytes: rows of long pages are many, and a block has its limits (block_sizes.py)
MAX_WAITING = 10_000  # records of a lane in memory; the others stay in Kafka
MAX_WAITING_BYTES = 32 << 20
BLOCK_BYTES = 900_000  # slices shrink so that blocks stay below
COMMIT_SECONDS, COMMIT_SECONDS_BUSY = 0.04, 0.15  # between two commits of a partition, while it keeps up …
COMMIT_SHARE = 0.03  # … of a core's time for a partition: where slices take longer than that, they become rarer
TICK_SECONDS = 0.2  # without a record, while events are held
SLOW_TICK_SECONDS = 1.0  # while only timers can fire, and …
QUIET_TICK_SECONDS = 20.0  # … when all have but those of purchases, which may be days; so replicas have versions too
OUTAGE_SECONDS = 120.0  # so long Kafka may be away
STUCK_SECONDS = 30.0  # a partition whose records wait for so long without a commit is not well
RETRY_SECONDS = 0.5  # between two attempts to reach it
RENEW_SECONDS = 3_600.0  # between two times that the group's offset is said though nothing was joined
MAX_RANGES = 100  # that were set aside, written beside the group's offset: Kafka takes 4 KB there


class Worker(Protocol):
    """What a lane asks of the worker that it is in (join_worker.py)."""

    settings: JoinWorkerSettings
    group: str
    store_group: str
    metrics: JoinMetrics
    backfill: Backfill | None

    def is_stopping(self) -> bool: ...

    async def group_position(self, partition: int) -> tuple[int | None, Ranges]: ...

    async def earliest(self, partition: int) -> int: ...

    async def end(self, partition: int) -> int: ...

    async def offset_at(self, partition: int, stamp_ms: int) -> int: ...


class Lane:
    """One partition that is ours, from its opening to its closing. A lane that failed is not used again."""

    def __init__(self, worker: Worker, partition: int) -> None:
        self.partition = partition
        self.next_offset = 0  # all below has been committed and published
        self.counts = Counts()  # as of there
        self.watermark, self.open_impressions = NEVER, 0  # too
        self.progress = Progress()
        self._log = logging.LoggerAdapter(log, {"partition": partition})
        self.expected = 0  # all below has been committed, or waits here
        self._sent = 0  # all below has been published before; more than `next_offset` after a power cut
        self._last_record = self._last_event = time.monotonic()
        self._held = False  # some records below `next_offset` wait for the watermark
        self._worker, self._settings = worker, worker.settings
        self._purging: asyncio.Task | None = None
        self._purge_due = time.monotonic() + worker.settings.purge_s
        self._outlet = self._new_outlet()
        self._group_offset: int | None = None  # as we know it
        self._aside: Ranges = []  # published as set aside
        self._gap_end = 0  # what was not published and lies below is set aside
        path = worker.settings.data_dir / "join" / str(partition)
        self._path, self._lock = path, filelock.FileLock(f"{path}.lock", thread_local=False)
        self._snapshots = LaneSnapshots(worker.settings, partition, path) if worker.settings.snapshots else None
        self._snapshot_due = 0.0
        self._snapshot_at: int | None = None
        self._renew_due = 0.0
        self._between_slices = asyncio.Lock()
        self._waiting: deque[ConsumerRecord] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Condition()
        self._slice = MAX_SLICE
        self._hole: int | None = None
        self._closing = False
        self._running: asyncio.Task | None = None
        self._opening = asyncio.Lock()
        self._made = time.monotonic()

    async def open(self) -> None:
        """Fence the old owner, open the store, send what it had committed but perhaps not sent. A lane that is closed
        meanwhile, as the group has moved on, may have been opened first or not; it keeps nothing.

        Raises StoreLocked, StoreError, BrokerError, FencedError.
        """
        async with self._opening:
            if not self._closing:
                await self._open()

    async def _open(self) -> None:
        self._store = await self._open_store()
        await self._outlet.start()  # only now is the group's offset final: an unfinished transaction is undone
        self._group_offset, self._aside = await self._worker.group_position(self.partition)
        await self._begin_with_backfill()
        await self._restore()
        self.next_offset = await self._agree()
        if self._settings.backlog == "newest":
            await self._skip_backlog()
        self.expected = self.next_offset
        self._joiner = Joiner(self._settings.join, self.partition, self.next_offset, self._store.state())
        self._note(replace(self._joiner.counts))
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
                self.progress.wanted()
                self._waiting_bytes += sum(len(record.value or b"") for record in fresh)
                self._changed.notify_all()
        return None

    @property
    def store_memory_bytes(self) -> int:
        """What its store has in memory. For any thread."""
        return self._store.memory_bytes if self._running is not None else 0

    @property
    def opening_s(self) -> float:
        """For so long it has been on its way to be open; 0 when it is. For any thread."""
        return 0.0 if self._running is not None else time.monotonic() - self._made

    def needs_tick(self) -> bool:
        """Whether it is idle, and time alone would let something happen in it."""
        now, join = time.monotonic(), self._settings.join
        last_timer = join.future_ms + join.disorder_ms + max(join.wait_ms, join.watch_wait_ms)
        pause = TICK_SECONDS if self._held else SLOW_TICK_SECONDS
        if now - self._last_event > last_timer / 1000 + 2 * SLOW_TICK_SECONDS:
            pause = QUIET_TICK_SECONDS
        if self._waiting or now - self._last_record < pause:
            return False
        self._last_record = now
        return True

    async def close(self) -> None:
        """Finish the slice in flight, let go of the store. What still waits is read again by the next owner."""
        self._closing = True
        async with self._changed:
            self._changed.notify_all()
        async with self._opening:  # what is being opened is to be let go of when it is open
            pass
        if self._running is not None:
            await self._running
            if self._purging is not None:
                await asyncio.wait([self._purging])
            async with self._between_slices:
                self._store.close()
            self._lock.release()
        await self._outlet.stop()

    async def snapshot_if_due(self) -> None:
        """Makes a snapshot every interval, the first one at once. A failure is logged: it costs nothing but time."""
        snapshots, now = self._snapshots, time.monotonic()
        if snapshots is None or self._running is None or now < self._snapshot_due or self._store.next_offset is None:
            return
        self._snapshot_due = now + self._settings.snapshot_interval_s
        try:
            if self._snapshot_at is None:
                left = self._settings.snapshot_interval_s - await asyncio.to_thread(snapshots.age_s)
                if left > 0:
                    self._snapshot_at, self._snapshot_due = -1, now + left
                    return
            async with self._between_slices:
                at = self.next_offset
                if self._closing or at == self._snapshot_at:
                    return
                copy = await asyncio.to_thread(snapshots.copy, self._store)
            self._snapshot_at = at
            await asyncio.to_thread(snapshots.send, copy, at, self._worker.is_stopping)
            self._log.info("partition %s: snapshot at %s", self.partition, at)
        except StoreError as error:
            self._log.error("partition %s: no snapshot: %s", self.partition, error)

    async def renew_if_due(self) -> None:
        """Says the group's offset anew: Kafka forgets it a week (offsets.retention.minutes) after it was last said, and
        a partition may have nothing to say for longer."""
        now = time.monotonic()
        if self._running is None or now < self._renew_due or self._group_offset is None:
            return
        self._renew_due = now + RENEW_SECONDS
        async with self._between_slices:
            if not self._closing:
                try:
                    await self._send([], self._group_offset, self._aside)
                except BrokerError as error:  # nothing hangs on it but that it is said within a week
                    self._log.warning("partition %s: %s", self.partition, error)

    async def purge_if_due(self) -> None:
        """Rewrites the store's files, if users were forgotten, while slices go on."""
        now = time.monotonic()
        if self._running is None or self._closing or now < self._purge_due:
            return
        self._purge_due = now + self._settings.purge_s
        self._purging = asyncio.create_task(asyncio.to_thread(self._store.purge, lambda: self._closing))
        try:
            if await self._purging:
                self._log.info("partition %s: what was known of forgotten users has left the disk", self.partition)
        except StoreError as error:
            self._log.error("partition %s: forgotten users are still on the disk: %s", self.partition, error)

    def _new_outlet(self) -> Outlet:
        return Outlet(self._settings.connection, f"{self._worker.group}-{self.partition}")

    async def _open_store(self) -> JoinStore:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._lock.acquire(blocking=False)
                settle_directory(self._path)
                return self._store_here()
            except (filelock.Timeout, StoreLocked) as error:
                if time.monotonic() > deadline:
                    raise StoreLocked(
                        f"the store {self._path} is in use by another process: stop that worker, or choose another "
                        f"data directory"
                    ) from error
            await asyncio.sleep(0.1)  # its old owner is still in its last slice

    def _store_here(self) -> JoinStore:
        settings = self._settings
        return JoinStore(self._path, settings.join, settings.sync, settings.in_memory)

    async def _begin_with_backfill(self) -> None:
        """Where the store is behind the backfill: the state in that. What was not published up to there never is, a
        trainer has it from the backfill: so the group's offset is set, before the store: killed in between, the store
        is still behind. Raises StoreError where the topic does not go on where the backfill ends.
        """
        backfill, stored, where = self._worker.backfill, self._store.next_offset, f"partition {self.partition}"
        at = None if backfill is None else backfill.next_offset(self.partition)
        if backfill is None or at is None or (stored is not None and stored >= at):
            return
        earliest, end = await self._worker.earliest(self.partition), await self._worker.end(self.partition)
        if at < earliest and self._group_offset is not None and self._group_offset > at:
            return  # it was handed over long ago: what has been joined since is in a snapshot, or nowhere
        if not earliest <= at <= end:
            raise StoreError(
                f"{where}: the backfill {backfill.folder.url} ends at {at}, Kafka has records from {earliest} to "
                f"{end}: make one that ends there, or start without it"
            )
        states = LaneSnapshots(backfill.join_settings(self._path.parent), self.partition, self._path)
        fetched = await asyncio.to_thread(states.fetch, at - 1, at)
        if fetched is None:
            raise StoreError(f"{where}: {backfill.folder.url} has no good state of its joiner: make it again")
        if self._group_offset is None or self._group_offset < at:
            place = TopicPartition(self._settings.topics.events, self.partition)
            await self._outlet.send([], {place: (at, "")}, self._worker.store_group)
            self._group_offset, self._aside = at, []
        self._store.close()
        await asyncio.to_thread(states.put_in_place, fetched)
        self._store = self._store_here()
        self._log.info("%s: going on from the backfill at %s", where, at)

    async def _restore(self) -> None:
        """Where the store is behind what was published, or beside it: the newest snapshot that is further."""
        stored, group_offset, forked = self._store.next_offset, self._group_offset, self._is_forked()
        if group_offset is None or (stored is not None and stored >= group_offset and not forked):
            return
        fetched = None
        if self._snapshots is not None:
            above = -1 if stored is None or forked else stored
            fetched = await asyncio.to_thread(self._snapshots.fetch, above, group_offset)
        if self._snapshots is not None and fetched is not None:
            self._store.close()
            await asyncio.to_thread(self._snapshots.put_in_place, fetched)
            self._store = self._store_here()
        elif forked:
            raise self._no_store()

    def _is_forked(self) -> bool:
        """Whether the store committed what it never sent, and another worker has sent other blocks from there on."""
        stored, group_offset = self._store.next_offset, self._group_offset
        if stored is None or group_offset is None or stored <= group_offset:
            return False
        return _block_in(self._store.outbox()).from_offset != group_offset

    def _no_store(self, all_in_kafka: bool = False) -> StoreError:
        """`all_in_kafka`: joined again from the first record, what was published is not published twice."""
        where = f"partition {self.partition}, which was joined up to {self._group_offset}"
        empty = " (an empty folder will do: Kafka still has all)" if all_in_kafka else ""
        remedy = f"the data directory of its last owner or [join] snapshots{empty}, or with another topic prefix"
        return StoreError(f"no join store for {where}, and no good snapshot: start the worker with {remedy}")

    async def _agree(self) -> int:
        """Bring Kafka and the store together. Returns the offset to go on from."""
        stored, group_offset, where = self._store.next_offset, self._group_offset, f"partition {self.partition}"
        earliest = await self._worker.earliest(self.partition)
        if stored is None and group_offset is None:
            return earliest
        if group_offset is None or (stored is not None and stored >= group_offset):
            assert stored is not None
            if stored != group_offset:
                self._log.info("%s: sending again what was committed up to %s", where, stored)
                if outbox := self._store.outbox():
                    await self._publish(outbox, _block_in(outbox))
                else:  # it had been sent before, and Kafka has forgotten the group
                    await self._send([], stored, self._aside)
            return stored
        start = 0 if stored is None else stored
        if stored is None and (self._snapshots is None or earliest > 0):
            raise self._no_store(all_in_kafka=earliest == 0)
        if start < earliest or (len(self._aside) == MAX_RANGES and start < self._aside[0][0]):
            raise StoreError(
                f"{where}: the store or snapshot goes on from {start}, Kafka has records from {earliest} on: start the "
                f"worker with the data directory of its last owner, or with another topic prefix; raise retention.ms "
                f"of {self._settings.topics.events}"
            )
        self._log.warning("%s: the store has nothing from %s to %s: joining it again", where, start, group_offset)
        self._sent = group_offset
        return start

    async def _skip_backlog(self) -> None:
        """What was not joined before, and Kafka stamped too long ago, is to be set aside."""
        oldest_ms = time.time_ns() // 1_000_000 - int(self._settings.newest_after_s * 1000)
        start, end = max(self.next_offset, self._sent), await self._worker.offset_at(self.partition, oldest_ms)
        if end > start:
            self._log.warning("partition %s: the backlog from %s to %s is set aside", self.partition, start, end)
            self._gap_end = end

    async def _run(self) -> None:
        """Slice after slice: at once under load, else COMMIT_SECONDS apart, COMMIT_SECONDS_BUSY where they cost."""
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
                records, aside = self._next_slice()
                self._waiting_bytes -= sum(len(record.value or b"") for record in records)
                self._changed.notify_all()
            began = time.monotonic()
            async with self._between_slices:
                seconds = await self._advance(records, aside)
            self.progress.made(more=bool(self._waiting))
            not_before = began + min(max(COMMIT_SECONDS, seconds / COMMIT_SHARE), COMMIT_SECONDS_BUSY)

    def _next_slice(self) -> tuple[list[ConsumerRecord], bool]:
        """What waits, up to where it is sent or set aside otherwise than its first record; whether it is set aside."""
        first = self._waiting[0].offset
        known = any(start <= first < end for start, end in self._aside)  # what was set aside once stays so
        aside = known if first < self._sent else first < self._gap_end
        edges = (self._sent, self._gap_end, *chain.from_iterable(self._aside))
        end = min((edge for edge in edges if edge > first), default=None)
        size = MAX_WAITING if aside else self._slice
        records: list[ConsumerRecord] = []
        room = SLICE_BYTES
        while self._waiting and len(records) < size and (end is None or self._waiting[0].offset < end):
            room -= len(self._waiting[0].value or b"")
            if records and room < 0:
                break
            records.append(self._waiting.popleft())
        return records, aside

    async def _advance(self, records: list[ConsumerRecord], aside: bool) -> float:
        """Joins, commits and publishes a slice; how long it took until it was committed, in seconds."""
        began = time.monotonic()
        joined = self._joiner.process((Record(r.offset, r.timestamp, r.value) for r in records), set_aside=aside)
        block = encode_block(joined.block)
        outbox: list[bytes | DeadLetter] = [block, *joined.dead] if joined.block.to_offset > self._sent else []
        metrics = self._worker.metrics
        with metrics.commit.time():
            self._store.commit(joined, outbox)
        self._joiner.trim(self._settings.in_memory)
        seconds = time.monotonic() - began
        if outbox:
            with metrics.publish.time():
                await self._publish(outbox, joined.block)
            for letter in joined.dead:
                metrics.rejected.labels(letter.reason).inc()
            metrics.joined(joined.kinds)
        counts = joined.block.counts
        if counts.events_in - counts.rejected > self.counts.events_in - self.counts.rejected:
            self._last_event = time.monotonic()  # a tick that was refused, by another clock, calls for no further one
        self._held = joined.block.handled < joined.block.to_offset
        self.next_offset = joined.block.to_offset
        self._note(joined.block.counts)
        metrics.age.observe(max(0.0, time.time() - records[-1].timestamp / 1000))
        if len(block) > BLOCK_BYTES // 2:
            self._slice = max(1, self._slice // 2)
        elif len(block) < BLOCK_BYTES // 8:
            self._slice = min(MAX_SLICE, self._slice * 2)
        return seconds

    def _note(self, counts: Counts) -> None:
        """Where the joiner is, for those who ask between its slices."""
        numbers = self._joiner.open.numbers
        self.counts, self.watermark = counts, self._joiner.watermark
        self.open_impressions = numbers.next - numbers.first

    async def _publish(self, outbox: list[bytes | DeadLetter], block: Block) -> None:
        """The outbox (of this block), the group's offset and what was set aside. Raises as `_send`."""
        topics = self._settings.topics
        aside = [list(range_) for range_ in self._aside]
        if block.set_aside:
            add_range(aside, block.from_offset, block.to_offset)
        messages = [
            Message(topics.events_dead, sent.value, key=sent.key(), headers=sent.headers())
            if isinstance(sent, DeadLetter)
            else Message(topics.examples, sent, partition=self.partition)
            for sent in outbox
        ]
        await self._send(messages, block.to_offset, aside)

    async def _send(self, messages: list[Message], to_offset: int, aside: Ranges) -> None:
        """The messages, the group's offset and what was set aside, in one transaction.

        Where it is not known whether Kafka has it, Kafka is asked, and it is sent again, until OUTAGE_SECONDS are over.
        Raises FencedError where another worker has sent something meanwhile, BrokerError.
        """
        about = to_offset, orjson.dumps(aside[-MAX_RANGES:]).decode() if aside else ""
        give_up, in_doubt = time.monotonic() + OUTAGE_SECONDS, False
        while True:
            try:
                if in_doubt:
                    await self._outlet.start()
                    found, _ = await self._worker.group_position(self.partition)
                    if found == to_offset:
                        break
                    if found != self._group_offset:
                        raise FencedError(f"another worker took over {self._outlet.id}: this one stops")
                where = TopicPartition(self._settings.topics.events, self.partition)
                await self._outlet.send(messages, {where: about}, self._worker.store_group)
                break
            except BrokerError as error:
                if time.monotonic() > give_up or self._closing:
                    raise
                if not in_doubt:
                    self._log.warning("partition %s: %s; trying again", self.partition, error)
            in_doubt = True
            await self._outlet.stop()
            self._outlet = self._new_outlet()
            await asyncio.sleep(RETRY_SECONDS)
        if in_doubt:
            self._log.info("partition %s: Kafka is back, and has all up to %s", self.partition, to_offset)
        self._group_offset, self._aside = to_offset, aside[-MAX_RANGES:]
        self._renew_due = time.monotonic() + RENEW_SECONDS

    def _has_room(self) -> bool:
        room = len(self._waiting) < MAX_WAITING and self._waiting_bytes < MAX_WAITING_BYTES
        return room or self._closing


def _block_in(outbox: list[bytes | DeadLetter]) -> Block:
    """The block of an outbox: it stands first."""
    first = outbox[0]
    assert isinstance(first, bytes), "dead letters come after their block"
    return decode_block(first)
