"""The join worker: the lanes of the partitions that are ours, a metrics port, ticks for partitions that are idle.

What a lane promises is said in join_lane.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CoordinatorLoadInProgressError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from embedding_store.errors import BrokerError
from streams import app, batches, events
from streams.backfill import Backfill
from streams.ends import Ends
from streams.health import kafka_away
from streams.join_lane import OUTAGE_SECONDS, RETRY_SECONDS, STUCK_SECONDS, TICK_SECONDS, Lane, Ranges
from streams.join_state import NEVER
from streams.kafka_clients import client_arguments
from streams.listener import serve_metrics
from streams.metrics import JoinMetrics, LaneFigures, tell_process
from streams.settings import JoinWorkerSettings

log = logging.getLogger("headrace")

T = TypeVar("T")


def run_join(settings: JoinWorkerSettings) -> None:
    """Join in the foreground until SIGTERM or SIGINT. Fatal errors end the process with exit 1 and one line."""
    app.run(lambda stop: _join(settings, stop), worker="join", logs=settings.logs)


async def _join(settings: JoinWorkerSettings, stop: asyncio.Event) -> None:
    worker = JoinWorker(settings)
    await worker.start()
    try:
        intake = batches.Intake(
            bootstrap=settings.connection,
            topic=settings.topics.events,
            group=worker.group,
            member=app.member_name("join", settings.data_dir / "join"),
        )
        await batches.serve_feed(intake, worker, stop)
    finally:
        await worker.stop()


class JoinWorker:
    """The feed of `events`: lanes that come and go with the group's rebalances, and the ticks of idle partitions."""

    def __init__(self, settings: JoinWorkerSettings) -> None:
        self.settings = settings
        self.group = f"{settings.topics.prefix}headrace-join"
        self.store_group = f"{self.group}.store"
        self.lanes: dict[int, Lane] = {}
        self._kafka = AIOKafkaConsumer(
            **client_arguments(settings.connection), group_id=self.store_group, enable_auto_commit=False
        )
        self._ticks = AIOKafkaProducer(**client_arguments(settings.connection), acks="all", linger_ms=0)
        self._admin = AIOKafkaAdminClient(**client_arguments(settings.connection))
        self._tasks: list[asyncio.Task] = []
        self._stopping = False
        self.backfill = Backfill(settings.backfill) if settings.backfill else None
        if self.backfill is not None:
            self.backfill.check(settings.topics, settings.join)
        self._ends = Ends(settings.connection, settings.topics.events, settings.topics.partitions)
        self.metrics = JoinMetrics(self._figures)
        tell_process(self.metrics.registry, settings.data_dir)

    async def start(self) -> None:
        """Connect. Raises BrokerError, UsageError."""
        serve_metrics(self.metrics.registry, self.settings.metrics_port, self.unwell, self.settings.http)
        try:
            await self._kafka.start()
            await self._admin.start()
            if self.settings.ticks == "live":
                await self._ticks.start()
        except KafkaError as error:
            raise BrokerError(
                f"no Kafka at {self.settings.bootstrap} ({error}): start one (`headrace broker start`) or set bootstrap"
            ) from error
        if self.settings.ticks == "live":
            self._tasks.append(asyncio.create_task(self._tick()))
        self._tasks += [asyncio.create_task(self._look_after()), asyncio.create_task(self._ends.run())]
        for task in self._tasks:
            task.add_done_callback(app.fail_loudly)

    def unwell(self) -> str:
        """Why this worker is not well, "" where it is. For any thread."""
        for partition, lane in sorted(list(self.lanes.items())):
            if (stuck_s := lane.progress.stuck_s) > STUCK_SECONDS:
                return f"partition {partition}: records wait, and none was joined for {stuck_s:.0f} s"
            if (opening_s := lane.opening_s) > STUCK_SECONDS:
                return f"partition {partition}: its store has been opening for {opening_s:.0f} s"
        return kafka_away(self._ends.away_s)

    def _figures(self) -> dict[int, LaneFigures]:
        return {
            p: LaneFigures(
                lane.counts, lane.next_offset, self._ends.behind(p, lane.next_offset),
                None if lane.watermark == NEVER else lane.watermark, lane.open_impressions,
                lane.store_memory_bytes,
            )
            for p, lane in list(self.lanes.items())
        }  # fmt: skip

    def is_stopping(self) -> bool:
        return self._stopping

    async def open(self, partitions: set[int]) -> Mapping[int, int]:
        new = {p: Lane(self, p) for p in sorted(partitions - self.lanes.keys())}
        self.lanes.update(new)
        await asyncio.gather(*(lane.open() for lane in new.values()))
        if new:
            log.info("joining partitions %s", ", ".join(map(str, sorted(self.lanes))))
        # The group may have moved on while they were opened: what was closed meanwhile is not to be read.
        return {p: lane.expected for p in partitions if (lane := self.lanes.get(p)) is not None}

    async def take(self, partition: int, records: list[ConsumerRecord]) -> int | None:
        lane = self.lanes.get(partition)
        return None if lane is None else await lane.take(records)

    async def close(self, partitions: set[int]) -> None:
        going = [self.lanes.pop(p) for p in sorted(partitions & self.lanes.keys())]
        await asyncio.gather(*(lane.close() for lane in going))

    async def stop(self) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await self._ticks.stop()
        await self._admin.close()
        await self._kafka.stop()

    async def group_position(self, partition: int) -> tuple[int | None, Ranges]:
        """Up to where the blocks of a partition are in `examples` (None: there are none), and what was set aside."""
        place = TopicPartition(self.settings.topics.events, partition)

        async def ask() -> OffsetAndMetadata:
            found = await self._admin.list_consumer_group_offsets(self.store_group, partitions=[place])
            if place not in found:  # the coordinator is loading, or another broker's by now: aiokafka does not say so
                raise CoordinatorLoadInProgressError(f"nothing of {place.topic} {partition} in {self.store_group}")
            return found[place]

        offset, about = await _answer(ask)
        return (None, []) if offset < 0 else (offset, orjson.loads(about) if about else [])

    async def earliest(self, partition: int) -> int:
        """The first offset that Kafka still has."""
        place = TopicPartition(self.settings.topics.events, partition)
        return (await _answer(lambda: self._kafka.beginning_offsets([place])))[place]

    async def end(self, partition: int) -> int:
        """The offset that the next record gets."""
        place = TopicPartition(self.settings.topics.events, partition)
        return (await _answer(lambda: self._kafka.end_offsets([place])))[place]

    async def offset_at(self, partition: int, stamp_ms: int) -> int:
        """Of the first record that Kafka stamped at this time or later; where there is none, of the next record."""
        place = TopicPartition(self.settings.topics.events, partition)
        end = await self.end(partition)
        found = (await _answer(lambda: self._kafka.offsets_for_times({place: stamp_ms})))[place]
        return end if found is None else found.offset

    async def _look_after(self) -> None:
        """Snapshots, purges and offsets of the lanes whose time has come, one after the other."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for lane in list(self.lanes.values()):
                await lane.snapshot_if_due()
                await lane.purge_if_due()
                await lane.renew_if_due()

    async def _tick(self) -> None:
        """Carry the time in partitions that have no records: written to the log, so that a replay sees it too."""
        while True:
            await asyncio.sleep(TICK_SECONDS / 4)
            for lane in list(self.lanes.values()):
                if lane.needs_tick():
                    ts = time.time_ns() // 1_000_000
                    tick = events.encode(events.Tick(event_id=f"tick-{lane.partition}-{ts}", ts=ts))
                    with contextlib.suppress(KafkaError):  # Kafka is away: the next tick says more
                        sent = await self._ticks.send(self.settings.topics.events, tick, partition=lane.partition)
                        sent.add_done_callback(lambda tick: tick.cancelled() or tick.exception())


async def _answer(ask: Callable[[], Awaitable[T]]) -> T:
    """Kafka's answer. While it is away it is asked again. Raises BrokerError after OUTAGE_SECONDS."""
    give_up = time.monotonic() + OUTAGE_SECONDS
    while True:
        try:
            return await ask()
        except KafkaError as error:
            if time.monotonic() > give_up:
                raise BrokerError(f"Kafka does not answer ({error}): see `headrace broker status`") from error
        await asyncio.sleep(RETRY_SECONDS)
