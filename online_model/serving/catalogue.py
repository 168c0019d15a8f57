"""The items that may be recommended: the catalogue's cards, by item id."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Annotated

import msgspec
import numpy as np
import orjson
from msgspec import Meta, Struct

from embedding_store.errors import CorruptRecord
from embedding_store.ids import feature_id
from embedding_store.rows import RowMap
from online_model.features import CATEGORY, SELLER

NO_PRICE = 1.0  # what an item without a price counts as


class Card(Struct, frozen=True, gc=False):  # a million of them are no work for the garbage collector
    """What serving reads of a catalogue record; its other fields are let through."""

    item: str | int
    stock: int | None = None  # None: not counted, so there is some
    created: Annotated[int, Meta(ge=0)] | None = None  # ms UTC
    category: str | int | None = None
    seller: str | int | None = None
    price: Annotated[float, Meta(ge=0)] | None = None
    regions: list[str] | None = None  # where it is sold; None or none: everywhere


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


class Labels:
    """What many cards share, by small numbers; 0: none. They stay: there are few, and replicas start anew."""

    def __init__(self) -> None:
        self._codes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        """Of arrays by code, 0 included."""
        return len(self._codes) + 1

    def code(self, label: Hashable) -> int:
        """That of a label, which is new perhaps."""
        return self._codes.setdefault(label, len(self._codes) + 1)

    def among(self, labels: Iterable[Hashable]) -> np.ndarray:
        """bool by code: whether it is that of one of the labels."""
        mask = np.zeros(len(self), bool)
        mask[[self._codes[label] for label in labels if label in self._codes]] = True
        return mask


class Groups:
    """The categories, or the sellers, that cards name: codes for raw ids ("7" and 7 are one), and their feature ids."""

    def __init__(self, feature: str) -> None:
        self._feature, self._labels, self._raw = feature, Labels(), dict[str | int | None, int]({None: 0})
        self._ids, self._array = [0], np.zeros(1, np.int64)

    def codes(self, raw: Sequence[str | int | None]) -> list[int]:
        """Those of each; 0 for None."""
        for new in dict.fromkeys(raw):
            if new is not None and new not in self._raw:
                id_ = feature_id(self._feature, new)
                code = self._raw[new] = self._labels.code(id_)
                if code == len(self._ids):
                    self._ids.append(id_)
        return [self._raw[one] for one in raw]

    def among(self, raw: Iterable[str | int]) -> np.ndarray:
        """bool by code: whether it is one of these."""
        return self._labels.among(feature_id(self._feature, one) for one in raw)

    def ids(self, codes: np.ndarray) -> np.ndarray:
        """Feature ids int64 [n] of codes [n]; 0 for 0."""
        if len(self._array) != len(self._ids):
            self._array = np.array(self._ids, np.int64)
        return self._array[codes]


class Regions:
    """The lists of regions that cards name. Code 0: everywhere."""

    def __init__(self) -> None:
        self._labels, self._with = Labels(), dict[str, list[int]]()

    def code(self, regions: list[str] | None) -> int:
        if not regions:
            return 0
        new, names = len(self._labels), tuple(sorted(set(regions)))
        code = self._labels.code(names)
        if code == new:
            for name in names:
                self._with.setdefault(name, []).append(code)
        return code

    def sold_in(self, region: str) -> np.ndarray:
        """bool by code: whether that list has the region."""
        mask = np.zeros(len(self._labels), bool)
        mask[[0, *self._with.get(region, ())]] = True
        return mask


_COLUMNS = {
    "listed": bool, "available": bool, "created": np.int64, "price": np.float32, "category": np.int32,
    "seller": np.int32, "regions": np.int32,
}  # fmt: skip


class Catalogue:
    """Cards in slots 1..; slot 0 stands for no card. Arrays are by slot; 34 bytes and the id a card."""

    listed: np.ndarray  # bool: has a card
    available: np.ndarray  # bool: has a card, and stock
    created: np.ndarray  # int64 ms UTC, 0 unknown
    price: np.ndarray  # float32, NO_PRICE where it has none
    category: np.ndarray  # int32 code of `categories`
    seller: np.ndarray  # int32 code of `sellers`
    regions: np.ndarray  # int32 code of `places`

    def __init__(self, capacity: int = 1024) -> None:
        self._slots = RowMap(capacity)
        self.raw: list[str | int] = [0] * (capacity + 1)  # the id as the catalogue has it
        self.categories, self.sellers, self.places = Groups(CATEGORY), Groups(SELLER), Regions()
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.zeros(capacity + 1, dtype))
        self.price[0] = NO_PRICE
        self.changes = 0  # counts `put` and `remove`: for those who keep something made of the cards

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, items: np.ndarray) -> np.ndarray:
        """Slots int64 [n] of item ids int64 [n], 0 where there is no card."""
        return self._slots.find(items)

    def ids_of(self, slots: np.ndarray) -> np.ndarray:
        """Item ids int64 [n] of slots int64 [n]."""
        return self._slots.ids_of(slots)

    def newest(self, n: int, among: np.ndarray | None = None) -> np.ndarray:
        """Item ids int64 [<= n] of the available cards (or those of `among`, bool by slot) with the largest `created`,
        the newest first."""
        slots = np.flatnonzero(self.available if among is None else among)
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
        every = cards.values()
        for slot, card in zip(slots.tolist(), every, strict=True):
            self.raw[slot] = card.item
        self.listed[slots] = True
        self.available[slots] = [card.stock is None or card.stock > 0 for card in every]
        self.created[slots] = [card.created or 0 for card in every]
        self.price[slots] = [NO_PRICE if card.price is None else card.price for card in every]
        self.category[slots] = self.categories.codes([card.category for card in every])
        self.seller[slots] = self.sellers.codes([card.seller for card in every])
        self.regions[slots] = [self.places.code(card.regions) if card.regions else 0 for card in every]
        self.changes += 1

    def remove(self, items: np.ndarray) -> None:
        """Forget the cards of these item ids (unknown ones too)."""
        slots = self.find(items)
        known = slots > 0
        if not known.any():
            return
        for name in _COLUMNS:
            getattr(self, name)[slots[known]] = 0
        self._slots.remove(items[known])
        self.changes += 1

    def _grow(self, capacity: int) -> None:
        self._slots.grow(capacity)
        more = capacity + 1 - len(self.raw)
        self.raw += [0] * more
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.concatenate((getattr(self, name), np.zeros(more, dtype))))
