"""Messages and offsets in one Kafka transaction: all of it is there for a reader of committed records, or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced

from embedding_store.errors import BrokerError, FencedError
from streams.kafka_clients import Bootstrap, client_arguments

BATCH_BYTES = 900_000  # Kafka's limit on a record is one on a batch of them: 1 MiB
MAX_MESSAGE_BYTES = 16 << 20  # a message larger than a batch goes alone, as far as its topic allows


class Message(NamedTuple):
    """One record to send. `partition` None: by the hash of the key."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    headers: Sequence[tuple[str, bytes]] = ()


class Outlet:
    """A producer with a transactional id of its own. Only the newest one of an id can write; it is not for sharing."""

    def __init__(self, bootstrap: Bootstrap, transactional_id: str) -> None:
        self.id = transactional_id
        self._producer = AIOKafkaProducer(
            **client_arguments(bootstrap),
            transactional_id=transactional_id,
            linger_ms=0,
            retry_backoff_ms=20,
            max_request_size=MAX_MESSAGE_BYTES,
            max_batch_size=BATCH_BYTES,
            request_timeout_ms=30_000,
            transaction_timeout_ms=180_000,  # one that outlives Kafka's absence goes on, it is not undone and fenced
        )

    async def start(self) -> None:
        """Connect; whoever had this id before can write nothing more, and what it left unfinished is undone.

        Raises BrokerError where Kafka cannot be reached.
        """
        try:
            await self._producer.start()
        except KafkaError as error:
            await self._producer.stop()
            raise BrokerError(f"Kafka refuses a producer ({error}): see `headrace broker status`") from error

    async def send(
        self,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int | tuple[int, str]] | None = None,
        group: str = "",
    ) -> None:
        """All messages, in this order, and the group's offsets, in one transaction; returns when it is committed.

        An offset may have a text of at most 4,096 bytes beside it.

        Raises FencedError where another worker has taken over, BrokerError where it is not known to be committed.
        """
        try:
            async with self._producer.transaction():
                sent = [await self._send(message) for message in messages]
                # Not beside the offsets: a broker that is just adding the group to the transaction refuses its records,
                # and the client then waits for its back-off (100 ms).
                for acknowledged in sent:
                    await acknowledged
                if offsets:
                    await self._producer.send_offsets_to_transaction(dict(offsets), group)
        except ProducerFenced as error:
            raise FencedError(f"another worker took over {self.id}: this one stops") from error
        except KafkaError as error:
            raise BrokerError(f"Kafka did not take what {self.id} sent ({error}): start this worker again") from error

    async def stop(self) -> None:
        await self._producer.stop()

    async def _send(self, message: Message) -> asyncio.Future:
        return await self._producer.send(
            message.topic,
            message.value,
            key=message.key,
            partition=message.partition,
            headers=list(message.headers),
        )
