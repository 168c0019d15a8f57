"""Where a topic ends: asked for every few seconds by a worker, so that it can say how much of it is still to come."""

from __future__ import annotations

import asyncio
import time

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from streams.kafka_clients import Bootstrap, client_arguments

ASK_SECONDS = 2.0
ANSWER_SECONDS = 5.0  # Kafka that takes longer is away


class Ends:
    """Of `topic`, which has so many `partitions`. `run` is a task; what it finds may be read from any thread.

    A connection of its own: neither a fetch nor a rebalance of the worker waits for it, and that Kafka is away is
    noticed while the worker itself has nothing to ask.
    """

    def __init__(self, bootstrap: Bootstrap, topic: str, partitions: int, committed_only: bool = False) -> None:
        """committed_only: up to the first record that belongs to a transaction under way."""
        self.ends: dict[int, int] = {}  # partition → the offset that the next record gets, as last heard
        self._bootstrap = bootstrap
        self._places = [TopicPartition(topic, partition) for partition in range(partitions)]
        self._isolation = "read_committed" if committed_only else "read_uncommitted"
        self._heard = time.monotonic()

    async def run(self) -> None:
        """Ask until cancelled. That there is no answer is not an error here: `away_s` says it."""
        while True:
            consumer = AIOKafkaConsumer(**client_arguments(self._bootstrap), isolation_level=self._isolation)
            try:
                await consumer.start()
                await self._ask(consumer)
            except (KafkaError, TimeoutError, OSError):
                await asyncio.sleep(ASK_SECONDS)
            finally:
                await consumer.stop()

    async def _ask(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            async with asyncio.timeout(ANSWER_SECONDS):
                found = await consumer.end_offsets(self._places)
            self.ends = {place.partition: end for place, end in found.items()}
            self._heard = time.monotonic()
            await asyncio.sleep(ASK_SECONDS)

    def behind(self, partition: int, offset: int) -> int:
        """How many offsets of a partition are still to come for one who is at `offset`; 0 where nobody knows."""
        return max(0, self.ends.get(partition, 0) - offset)

    @property
    def away_s(self) -> float:
        """For how long Kafka has not answered, beyond the time between two questions."""
        return max(0.0, time.monotonic() - self._heard - ASK_SECONDS)
