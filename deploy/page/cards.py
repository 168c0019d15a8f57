"""The catalogue as a reader sees it: titles of items, from the topic `items`."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from streams.events import Item, Rejected, decode_item
from streams.kafka_clients import Bootstrap, client_arguments
from streams.topics import TopicSettings

KEPT = 200_000  # cards, about 100 bytes each; of a larger catalogue the ones that came last
AGAIN_S = 2.0  # between two attempts to connect


class Cards:
    """Cards by str(item id). `run` is a task; until it has read an item, its title is its id."""

    def __init__(self, bootstrap: Bootstrap, topics: TopicSettings, kept: int = KEPT) -> None:
        self._bootstrap, self._topic, self._kept = bootstrap, topics.items, kept
        self._cards: dict[str, Item] = {}

    def of(self, item: str | int) -> dict[str, Any]:
        """{title, category, price} of an item, as strings and a number; without what is not known."""
        card = self._cards.get(str(item))
        if card is None:
            return {"title": str(item)}
        known = {"title": card.title or str(item), "category": card.category, "price": card.price}
        return {name: value for name, value in known.items() if value is not None}

    def put(self, key: bytes | None, value: bytes | None) -> None:
        """A record of the topic; one without a value takes the card away. What is no card is left out."""
        if value is None:
            self._cards.pop((key or b"").decode(errors="replace"), None)
            return
        try:
            card = decode_item(value)
        except Rejected:
            return
        self._cards.pop(str(card.item), None)
        self._cards[str(card.item)] = card
        if len(self._cards) > self._kept:
            del self._cards[next(iter(self._cards))]

    async def run(self) -> None:
        """Read the topic from its beginning and go on, until cancelled; again from there when Kafka was away."""
        while True:
            consumer = AIOKafkaConsumer(
                self._topic, **client_arguments(self._bootstrap), enable_auto_commit=False, auto_offset_reset="earliest"
            )
            try:
                await consumer.start()
                async for record in consumer:
                    self.put(record.key, record.value)
            except KafkaError:
                await asyncio.sleep(AGAIN_S)
            finally:
                await consumer.stop()
