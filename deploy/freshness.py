"""Freshness from outside: probes into each partition, timed until a replica says that it is past them."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from embedding_store.errors import BrokerError
from embedding_store.secret import Secret
from online_model.serving.client import authorization
from streams.events import Event, Refund, Tick, encode
from streams.impressions import let_go
from streams.kafka_clients import Bootstrap, client_arguments

PROBE_S = 0.05  # between two rounds of probes
POLL_MS = 1_000  # a long poll
RECENT = 2_000  # probes in the figures of the moment: 25 s at 4 partitions and 50 ms


class Probe(NamedTuple):
    """One that was returned; times are those of time.monotonic()."""

    partition: int
    offset: int
    sent: float
    seen: float

    @property
    def took_ms(self) -> float:
        return (self.seen - self.sent) * 1e3


@dataclass
class Freshness:
    """Probes in flight and those returned. Filled from producer callbacks, hence the lock."""

    keep: int | None = None  # of the probes that returned, the newest so many; none: all
    waiting: dict[int, deque[tuple[int, float]]] = field(default_factory=dict)  # partition → (offset, sent at)
    returned: deque[Probe] = field(init=False)
    took_ms: array = field(default_factory=lambda: array("f"))  # of all that returned: a run may last for days
    reached: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.returned = deque(maxlen=self.keep)

    def sent(self, partition: int, offset: int, at: float) -> None:
        """A probe has its place in the log; `at` is time.monotonic() before it was sent."""
        with self.lock:
            if self.reached.get(partition, -1) > offset:  # the replica was faster than the acknowledgement
                self._came(Probe(partition, offset, at, time.monotonic()))
            else:
                self.waiting.setdefault(partition, deque()).append((offset, at))

    def served(self, positions: dict[int, int], at: float) -> None:
        """A replica was seen at `positions` (it has the effect of everything below them) at time.monotonic() `at`."""
        with self.lock:
            for partition, position in positions.items():
                self.reached[partition] = max(position, self.reached.get(partition, -1))
                queue = self.waiting.get(partition, deque())
                while queue and queue[0][0] < position:
                    self._came(Probe(partition, *queue.popleft(), at))

    def unreturned(self) -> int:
        """Probes in flight."""
        with self.lock:
            return sum(map(len, self.waiting.values()))

    def figures(self, recent: bool = False) -> dict[str, float | int | None]:
        """p50, p95, p99 in ms and the count, of all probes or of the recent ones."""
        with self.lock:
            took = np.array(self.took_ms[-RECENT:] if recent else self.took_ms)
            count = len(self.took_ms)
        return _quantiles(took) | {"count": count}

    def _came(self, probe: Probe) -> None:
        self.returned.append(probe)
        self.took_ms.append(probe.took_ms)


def quantiles(probes: Iterable[Probe]) -> dict[str, float | int | None]:
    """p50, p95, p99 in ms and the count, of these."""
    return _quantiles(np.array([probe.took_ms for probe in probes]))


def _quantiles(took: np.ndarray) -> dict[str, float | int | None]:
    if not len(took):
        return {"p50": None, "p95": None, "p99": None, "count": 0}
    p50, p95, p99 = (round(float(p), 1) for p in np.percentile(took, [50, 95, 99]))
    return {"p50": p50, "p95": p95, "p99": p99, "count": len(took)}


def tick(name: str, ts: int) -> Event:
    """A probe that is no event: it waits for the events before it, and for nothing where none of them is held."""
    return Tick(event_id=name, ts=ts)


def refund(name: str, ts: int) -> Event:
    """A probe that is held as all events are. Of something that nobody bought: it has no effect but to be counted."""
    return Refund(event_id=name, ts=ts, user="probe", item="probe")


class Prober:
    """Sends probes: rounds of one into each partition of `topic`. An async context."""

    def __init__(
        self, sent: Callable[[int, int, float], object], bootstrap: Bootstrap, topic: str, partitions: int,
        probe: Callable[[str, int], Event] = tick,
    ) -> None:
        """`sent`: is told of each that Kafka has, as `Freshness.sent`. `probe`: makes one of its name and its time
        (ms UTC)."""
        self._told, self._bootstrap, self._topic, self._partitions = sent, bootstrap, topic, partitions
        self._probe, self._rounds = probe, 0
        self._run = secrets.token_hex(4)  # other probers' probes are not these: the joiner takes each id once
        self._flying: dict[asyncio.Future, float] = {}  # Kafka has not got it yet → time.monotonic()

    async def __aenter__(self) -> Prober:
        """Raises BrokerError."""
        self._producer = AIOKafkaProducer(**client_arguments(self._bootstrap), acks="all", linger_ms=5)
        try:
            await self._producer.start()
        except KafkaError as error:
            await self._producer.stop()
            raise BrokerError(f"Kafka at {self._bootstrap} does not answer ({error}): is it running?") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await let_go(self._producer)  # Kafka may be away: what it has not taken is not waited for

    async def send(self, ts: int) -> None:
        """A round of probes that say it is `ts` (ms UTC). Raises BrokerError."""
        self._rounds += 1
        for partition in range(self._partitions):
            probe = encode(self._probe(f"probe-{self._run}-{partition}-{self._rounds}", ts))
            at = time.monotonic()
            try:
                waiting = await self._producer.send(self._topic, probe, partition=partition)
            except KafkaError as error:
                raise BrokerError(f"Kafka does not take probes ({error}): is the broker running?") from None
            self._flying[waiting] = at
            waiting.add_done_callback(lambda done, p=partition, at=at: self._sent(done, p, at))

    @property
    def oldest(self) -> float | None:
        """When the first of those was sent that Kafka has not got yet, time.monotonic(); None: it has got all."""
        return min(list(self._flying.values()), default=None)

    def _sent(self, done: asyncio.Future, partition: int, at: float) -> None:
        self._flying.pop(done, None)
        if not done.cancelled() and done.exception() is None:
            self._told(partition, done.result().offset, at)


class ReplicaWatch:
    """Long polls of a replica's `/v1/model`: each version as soon as the replica has it. An async context."""

    def __init__(self, url: str, token: Secret | None = None) -> None:
        """token: what the replica asks for, if it does."""
        self._url, self._headers = f"{url}/v1/model", authorization(token)

    async def __aenter__(self) -> ReplicaWatch:
        timeout = aiohttp.ClientTimeout(POLL_MS / 1000 + 5)
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def newer_than(self, sequence: int) -> dict[str, Any] | None:
        """The replica's answer, as soon as it has a newer version or POLL_MS are over; None: it gives none."""
        asked = {"newer_than": sequence, "wait_ms": POLL_MS}
        try:
            async with self._session.get(self._url, params=asked) as response:
                return orjson.loads(await response.read()) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None
