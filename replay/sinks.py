"""Where a player or the simulator sends its records: a Kafka cluster or a file."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self, TypeAlias, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.partitioner import murmur2

from embedding_store.errors import BrokerError, LogError
from streams.events import Event, Id, Item, Tick, encode
from streams.kafka_clients import Bootstrap, client_arguments
from streams.topics import wait_for_broker

T = TypeVar("T")
Queue: TypeAlias = deque[tuple[bytes | None, bytes]]  # key, value

OUTSTANDING = 40_000  # records taken and not yet kept by the broker; more wait
OUTSTANDING_BYTES = 64 << 20  # and so much of their values
KNOWN_KEYS = 500_000
BATCH_BYTES = 512 * 1024  # a larger record makes a batch of its own
BATCH_RECORDS = 5_000
IDLE_S = 0.01  # how long a record may wait for the carrier to look, when it has nothing to do
DELIVERY_S = 30.0  # what the broker has not taken after this is an error
DELIVERY_STEPS = 10
STOP_S = 2.0


class Sink(Protocol):
    """Takes records in order. All methods raise BrokerError or LogError with one line."""

    @property
    def partitions(self) -> int:
        """How many partitions a tick goes to."""

    def send(self, record: Event | Item) -> None:
        """Takes a record; it may wait in a buffer. Blocks while too many do."""

    def send_raw(self, value: bytes, user: Id) -> None:
        """As `send`, for the bytes of a record that need not be an event: it goes where the events of `user` go, and
        keeps its place among them. For faults on purpose."""

    def tick(self, ts: int) -> int:
        """Says to every partition that event time has come to `ts` (ms); returns how many records that took."""

    def flush(self) -> None:
        """Returns when everything sent so far is kept."""

    def close(self) -> None:
        """Flushes and lets go."""


class _Closing:
    """`with` for a sink: closed at the end, but not flushed once more when something has gone wrong already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def close(self) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        raise NotImplementedError


