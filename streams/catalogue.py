"""The catalogue on its way to the trainer: from the topic `items`, or from a log."""

from __future__ import annotations

import logging

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from embedding_store.errors import BrokerError
from embedding_store.ids import feature_id
from online_model.catalogue import CatalogueItem
from online_model.features import TITLE_WORDS, words_of
from streams.events import Item, Rejected, decode_item
from streams.kafka_clients import Bootstrap, client_arguments

log = logging.getLogger("headrace")
CHUNK = 5_000  # items


class CatalogueReader:
    """The topic of items, read from its beginning: compacted, it has the last record of each item."""

    def __init__(self, bootstrap: Bootstrap, topic: str) -> None:
        self._partition = TopicPartition(topic, 0)
        self._end = 0
        self._kafka = AIOKafkaConsumer(
            **client_arguments(bootstrap), enable_auto_commit=False, auto_offset_reset="earliest"
        )

    async def start(self) -> None:
        """Raises BrokerError."""
        try:
            await self._kafka.start()
            self._kafka.assign([self._partition])
            await self._kafka.seek_to_beginning(self._partition)
            self._end = (await self._kafka.end_offsets([self._partition]))[self._partition]
        except KafkaError as error:
            raise self._failed(error) from error

    async def read_to_end(self) -> list[CatalogueItem] | None:
        """The next items up to where the topic ended at the start; then None."""
        try:
            if await self._kafka.position(self._partition) >= self._end:
                return None
        except KafkaError as error:
            raise self._failed(error) from error
        return await self.read()

    async def read(self) -> list[CatalogueItem]:
        """The next items; waits for at most a second."""
        try:
            fetched = await self._kafka.getmany(timeout_ms=1_000, max_records=CHUNK)
        except KafkaError as error:
            raise self._failed(error) from error
        found = [record for records in fetched.values() for record in records]
        items = (item_in(record.value, f"offset {record.offset} of {record.topic}") for record in found)
        return [item for item in items if item is not None]

    async def stop(self) -> None:
        await self._kafka.stop()

    def _failed(self, error: KafkaError) -> BrokerError:
        return BrokerError(f"cannot read {self._partition.topic} ({error}): is the broker up? `headrace broker status`")


def item_in(value: bytes | None, where: str) -> CatalogueItem | None:
    """The trainer's view of a catalogue record; None for a tombstone (what was learned stays) and what is no item."""
    if value is None:
        return None
    try:
        return catalogue_item(decode_item(value), value)
    except Rejected as error:
        log.warning("refused the record at %s: %s", where, error)
        return None


def catalogue_item(item: Item, raw: bytes) -> CatalogueItem:
    """The trainer's view of an item; `raw` is its record."""
    category = 0 if item.category is None else feature_id("category", item.category)
    seller = 0 if item.seller is None else feature_id("seller", item.seller)
    words = words_of(item.title, TITLE_WORDS)
    return feature_id("item", item.item), raw, category, seller, item.created or 0, words
