"""What a replica has shown goes back into the topic `events` as impressions: the loop is closed.

A request only leaves its answer in a queue. Whatever becomes of it there slows or fails no request: what does not fit,
or what the broker does not take in time, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections import deque
from collections.abc import Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from online_model.serving.api import Ranked, Ranking, RankRequest, Recommendation, RecommendRequest, Shown
from streams.events import Impression, encode
from streams.kafka_clients import client_arguments
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")

WAITING = 10_000  # impressions that are not with the broker yet; more are dropped
TIMEOUT_MS = 10_000  # what the broker has not taken after that is dropped
AGAIN_SECONDS = 1.0  # between two attempts to connect
LINGER_MS = 5
DRAIN_SECONDS = 5.0
STOP_SECONDS = 2.0


def impression_of(
    asked: RankRequest | RecommendRequest, answer: Ranking | Recommendation
) -> Impression | None:
    """The impression that this answer makes; None where nothing of it is shown, or it shall not be logged."""
    items: Sequence[Ranked] = answer.items
    propensities: list[float] | None = None
    if isinstance(asked, RankRequest):
        items = items[: asked.shown]
        positions = list(range(len(items)))
    else:
        items = items if asked.log else []
        places = [item for item in items if isinstance(item, Shown)]
        positions = [place.position for place in places]
        known = [place.propensity for place in places if place.propensity is not None]
        propensities = known if len(known) == len(items) else None
    if not items:
        return None
    context = {"query": asked.context.query, "arm": answer.arm, "degraded": answer.degraded}
    return Impression(
        event_id=answer.request_id, user=asked.user, ts=answer.moment_ms, scenario=asked.scenario,
        request_id=answer.request_id, items=[item.item for item in items], positions=positions,
        propensities=propensities, model_version=answer.model_version, feature_hash=answer.feature_hash,
        context={name: value for name, value in context.items() if value},
    )  # fmt: skip


class ImpressionLog:
    """Sends impressions, keyed by user as all producers of events do. `served` is for requests, `run` a task."""

    def __init__(self, settings: ServeWorkerSettings, registry: CollectorRegistry) -> None:
        self._connection, self._topic = settings.connection, settings.topics.events
        self._queue: deque[Impression] = deque()
        self._more = asyncio.Event()
        self._flying: set[Future] = set()
        self._counted = _Counted(registry, self)

    @property
    def waiting(self) -> int:
        """Impressions that the broker has not taken yet."""
        return len(self._queue) + len(self._flying)

    def served(self, asked: RankRequest | RecommendRequest, answer: Ranking | Recommendation) -> None:
        """An answer goes out."""
        impression = impression_of(asked, answer)
        if impression is None:
            return
        if self.waiting >= WAITING:
            self._counted.dropped.inc()
            return
        self._queue.append(impression)
        self._more.set()

    async def run(self) -> None:
        """Send until cancelled; then what waits gets DRAIN_SECONDS."""
        producer = await self._connected()
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                await self._send_all(producer)
        except asyncio.CancelledError:
            await self._drain(producer)
            raise
        finally:
            await _let_go(producer)

    async def _connected(self) -> AIOKafkaProducer:
        while True:
            # Not idempotent: what is sent twice has one event_id, and the joiner takes it once.
            producer = AIOKafkaProducer(
                **client_arguments(self._connection), acks="all", linger_ms=LINGER_MS, request_timeout_ms=TIMEOUT_MS
            )
            connected = False
            try:
                await producer.start()
                connected = True
            except KafkaError as error:
                log.warning("impressions wait: no connection to Kafka at %s (%s)", self._connection, error)
            finally:
                if not connected:
                    await _let_go(producer)
            if connected:
                return producer
            await asyncio.sleep(AGAIN_SECONDS)

    async def _send_all(self, producer: AIOKafkaProducer) -> None:
        while self._queue:
            impression = self._queue.popleft()
            key = str(impression.user).encode()
            try:
                flying = await producer.send(self._topic, encode(impression), key=key)
            except KafkaError as error:
                self._lost(error)
                continue
            self._flying.add(flying)
            flying.add_done_callback(self._landed)

    async def _drain(self, producer: AIOKafkaProducer) -> None:
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._send_all(producer)
                await asyncio.gather(*self._flying, return_exceptions=True)
        except TimeoutError:
            log.warning("%s impressions were not sent: Kafka did not take them", self.waiting)

    def _landed(self, done: Future) -> None:
        self._flying.discard(done)
        error = None if done.cancelled() else done.exception()
        if error is not None or done.cancelled():
            self._lost(error)
        else:
            self._counted.sent.inc()

    def _lost(self, error: BaseException | None) -> None:
        self._counted.dropped.inc()
        log.debug("an impression was dropped: %s", error)


async def _let_go(producer: AIOKafkaProducer) -> None:
    """Stops it, whatever state it is in."""
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await producer.stop()
    except (KafkaError, OSError):  # TimeoutError too: it still tries to send
        await producer.client.close()


class _Counted(Collector):
    """What is said of the impressions on /metrics."""

    def __init__(self, registry: CollectorRegistry, impressions: ImpressionLog) -> None:
        self._log = impressions
        self.sent = Counter("headrace_serve_impressions", "Impressions that went into `events`", registry=registry)
        self.dropped = Counter(
            "headrace_serve_impressions_dropped", "Impressions that did not: too many waited, or Kafka was away",
            registry=registry,
        )  # fmt: skip
        registry.register(self)

    def collect(self) -> list[Metric]:
        return [GaugeMetricFamily("headrace_serve_impressions_waiting", "Impressions on their way", self._log.waiting)]

    def describe(self) -> list[Metric]:
        return []
