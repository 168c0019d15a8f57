"""The catalogue in the tables: what an item is, and the card that replicas show of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from embedding_store.ids import hash_text
from online_model.examples import Examples
from online_model.features import ITEM, TITLE_WORDS

if TYPE_CHECKING:  # who only names an item need not load torch: the join worker starts in a second without it
    from embedding_store.tables import EmbeddingTables

# (item id, JSON of the record, category id or 0, seller id or 0, created ms or 0, word ids of the title)
CatalogueItem: TypeAlias = tuple[int, bytes, int, int, int, np.ndarray]


def put_catalogue(tables: EmbeddingTables, items: Sequence[CatalogueItem], now_ms: int) -> dict[int, bytes]:
    """Admits items, writes what they are into their rows, at `now_ms` of event time: item id → JSON of those that were
    not known as they are. An item for which there is no room is left out."""
    last = {item[0]: item[1:] for item in items}  # of several records of an item the last holds
    ids = np.fromiter(last, np.int64, len(last))
    hashes = np.array([card_hash(*values[:4]) for values in last.values()], np.int64)
    about = np.array([values[1:4] for values in last.values()], np.int64).reshape(-1, 3)
    words = np.array([values[4] for values in last.values()], np.int64).reshape(-1, TITLE_WORDS)
    tables.begin_step(now_ms)
    known = tables.rows(ITEM, ids, admit=False)
    new = np.flatnonzero((known == 0) | (tables.values(ITEM, "card", known) != hashes))
    rows = tables.rows(ITEM, ids[new], admit=True, at_once=True)
    new, rows = new[rows > 0], rows[rows > 0]
    if not len(rows):
        return {}
    created = np.where(about[new, 2] > 0, about[new, 2], tables.values(ITEM, "created", rows))
    columns = {"category": about[new, 0], "seller": about[new, 1], "created": created, "card": hashes[new],
               "words": words[new]}  # fmt: skip
    for name, values in columns.items():
        tables.set(ITEM, name, rows, values)
    return {int(ids[i]): last[int(ids[i])][0] for i in new.tolist()}


def new_cards(tables: EmbeddingTables, rows: Examples, at: np.ndarray) -> dict[int, bytes]:
    """Cards of items that the catalogue knows nothing of: item id → JSON. Each is made once."""
    without = np.flatnonzero((at > 0) & (tables.values(ITEM, "card", at) == 0))
    first = without[np.unique(at[without], return_index=True)[1]]
    raws = [b'{"item":%s}' % str(rows.item_raw[i]).encode("utf-8", "surrogatepass") for i in first]
    tables.set(ITEM, "card", at[first], np.array([card_hash(raw) for raw in raws], np.int64))
    return dict(zip(rows.item[first].tolist(), raws, strict=True))


def card_hash(raw: bytes, category: int = 0, seller: int = 0, created: int = 0) -> int:
    """What tells one card, with what its record says, from another."""
    return hash_text(f"{category} {seller} {created} {raw.decode('latin-1')}")  # latin-1: any bytes, one to one
