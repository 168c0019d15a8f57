"""Freshness by stage, as histograms for Prometheus: what `headrace monitor` and the demo serve.

Probes go into each partition of `events`. Each is timed, from before it was sent, until it is

    joined      the joiner has sent the block that is past it             (Kafka's stamp on the block)
    trained     the trainer begins the commit of the version past it      (the version's `created_ms`)
    committed   that version is in the store, and then in `parameters`    (Kafka's stamp on its last part)
    servable    a replica shows that it serves that version               (its answer is here)

so a stage's time holds those before it. Only the last is one clock's alone: where the machines' clocks differ, the
others are off by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from threading import Lock
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry, Histogram

from deploy.dashboards.objectives import FRESHNESS_S
from deploy.freshness import PROBE_S, RECENT, Prober, ReplicaWatch, tick
from embedding_store.delta import PartHead, head_of_part
from embedding_store.errors import BrokerError, CorruptRecord
from embedding_store.secret import Secret
from streams.blocks import handled_in
from streams.events import Event
from streams.kafka_clients import Bootstrap, client_arguments
from streams.metrics import About, Value, Values
from streams.topics import TopicSettings

STAGES = ("joined", "trained", "committed", "servable")
SERVABLE = STAGES[-1]
MOST_WAITING = 20_000  # probes in flight; no more are sent meanwhile
AGAIN_S = 1.0  # between two attempts to reach Kafka
STEPS = 500  # of each stage and partition that are kept: a minute or more
ABOUT: About = {
    "probes_total": ("Probes that Kafka took", ()),
    "waiting": ("Probes that are not servable yet", ()),
    "oldest_seconds": ("Age of the oldest of these, and of those that Kafka does not take; 0: none is on its way", ()),
}


def _buckets() -> tuple[float, ...]:
    """Upper bounds, seconds: a tenth apart from 50 ms to 10 s, so that a quantile is known to some per cent there."""
    bounds = [0.01, 0.02, 0.03, 0.04, 0.05]
    while bounds[-1] < 60:
        bounds.append(float(f"{bounds[-1] * (1.1 if bounds[-1] < 10 else 1.25):.3g}"))
    return tuple(sorted({*bounds, FRESHNESS_S}))  # the objective is one, so that shares of it are exact


BUCKETS = _buckets()


class StageFreshness:
    """Probes by stage: those on their way, and the histograms of those that were. Times are time.monotonic(); all of
    it may be called from any thread."""

    def __init__(self, registry: CollectorRegistry, oldest: Callable[[], float | None] = lambda: None) -> None:
        """oldest: when the first probe was sent that Kafka has not taken yet, if there is one (`Prober.oldest`)."""
        histogram = Histogram(
            "headrace_freshness_seconds", "From a probe that is sent to the end of each stage", ["stage"],
            buckets=BUCKETS, registry=registry,
        )  # fmt: skip
        self._stages = {name: _Stage(histogram.labels(name)) for name in STAGES}
        self._probes, self._oldest, self._lock = 0, oldest, Lock()
        registry.register(Values("headrace_freshness_", ABOUT, self._values))

    def sent(self, partition: int, offset: int, at: float) -> None:
        """A probe has its place in the log; `at`: before it was sent."""
        with self._lock:
            self._probes += 1
            for stage in self._stages.values():
                stage.sent(partition, offset, at)

    def passed(self, stage: str, positions: Mapping[int, int], at: float) -> None:
        """A stage has done with all of `events` below these offsets, by partition."""
        with self._lock:
            for partition, position in positions.items():
                self._stages[stage].passed(partition, position, at)

    def when(self, stage: str, partition: int, offset: int) -> float | None:
        """When a stage was seen to be past a record of `events`; None: it is not, or that is long ago."""
        with self._lock:
            return self._stages[stage].when(partition, offset)

    @property
    def waiting(self) -> int:
        """Probes that are not servable yet."""
        with self._lock:
            return self._stages[SERVABLE].waiting

    def figures(self) -> dict[str, dict[str, float | int | None]]:
        """stage → p50, p95, p99 in ms of its last RECENT probes (None: there are none), and `count` since the start."""
        with self._lock:
            recent = {name: (list(stage.recent), stage.count) for name, stage in self._stages.items()}
        return {name: _quantiles(took) | {"count": count} for name, (took, count) in recent.items()}

    def _values(self) -> dict[str, Value]:
        with self._lock:
            stage, probes = self._stages[SERVABLE], self._probes
            waiting, since = stage.waiting, [stage.oldest(), self._oldest()]
        oldest = min((at for at in since if at is not None), default=None)
        age = 0.0 if oldest is None else max(0.0, time.monotonic() - oldest)
        return {"probes_total": probes, "waiting": waiting, "oldest_seconds": age}


class _Stage:
    def __init__(self, histogram: Histogram) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds
        self.count = self.waiting = 0
        self._histogram = histogram
        self._queues: dict[int, deque[tuple[int, float]]] = {}  # partition → (offset, sent at), in the log's order
        self._reached: dict[int, tuple[int, float]] = {}  # partition → (position, when)
        self._steps: dict[int, deque[tuple[int, float]]] = {}  # partition → the last of these, in order

    def sent(self, partition: int, offset: int, at: float) -> None:
        position, when = self._reached.get(partition, (-1, 0.0))
        if offset < position:  # the stage was faster than Kafka's acknowledgement
            self._took(when - at)
            return
        self._queues.setdefault(partition, deque()).append((offset, at))
        self.waiting += 1

    def passed(self, partition: int, position: int, at: float) -> None:
        if position <= self._reached.get(partition, (-1, 0.0))[0]:
            return
        self._reached[partition] = position, at
        self._steps.setdefault(partition, deque(maxlen=STEPS)).append((position, at))
        queue = self._queues.get(partition, deque())
        while queue and queue[0][0] < position:
            self._took(at - queue.popleft()[1])
            self.waiting -= 1

    def when(self, partition: int, offset: int) -> float | None:
        steps = self._steps.get(partition, ())
        if steps and steps[0][0] > offset and len(steps) == STEPS:
            return None  # it was before the first that is kept
        return next((at for position, at in steps if position > offset), None)

    def oldest(self) -> float | None:
        return min((queue[0][1] for queue in self._queues.values() if queue), default=None)

    def _took(self, seconds: float) -> None:
        seconds = max(0.0, seconds)  # clocks of other machines
        self._histogram.observe(seconds)
        self.recent.append(seconds)
        self.count += 1


class Probes:
    """Sends probes, and follows them through the topics and a replica. An async context; `tasks` are to be run."""

    def __init__(
        self, bootstrap: Bootstrap, topics: TopicSettings, url: str, registry: CollectorRegistry,
        probe: Callable[[str, int], Event] = tick, moment: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        token: Secret | None = None,
    ) -> None:  # fmt: skip
        """url, token: of the replica. probe, moment: what is sent, and the event time (ms UTC) that it says it is."""
        self.probing = True
        self.sent: list[Callable[[int, int, float], object]] = []  # told of each probe too, as `StageFreshness.sent`
        self.answered: list[Callable[[dict[str, Any], float], object]] = []  # of each answer of the replica, with when
        self._bootstrap, self._topics, self._moment = bootstrap, topics, moment
        self._prober = Prober(self._tell, bootstrap, topics.events, topics.partitions, probe)
        self._replica = ReplicaWatch(url, token)
        self.stages = StageFreshness(registry, lambda: self._prober.oldest)

    async def __aenter__(self) -> Probes:
        await self._replica.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._replica.__aexit__()

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """To be run until they are cancelled. A Kafka or a replica that is away is waited for."""
        return [self._send(), self._follow_topics(), self._follow_replica()]

    def _tell(self, partition: int, offset: int, at: float) -> None:
        for told in (self.stages.sent, *self.sent):
            told(partition, offset, at)

    async def _send(self) -> None:
        """Connects, as soon as there is a Kafka, and sends."""
        while True:
            with contextlib.suppress(BrokerError):  # `oldest_seconds` says it
                async with self._prober:
                    await self._rounds()
            await asyncio.sleep(AGAIN_S)

    async def _rounds(self) -> None:
        """A round every PROBE_S, while there are not too many on their way."""
        due = time.monotonic()
        while True:
            if self.probing and self.stages.waiting < MOST_WAITING:
                try:
                    await self._prober.send(self._moment())
                except BrokerError:  # `oldest_seconds` says it
                    await asyncio.sleep(AGAIN_S)
            due = max(due + PROBE_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def _follow_replica(self) -> None:
        """Long polls: each version as soon as the replica has it."""
        sequence = -1
        while True:
            answer = await self._replica.newer_than(sequence)
            if answer is None:
                await asyncio.sleep(PROBE_S)  # it is starting
                continue
            at, sequence = time.monotonic(), answer["sequence"]
            positions = {int(p): position for p, position in (answer["positions"] or {}).items()}
            self.stages.passed(SERVABLE, positions, at)
            for told in self.answered:
                told(answer, at)

    async def _follow_topics(self) -> None:
        while True:
            consumer = AIOKafkaConsumer(
                **client_arguments(self._bootstrap), isolation_level="read_committed", enable_auto_commit=False,
                max_partition_fetch_bytes=16 << 20,
            )  # fmt: skip
            try:
                await consumer.start()
                await self._read(consumer)
            except (KafkaError, OSError):
                await asyncio.sleep(AGAIN_S)
            finally:
                await consumer.stop()

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """From the topics' ends on."""
        examples, parameters = self._topics.examples, TopicPartition(self._topics.parameters, 0)
        consumer.assign([*(TopicPartition(examples, p) for p in range(self._topics.partitions)), parameters])
        await consumer.seek_to_end()
        versions = _Versions()
        while True:
            for place, records in (await consumer.getmany(timeout_ms=1_000)).items():
                if place == parameters:
                    for record in records:
                        self._version(versions, record)
                else:
                    self._block(records)

    def _block(self, records: Iterable[ConsumerRecord]) -> None:
        for record in records:
            with contextlib.suppress(CorruptRecord):  # the trainer refuses it, and says so
                positions = {record.partition: handled_in(record.value)}
                self.stages.passed("joined", positions, _monotonic(record.timestamp))

    def _version(self, versions: _Versions, record: ConsumerRecord) -> None:
        head = versions.complete(record.value)
        if head is not None and head.created_ms is not None:
            self.stages.passed("trained", head.positions, _monotonic(head.created_ms))
            self.stages.passed("committed", head.positions, _monotonic(record.timestamp))


class _Versions:
    """Their parts, put together as far as their heads go."""

    def __init__(self) -> None:
        self._first: PartHead | None = None

    def complete(self, part: bytes) -> PartHead | None:
        """The head of the version's first part, if this is its last."""
        try:
            head = head_of_part(part)
        except CorruptRecord:
            return None  # the replicas refuse it, and say so
        if head.created_ms is not None:
            self._first = head
        first = self._first
        if not head.last or first is None or (first.epoch, first.sequence) != (head.epoch, head.sequence):
            return None
        return first


def _monotonic(stamp_ms: int) -> float:
    """time.monotonic() of a time, ms UTC."""
    return stamp_ms / 1e3 - time.time() + time.monotonic()


def _quantiles(took: list[float]) -> dict[str, float | int | None]:
    names = ("p50", "p95", "p99")
    if not took:
        return dict.fromkeys(names)
    return {
        name: round(float(p) * 1e3, 1) for name, p in zip(names, np.percentile(took, [50, 95, 99]), strict=True)
    }
