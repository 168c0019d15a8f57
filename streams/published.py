"""What is in the topic `parameters`: which version was published last, and whether it is of the trainer."""

from __future__ import annotations

import contextlib
import time

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from embedding_store.delta import place_of_part
from embedding_store.errors import BrokerError, CorruptRecord
from embedding_store.signing import HEADER, Signer
from streams.kafka_clients import Bootstrap, client_arguments
from streams.outlet import Message

SILENCE_SECONDS = 30.0  # so long the broker may not answer
VERSION = "version"  # what a signature says that it is of; epoch, sequence and part are in the bytes
LOOK_BACK = 20  # offsets, to find the last version


async def newest_version(bootstrap: Bootstrap, topic: str, signer: Signer | None = None) -> tuple[int, int] | None:
    """(epoch, sequence) of the last version in `parameters`; None: there is none. Raises BrokerError.

    `signer`: of those that it signed. Others could lead the trainer's epoch anywhere.
    """
    partition = TopicPartition(topic, 0)
    consumer = AIOKafkaConsumer(
        **client_arguments(bootstrap), enable_auto_commit=False, isolation_level="read_committed",
        max_partition_fetch_bytes=16 << 20,
    )  # fmt: skip
    try:
        await consumer.start()
        consumer.assign([partition])
        first = (await consumer.beginning_offsets([partition]))[partition]
        end = (await consumer.end_offsets([partition]))[partition]
        start, newest, moved = end, None, time.monotonic()
        while newest is None and start > first:
            start = max(first, end - max(LOOK_BACK, 2 * (end - start)))  # markers of transactions are offsets too
            consumer.seek(partition, start)
            while await consumer.position(partition) < end:
                records = (await consumer.getmany(timeout_ms=1_000)).get(partition, ())
                if records:
                    moved = time.monotonic()
                elif time.monotonic() - moved > SILENCE_SECONDS:
                    raise BrokerError(f"cannot read {topic}, no answer: is the broker up? `headrace broker status`")
                for record in records:
                    with contextlib.suppress(CorruptRecord):
                        require_signed(record, signer)
                        newest = place_of_part(record.value)
        return newest
    except KafkaError as error:
        raise BrokerError(f"cannot read {topic} ({error}): is the broker up? `headrace broker status`") from error
    finally:
        await consumer.stop()


def signed(part: bytes, topic: str, signer: Signer | None) -> Message:
    """The record to send of a part of a version."""
    headers = [] if signer is None else [(HEADER, signer.sign(VERSION, part))]
    return Message(topic, part, partition=0, headers=headers)


def require_signed(record: ConsumerRecord, signer: Signer | None) -> None:
    """Raises Forged unless the record is a part of a version that the trainer signed, or no key is set."""
    if signer is not None:
        signer.check(dict(record.headers).get(HEADER), VERSION, record.value or b"")
