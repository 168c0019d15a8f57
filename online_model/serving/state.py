"""What a replica holds of the model: tables, cards and dense weights, changed by whole versions only."""

from __future__ import annotations

import numpy as np
import torch

from embedding_store.delta import Version
from embedding_store.encoding import Encoding
from embedding_store.errors import CorruptRecord
from online_model.features import CARD, CATEGORY, ITEM, SELLER, TITLE_WORDS, USER, WORD, item_numbers, table_specs
from online_model.neighbours import Lists, lists_of, similar
from online_model.ranker import Ranker
from online_model.serving.catalogue import Card, Catalogue, read_cards
from online_model.serving.table import Table
from online_model.settings import FeatureSettings, RankerSettings

# What the replica adds to an item's row, so that a request need not look it up.
CATEGORY_ROW, SELLER_ROW, WORD_ROWS, AVAILABLE, STAMP = "category_row", "seller_row", "word_rows", "available", "stamp"
SLOT = "slot"  # of its card
_OWN = {
    CATEGORY_ROW: ("<i8", ()), SELLER_ROW: ("<i8", ()), WORD_ROWS: ("<i8", (TITLE_WORDS,)), AVAILABLE: ("?", ()),
    STAMP: ("<i8", ()), SLOT: ("<i4", ()),
}  # fmt: skip
_LINKED = {CATEGORY: CATEGORY_ROW, SELLER: SELLER_ROW, WORD: WORD_ROWS}  # table → the column of rows in it
_IDS = {CATEGORY: "category", SELLER: "seller", WORD: "words"}  # table → the column of ids in it


