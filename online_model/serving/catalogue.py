"""The items that may be recommended: the catalogue's cards, by item id."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import orjson
from msgspec import Meta, Struct

from embedding_store.errors import CorruptRecord
from embedding_store.rows import RowMap


class Card(Struct, frozen=True):
    """What serving reads of a catalogue record; its other fields are let through."""

    item: str | int
    stock: int | None = None  # None: not counted, so there is some
    created: Annotated[int, Meta(ge=0)] | None = None  # ms UTC


_decode = msgspec.json.Decoder(Card).decode


def read_cards(cards: dict[int, bytes]) -> dict[int, Card]:
    """Decoded cards by item id. Raises CorruptRecord."""
    try:
        return dict(zip(cards, map(_decode, cards.values()), strict=True))
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # orjson takes more: numbers of any length
    try:  # decoded as the topic `items` is: what was taken there can be read here
        return {item: msgspec.convert(orjson.loads(raw), Card) for item, raw in cards.items()}
    except (orjson.JSONDecodeError, msgspec.ValidationError) as error:
        raise CorruptRecord(f"a version holds a card that cannot be read ({error}): was the store damaged?") from None


class Catalogue:
    """Cards in slots 1..; slot 0 stands for no card. Arrays are by slot."""

    def __init__(self, capacity: int = 1024) -> None:
        self._slots = RowMap(capacity)
        self.raw: list[str | int] = [0] * (capacity + 1)  # the id as the catalogue has it
        self.available = np.zeros(capacity + 1, bool)  # has a card, and stock
        self.created = np.zeros(capacity + 1, np.int64)  # ms UTC, 0 unknown
        self.changes = 0  # counts `put` and `remove`: for those who keep something made of the cards

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, items: np.ndarray) -> np.ndarray:
        """Slots int64 [n] of item ids int64 [n], 0 where there is no card."""
        return self._slots.find(items)

    def are_available(self, items: np.ndarray) -> np.ndarray:
        """bool [n]: has a card, and stock."""
        return self.available[self.find(items)]

    def newest(self, n: int) -> np.ndarray:
        """Item ids int64 [<= n] of the available cards with the largest `created`, the newest first."""
        slots = np.flatnonzero(self.available)
        if len(slots) > n:
            slots = slots[np.argpartition(-self.created[slots], n)[:n]]
        return self._slots.ids_of(slots[np.argsort(-self.created[slots], kind="stable")])

    def put(self, cards: dict[int, Card]) -> None:
        """Add or replace cards by item id."""
        if not cards:
            return
        items = np.fromiter(cards, np.int64, len(cards))
        if len(self) + len(cards) > self._slots.capacity:
            self._grow(max(len(self) + len(cards), 2 * self._slots.capacity))
        slots, _ = self._slots.admit(items)
        for slot, card in zip(slots.tolist(), cards.values(), strict=True):
            self.raw[slot] = card.item
            self.available[slot] = card.stock is None or card.stock > 0
            self.created[slot] = card.created or 0
        self.changes += 1

    def remove(self, items: np.ndarray) -> None:
        """Forget the cards of these item ids (unknown ones too)."""
        slots = self.find(items)
        known = slots > 0
        if not known.any():
            return
        self.available[slots[known]] = False
        self.created[slots[known]] = 0
        self._slots.remove(items[known])
        self.changes += 1

    def _grow(self, capacity: int) -> None:
        self._slots.grow(capacity)
        more = capacity + 1 - len(self.raw)
        self.raw += [0] * more
        self.available = np.concatenate((self.available, np.zeros(more, bool)))
        self.created = np.concatenate((self.created, np.zeros(more, np.int64)))