class KafkaSink(_Closing):
    """Events keyed by user into the topic `events`, Items keyed by item into the topic `items`.

    Keys are str(id), placed by murmur2 as Kafka's own default partitioner and kafka-python's do, so all producers put
    a user's events into the same partition. The client is idempotent with acks of all replicas, and one batch of a
    partition is on its way at a time: within the sink's life a retry doubles, loses and reorders nothing.

    Callers see a plain blocking object, for one thread. Behind it a thread of its own packs what has come since the
    last round into one batch a partition (whole batches through aiokafka: nine times what kafka-python's `send`
    takes, which computes checksums in Python).
    """

    def __init__(self, bootstrap: Bootstrap, events: str = "events", items: str = "items") -> None:
        """Connects; BrokerError if no broker answers or a topic is not there."""
        wait_for_broker(bootstrap)
        self.bootstrap = bootstrap
        self._events, self._items = events, items
        self._sent = self._kept = 0  # records; the second is the thread's to write
        self._sent_bytes = self._kept_bytes = 0  # of their values
        self._moved = threading.Event()  # `_kept` has grown, or the thread has ended
        self._error: KafkaError | OSError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kafka-sink", daemon=True)
        self._thread.start()
        try:
            partitions = self._ask(self._start())
        except BaseException:
            self._stop()
            raise
        self._queues: dict[str, list[Queue]] = {topic: [deque() for _ in range(n)] for topic, n in partitions.items()}
        self._places: dict[str, dict[str | int, tuple[bytes, int]]] = {topic: {} for topic in partitions}
        self._carrier = asyncio.run_coroutine_threadsafe(self._carry(), self._loop)

    @property
    def partitions(self) -> int:
        """Partitions of the topic of events."""
        return len(self._queues[self._events])

    def send(self, record: Event | Item) -> None:
        match record:
            case Item():
                topic, who = self._items, record.item
            case Tick():
                raise TypeError("a tick goes to every partition: use tick(ts)")
            case _:
                topic, who = self._events, record.user
        key, partition = self.place(topic, who)
        self._put(topic, partition, key, encode(record))

    def send_raw(self, value: bytes, user: Id) -> None:
        """As in `Sink`."""
        key, partition = self.place(self._events, user)
        self._put(self._events, partition, key, value)

    def place(self, topic: str, who: str | int) -> tuple[bytes, int]:
        """The key and the partition of a user in the topic of events, or of an item in that of items."""
        places = self._places[topic]
        place = places.get(who)
        if place is None:
            if len(places) >= KNOWN_KEYS:
                places.clear()
            key = str(who).encode("utf-8", "surrogatepass")
            place = places[who] = key, (murmur2(key) & 0x7FFFFFFF) % len(self._queues[topic])
        return place

    def tick(self, ts: int) -> int:
        """As in `Sink`."""
        for partition in range(self.partitions):
            self._put(self._events, partition, None, encode(Tick(event_id=f"tick-{partition}-{ts}", ts=ts)))
        return self.partitions

    def flush(self) -> None:
        self._wait_for_at_most(0, 0)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.abort()

    def abort(self) -> None:
        """Lets go without waiting for what has not been taken; a second time does nothing."""
        if not self._loop.is_closed():
            self._carrier.cancel()
            self._stop()

    def _put(self, topic: str, partition: int, key: bytes | None, value: bytes) -> None:
        self._queues[topic][partition].append((key, value))
        self._sent += 1
        self._sent_bytes += len(value)
        if self._sent - self._kept > OUTSTANDING or self._sent_bytes - self._kept_bytes > OUTSTANDING_BYTES:
            self._wait_for_at_most(OUTSTANDING // 2, OUTSTANDING_BYTES // 2)
        elif self._error:
            raise self._explained(self._error)

    def _wait_for_at_most(self, records: int, size: int) -> None:
        """Returns when no more than so many records and bytes are outstanding."""
        while True:
            self._moved.clear()
            if self._error:
                raise self._explained(self._error)
            if self._sent - self._kept <= records and self._sent_bytes - self._kept_bytes <= size:
                return
            self._moved.wait()

    async def _start(self) -> dict[str, int]:
        """Connects; the number of partitions of both topics."""
        self._producer = AIOKafkaProducer(
            **client_arguments(self.bootstrap), acks="all", enable_idempotence=True, linger_ms=0,
            max_batch_size=BATCH_BYTES, max_request_size=16 * BATCH_BYTES,
            request_timeout_ms=int(1000 * DELIVERY_S),  # for so long the client waits for a leader, too
        )  # fmt: skip
        await self._producer.start()
        topics = await self._producer.client.fetch_all_metadata()
        counts = {}
        for topic in (self._events, self._items):
            partitions = topics.partitions_for_topic(topic)
            if not partitions:
                raise BrokerError(f"Kafka at {self.bootstrap} has no topic {topic}: create it, or look at its prefix")
            counts[topic] = len(partitions)
        return counts

    async def _carry(self) -> None:
        """Carries batches, a round at a time: one of each partition that has records, all kept before the next."""
        try:
            while True:
                rounds = [
                    self._carry_batch(topic, partition, queue)
                    for topic, queues in self._queues.items()
                    for partition, queue in enumerate(queues)
                    if queue
                ]
                if rounds:
                    await _delivered(asyncio.gather(*rounds))
                    self._moved.set()
                else:
                    await asyncio.sleep(IDLE_S)
        except (KafkaError, OSError) as error:
            self._error = error
        finally:
            self._moved.set()

    async def _carry_batch(self, topic: str, partition: int, queue: Queue) -> None:
        batch = self._producer.create_batch()
        count = size = 0
        while queue and count < BATCH_RECORDS:
            key, value = queue[0]
            if batch.append(key=key, value=value, timestamp=None) is None:
                break  # full
            queue.popleft()
            count += 1
            size += len(value)
        await (await self._producer.send_batch(batch, topic, partition=partition))
        self._kept += count
        self._kept_bytes += size

    def _ask(self, coroutine: Coroutine[None, None, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        except (KafkaError, OSError) as error:
            raise self._explained(error) from error

    def _stop(self) -> None:
        """Ends the producer and the thread, whatever state they are in."""
        asyncio.run_coroutine_threadsafe(self._let_go(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _let_go(self) -> None:
        try:
            await asyncio.wait_for(self._producer.stop(), STOP_S)
        except (KafkaError, OSError):  # it still tries to send, or never connected
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._producer.client.close()

    def _explained(self, error: Exception) -> BrokerError:
        if isinstance(error, TimeoutError):
            what = f"no answer for {DELIVERY_S:.0f} s"
        else:
            what = (str(error) or type(error).__name__).splitlines()[0]
        return BrokerError(f"Kafka at {self.bootstrap} takes no records ({what}): look at `headrace broker status`")


async def _delivered(rounds: asyncio.Future[list[None]]) -> None:
    """Waits for them, DELIVERY_S at most: the client itself would try a batch that it has sent once for ever.

    Raises TimeoutError. In steps, so that the time for which the process was stopped (Ctrl-Z) counts as one of them.
    """
    try:
        for _ in range(DELIVERY_STEPS):
            await asyncio.wait([rounds], timeout=DELIVERY_S / DELIVERY_STEPS)
            if rounds.done():
                rounds.result()
                return
        raise TimeoutError
    finally:
        if rounds.cancel():
            await asyncio.wait([rounds])
            rounds.cancelled() or rounds.exception()  # asyncio would complain of what nobody has looked at


class JsonlSink(_Closing):
    """One JSON record a line, events and items, in a file; gzip if its name ends in .gz. Ticks are not written: they
    are about partitions. The same records give the same bytes."""

    partitions = 0

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._raw = self.path.open("wb")
        except OSError as error:
            raise LogError(f"{self.path}: {error.strerror}; choose a place that can be written") from None
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if self.path.suffix == ".gz":
            self._file = gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", compresslevel=6, mtime=0)

    def send(self, record: Event | Item) -> None:
        self._write(encode(record))

    def send_raw(self, value: bytes, user: Id) -> None:
        """As in `Sink`; a newline in it would make two lines."""
        self._write(value)

    def _write(self, line: bytes) -> None:
        with self._explained():
            self._file.write(line + b"\n")

    def tick(self, ts: int) -> int:
        return 0

    def flush(self) -> None:
        with self._explained():
            self._file.flush()

    def close(self) -> None:
        with self._explained(), self._raw:
            self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(f"{self.path}: {error.strerror}; make room or choose another place") from None

    abort = close
