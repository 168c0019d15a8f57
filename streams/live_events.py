"""The topic `events` as a replica reads it: what users did goes into LiveUsers at once, before anything is learned.

Records are decoded as the joiner decodes them, those that it refuses are left out. A fetch is taken a few records at a
time, and between two the loop looks at its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedding_store.errors import BrokerError
from embedding_store.ids import feature_id
from online_model.serving.holder import Holder
from online_model.serving.live import FORGET, LiveUsers, Mark, Marks
from streams.events import Click, Forget, Impression, Refund, Rejected, Tick, decode_many
from streams.joiner import KIND, Record, item_id
from streams.kafka_clients import client_arguments
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")

SLICE = 100  # records that are taken in one go: about a millisecond
BATCH_BYTES = 1 << 20  # of a partition
BEFORE = 10_000  # records of a partition: their event ids must be known, or a late duplicate counts twice for a moment
LOOK_SECONDS = 0.1  # for the first version
PATIENCE_SECONDS = 10.0  # for one that has caught up: then less is to be read


async def first_version(holder: Holder, caught_up: asyncio.Event) -> None:
    """There is one; if it can be had soon, one that has caught up."""
    while holder.replica.sequence < 0:
        await asyncio.sleep(LOOK_SECONDS)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await caught_up.wait()


class LiveEvents:
    """Carries events to `live`, for the holder's replica, once that has `caught_up`. `clicked` is told each click too,
    `moved` the largest ts of events (ms) after each fetch."""

    def __init__(
        self, settings: ServeWorkerSettings, holder: Holder, live: LiveUsers, caught_up: asyncio.Event
    ) -> None:
        self._settings, self._holder, self._live, self._caught_up = settings, holder, live, caught_up
        self.clicked: Callable[[Click], None] = lambda click: None
        self.moved: Callable[[int], None] = lambda ts: None
        self._newest = 0
        self._begins: dict[int, Mark] = {}  # of partitions that are read from before where the rows are
        live.watch(lambda user, action: holder.replica.holds(user, action))
        self._counted = _Counted(holder.metrics.registry, live)

    async def run(self) -> None:
        """Follow the topic from where the rows held are, until cancelled. Raises BrokerError."""
        await first_version(self._holder, self._caught_up)
        topic = self._settings.topics.events
        consumer = AIOKafkaConsumer(
            topic, **client_arguments(self._settings.connection), enable_auto_commit=False,
            auto_offset_reset="earliest", fetch_max_wait_ms=500, max_partition_fetch_bytes=BATCH_BYTES,
        )  # fmt: skip
        try:
            await consumer.start()
            try:
                await self._begin(consumer)
                while True:
                    for partition, records in (await consumer.getmany(timeout_ms=1_000, max_records=SLICE)).items():
                        self.take(partition.partition, [Record(r.offset, r.timestamp, r.value) for r in records])
                    self.moved(self._newest)
                    await asyncio.sleep(0)  # what is fetched already comes without waiting
            finally:
                await consumer.stop()
        except KafkaError as error:
            raise BrokerError(f"cannot read {topic} ({error}): is the broker up? `headrace broker status`") from error

    def take(self, partition: int, records: Sequence[Record]) -> None:
        """The next records of a partition."""
        live = self._live
        for record, event in zip(records, decode_many([record.value for record in records]), strict=True):
            if partition in self._begins and record.offset >= self._begins[partition].next:
                live.begin(partition, self._begins.pop(partition).watermark)
            if isinstance(event, Rejected):
                continue
            stamp, ts = record.timestamp_ms, event.ts
            if stamp is not None and ts > stamp + self._settings.future_ms:
                continue
            self._newest = max(self._newest, ts)
            if isinstance(event, (Tick, Impression, Refund)):
                live.passes(partition, ts)
                continue
            item, kind = (0, FORGET) if isinstance(event, Forget) else (item_id(event.item), KIND[type(event)])
            live.add(feature_id("user", event.user), partition, record.offset, ts, str(event.event_id), item, kind)
            if isinstance(event, Click):
                self.clicked(event)
        self._counted.records.inc(len(records))

    def begin(self, marks: Marks) -> dict[int, int]:
        """Where to begin to read, by partition, beside rows that are where `marks` say."""
        self._begins = dict(marks)
        return {partition: max(0, mark.handled - BEFORE) for partition, mark in marks.items()}

    async def _begin(self, consumer: AIOKafkaConsumer) -> None:
        """What Kafka has deleted of that is counted."""
        begins = self.begin(self._holder.replica.coverage.marks)
        partitions = sorted(consumer.assignment())
        for place, there in (await consumer.beginning_offsets(partitions)).items():
            wanted = begins.get(place.partition, 0)
            if there > wanted:
                log.warning("%s partition %s: records %s to %s are deleted already", *place, wanted, there)
                self._counted.missed.inc(there - wanted)
            consumer.seek(place, max(there, wanted))


class _Counted(Collector):
    """What is said of the events on /metrics."""

    def __init__(self, registry: CollectorRegistry, live: LiveUsers) -> None:
        self._live = live
        self.records = Counter("headrace_live_records", "Records of `events` read", registry=registry)
        self.missed = Counter(
            "headrace_live_records_missed", "Records that Kafka had deleted before they were read", registry=registry
        )
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        live = self._live
        yield GaugeMetricFamily("headrace_live_actions", "Actions of users kept beside their rows", len(live))
        yield CounterMetricFamily(
            "headrace_live_actions_dropped", "Actions that had to go before a row held them", live.dropped
        )
        yield CounterMetricFamily("headrace_live_actions_repeated", "Actions that had come before", live.repeated)

    def describe(self) -> Iterable[Metric]:
        return ()
