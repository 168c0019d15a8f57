"""Topics of the live cluster, read from given offsets on by an owner who keeps the positions: no group, no commits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self, TypeAlias

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, OffsetOutOfRangeError

from embedding_store.errors import BrokerError
from replay.recording import Recorded
from streams.kafka_clients import Bootstrap, client_arguments
from streams.topics import wait_for_broker

Place: TypeAlias = tuple[str, int]  # topic, partition

POLL_RECORDS = 5_000
FETCH_BYTES = 16 << 20  # of a partition at once: a record of any size that the topics take
OUTAGE_SECONDS = 120.0  # so long Kafka may be away
QUIET_SECONDS = 10.0  # without a record: then it is asked whether it is there


class OffsetsGone(BrokerError):
    """Kafka does not have the offset that is to be read next. `earliest`, `end`: what it has is [earliest, end)."""

    def __init__(self, place: Place, wanted: int, earliest: int, end: int) -> None:
        topic, partition = place
        if wanted < earliest:
            said = f"has deleted the records {wanted} to {earliest}: raise retention.ms of the topic, or record sooner"
        else:
            said = f"ends at {end}, before {wanted} that is to be read next: is this the cluster that was recorded?"
        super().__init__(f"{topic}, partition {partition}: Kafka {said}")
        self.place, self.wanted, self.earliest, self.end = place, wanted, earliest, end


class LiveTopics:
    """Committed records of the partitions in `starts`, each from its offset on, in order.

    Raises BrokerError where Kafka cannot be reached, does not answer for OUTAGE_SECONDS, or has no such topic;
    OffsetsGone where it does not have an offset that is to be read.
    """

    def __init__(self, bootstrap: Bootstrap, starts: Mapping[Place, int]) -> None:
        wait_for_broker(bootstrap)
        self._bootstrap, self._answered = bootstrap, time.monotonic()
        common = {**client_arguments(bootstrap), "enable_auto_commit": False}
        self._places = {place: TopicPartition(*place) for place in starts}
        try:
            self._kafka = KafkaConsumer(
                **common, isolation_level="read_committed", auto_offset_reset="none", max_poll_records=POLL_RECORDS,
                fetch_max_bytes=2 * FETCH_BYTES, max_partition_fetch_bytes=FETCH_BYTES,
            )  # fmt: skip
            self._asking = KafkaConsumer(**common)  # for where the logs end, whatever of them is committed
        except KafkaError as error:
            raise self._failed(error) from error
        try:
            self._begin(starts)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._kafka.close()
        self._asking.close()

    def _begin(self, starts: Mapping[Place, int]) -> None:
        try:
            for topic in {topic for topic, _ in starts}:
                if not self._kafka.partitions_for_topic(topic):
                    raise BrokerError(f"Kafka at {self._bootstrap} has no topic {topic}: look at the topic prefix")
            self._kafka.assign(list(self._places.values()))
            for place, offset in starts.items():
                self._check(place, offset)
                self._kafka.seek(self._places[place], offset)
        except KafkaError as error:
            raise self._failed(error) from error

    def poll(self, seconds: float) -> Iterator[tuple[Place, list[Recorded]]]:
        """The next records of some partitions; waits for them up to so long."""
        try:
            found = self._kafka.poll(timeout_ms=int(seconds * 1000))
            if found:
                self._answered = time.monotonic()
            elif time.monotonic() - self._answered > QUIET_SECONDS:
                self.ends()  # a broker that is away and a topic where nothing happens are alike to poll
            for place, records in found.items():
                yield (
                    (place.topic, place.partition),
                    [Recorded(r.offset, r.timestamp, r.key, r.value) for r in records],
                )
        except OffsetOutOfRangeError as error:
            for place, offset in error.args[0].items():
                self._check((place.topic, place.partition), offset)
            raise self._failed(error) from error
        except KafkaError as error:
            raise self._failed(error) from error

    def position(self, place: Place) -> int:
        """The offset that is read next: past markers of transactions, too."""
        return self._kafka.position(self._places[place])

    def seek(self, place: Place, offset: int) -> None:
        self._kafka.seek(self._places[place], offset)

    def pause(self, places: list[Place]) -> None:
        """Of those only nothing is read until the next call."""
        self._kafka.resume(*self._kafka.paused())
        self._kafka.pause(*[self._places[place] for place in places])

    def ends(self) -> dict[Place, int] | None:
        """Where the logs end now, what is not committed too. None: Kafka does not answer just now."""
        try:
            found = self._asking.end_offsets(list(self._places.values()), timeout_ms=5_000)
        except KafkaError as error:
            if time.monotonic() - self._answered > OUTAGE_SECONDS:
                raise self._failed(error) from error
            return None
        self._answered = time.monotonic()
        return {(place.topic, place.partition): end for place, end in found.items()}

    def committed_ends(self) -> dict[Place, int]:
        """Where that ends which is committed now."""
        try:
            found = self._kafka.end_offsets(list(self._places.values()))
        except KafkaError as error:
            raise self._failed(error) from error
        return {(place.topic, place.partition): end for place, end in found.items()}

    def _check(self, place: Place, offset: int) -> None:
        there = [self._places[place]]
        earliest = self._asking.beginning_offsets(there)[there[0]]
        end = self._asking.end_offsets(there)[there[0]]
        if not earliest <= offset <= end:
            raise OffsetsGone(place, offset, earliest, end)

    def _failed(self, error: KafkaError) -> BrokerError:
        text = (str(error) or type(error).__name__).splitlines()[0][:200]
        return BrokerError(f"Kafka at {self._bootstrap} does not answer ({text}): look at `headrace broker status`")


def offsets(bootstrap: Bootstrap, topic: str, beginning: bool) -> list[int]:
    """Of each partition: where the topic begins, or where it ends now. Raises BrokerError."""
    wait_for_broker(bootstrap)
    try:
        kafka = KafkaConsumer(**client_arguments(bootstrap), enable_auto_commit=False)
        try:
            places = [TopicPartition(topic, p) for p in sorted(kafka.partitions_for_topic(topic) or ())]
            if not places:
                raise BrokerError(f"Kafka at {bootstrap} has no topic {topic}: look at the topic prefix")
            found = kafka.beginning_offsets(places) if beginning else kafka.end_offsets(places)
            return [found[place] for place in places]
        finally:
            kafka.close()
    except KafkaError as error:
        raise BrokerError(f"Kafka at {bootstrap} does not answer ({error}): see `headrace broker status`") from error