class State:
    """The model as of one version. `changes` counts the versions; an item row's STAMP is the last that touched it."""

    def __init__(
        self, features: FeatureSettings, ranker: RankerSettings, extra_heads: int = 0, rows: Encoding = "fp32"
    ) -> None:
        """rows: how the tables hold their weights."""
        self.tables = {
            spec.name: Table(
                spec.name, spec.settings.dim, spec.extras, spec.settings.capacity, _OWN if spec.name == ITEM else {},
                rows,
            )
            for spec in table_specs(features)
        }  # fmt: skip
        self.users, self.items, self.categories = (self.tables[name] for name in (USER, ITEM, CATEGORY))
        self.cards = Catalogue(features.items)
        self.ranker = Ranker(features.dim, ranker, extra_heads).eval().requires_grad_(False)
        self._shapes = {name: w.shape for name, w in self.ranker.weights().items()}
        self.changes = 0
        self.linked = 0  # the last of them with which a category, a seller or a word came or went

    def check(self, version: Version) -> dict[int, Card]:
        """Raises CorruptRecord unless the whole version can be applied; its decoded cards. Changes nothing."""
        for name, rows in version.tables.items():
            if name not in self.tables:
                raise CorruptRecord(f"a version holds a table {name!r} that is not known here: update this replica")
            self.tables[name].check(rows)
        for name, gone in version.gone.items():
            if gone.dtype != np.int64 or gone.ndim != 1:
                raise CorruptRecord(f"a version's ids gone from {name!r} are {gone.dtype} {gone.shape}, not int64 [n]")
        if version.dense or version.base is None:
            dense = self._dense(version)
            if {name: w.shape for name, w in dense.items()} != self._shapes:
                raise CorruptRecord(
                    "a version's dense weights have other names or shapes than this replica's: run the trainer and the "
                    "replicas with the same settings"
                )
            if not all(np.isfinite(w).all() for w in dense.values()):
                raise CorruptRecord("a version holds dense weights that are not finite: roll the trainer back")
        return read_cards(version.blobs.get(CARD, {}))

    def change(self, version: Version, cards: dict[int, Card]) -> None:
        """Apply a version that `check` has passed, with the cards it returned."""
        self.changes += 1
        if version.dense:
            self.ranker.load_weights(self._dense(version))
        known = [self.tables[name].members for name in _LINKED]
        touched = []
        for name in self.tables.keys() & version.gone.keys():
            rows = self.tables[name].remove(version.gone[name])
            touched += [rows] if name == ITEM else []
        for name, put in version.tables.items():
            rows = self.tables[name].put(put)
            touched += [rows] if name == ITEM else []
        gone = version.gone.get(CARD, np.empty(0, np.int64))
        self.cards.remove(gone)
        self.cards.put(cards)
        touched += [self.items.find(gone), self.items.find(np.fromiter(cards, np.int64, len(cards)))]
        anew = [self.tables[name].members for name in _LINKED] != known
        if anew:
            touched.append(self._relink(np.arange(1, self.items.end)))
            self.linked = self.changes
        rows = np.concatenate(touched)
        if len(rows) >= self.items.end:  # as of a snapshot, by their rows and by their cards: all, in an order
            rows = np.arange(1, self.items.end)
        self._link(rows, linked=anew)

    def vectors(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(the item's weights, its content), float32 [n, D] each, of item rows int64 [n]; the sum is its vector."""
        columns = self.items.columns
        content = self.categories.gather(columns[CATEGORY_ROW][rows])
        content += self.tables[SELLER].gather(columns[SELLER_ROW][rows])
        if len(self.tables[WORD]):
            content += self.mean_of_words(columns[WORD_ROWS][rows])
        return self.items.gather(rows), content

    def mean_of_words(self, rows: np.ndarray) -> torch.Tensor:
        """The mean of the words that have a row, float32 [n, D], of rows int64 [n, words]; zero where none has."""
        words = self.tables[WORD].gather(rows.reshape(-1))
        words = words.view(*rows.shape, words.shape[1])
        count = torch.from_numpy((rows != 0).sum(1, keepdims=True).astype(np.float32))
        return words.sum(1) / count.clamp(min=1)

    def numbers(self, rows: np.ndarray, now_ms: int) -> np.ndarray:
        """The numbers of item rows int64 [n] at `now_ms` that hang on no user: float32 [n, NUMBERS - MATCHES]."""
        columns = self.items.columns
        rows_of = {ITEM: rows, CATEGORY: columns[CATEGORY_ROW][rows], SELLER: columns[SELLER_ROW][rows]}
        rate = self.ranker.click_rate()
        return item_numbers(lambda table, name: self.tables[table].columns[name][rows_of[table]], now_ms, rate)

    def similar(self, past: np.ndarray, ids: np.ndarray, now_ms: int) -> np.ndarray:
        """What a history int64 [1, HISTORY] says at `now_ms` of items `ids` int64 [n]: float32 [n] (neighbours.py)."""
        if not self.ranker.settings.neighbours:
            return np.zeros(len(ids), np.float32)

        def lists(distinct: np.ndarray) -> Lists:
            rows = self.items.find(distinct)
            return lists_of(distinct, lambda name: self.items.columns[name][rows], now_ms)

        similarity, column = similar(past, ids, lists)
        return similarity[0, column]

    def slots(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Slots int64 [n] of the cards of items: ids int64 [n], their rows int64 [n]."""
        slots, without = self.items.columns[SLOT][rows].astype(np.int64), rows == 0
        if without.any():
            slots[without] = self.cards.find(ids[without])
        return slots

    def ids(self, rows: np.ndarray) -> list[np.ndarray]:
        """Ids of item, category and seller, int64 [n] each, of item rows int64 [n]: what `matches` compares."""
        columns = self.items.columns
        return [self.items.ids_of(rows), columns["category"][rows], columns["seller"][rows]]

    def _link(self, rows: np.ndarray, linked: bool) -> None:
        """Bring the replica's own columns of these item rows up to date. linked: the rows that they refer to are."""
        rows = rows[rows > 0]
        if not linked:
            self._relink(rows)
        columns = self.items.columns
        columns[SLOT][rows] = self.cards.find(self.items.ids_of(rows))
        columns[AVAILABLE][rows] = self.cards.available[columns[SLOT][rows]]
        columns[STAMP][rows] = self.changes

    def _relink(self, rows: np.ndarray) -> np.ndarray:
        """Find the rows that item rows int64 [n] refer to; those of them that refer to others than before."""
        columns, moved = self.items.columns, np.zeros(len(rows), bool)
        for table, column in _LINKED.items():
            ids = columns[_IDS[table]][rows]
            found = self.tables[table].find(ids.reshape(-1)).reshape(ids.shape)
            moved |= np.any(found != columns[column][rows], axis=tuple(range(1, found.ndim)))
            columns[column][rows] = found
        return rows[moved]

    def _dense(self, version: Version) -> dict[str, np.ndarray]:
        """The ranker's weights in a version: a snapshot also holds what only the trainer needs."""
        return {name: w for name, w in version.dense.items() if name in self._shapes}
