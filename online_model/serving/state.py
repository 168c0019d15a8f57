"""What a replica holds of the model: tables, cards and dense weights, changed by whole versions only."""

from __future__ import annotations

import numpy as np
import torch

from embedding_store.delta import Version
from embedding_store.errors import CorruptRecord
from online_model.features import CARD, CATEGORY, ITEM, ITEM_EXTRAS, USER, USER_EXTRAS, item_features
from online_model.ranker import Ranker
from online_model.serving.catalogue import Card, Catalogue, read_cards
from online_model.serving.table import Table
from online_model.settings import FeatureSettings, RankerSettings

# What the replica adds to an item's row, so that a request need not look it up.
CATEGORY_ROW, AVAILABLE, STAMP = "category_row", "available", "stamp"
_OWN = {CATEGORY_ROW: ("<i8", ()), AVAILABLE: ("?", ()), STAMP: ("<i8", ())}


class State:
    """The model as of one version. `changes` counts the versions; an item row's STAMP is the last that touched it."""

    def __init__(self, features: FeatureSettings, ranker: RankerSettings, extra_heads: int = 0) -> None:
        dim = features.dim
        self.users = Table(USER, dim, USER_EXTRAS, features.users)
        self.items = Table(ITEM, dim, ITEM_EXTRAS, features.items, own=_OWN)
        self.categories = Table(CATEGORY, dim, {}, features.categories)
        self.tables = {table.name: table for table in (self.users, self.items, self.categories)}
        self.cards = Catalogue(features.items)
        self.ranker = Ranker(dim, ranker, extra_heads).eval().requires_grad_(False)
        self._parameters = dict(self.ranker.named_parameters())
        self.changes = 0

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
            if {name: w.shape for name, w in dense.items()} != {n: tuple(p.shape) for n, p in self._parameters.items()}:
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
        known_categories = self.categories.members
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
        if self.categories.members != known_categories:
            touched.append(np.arange(self.items.end))
        self._link(np.concatenate(touched))

    def vectors(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The item's and its category's weights, float32 [n, D] each, of item rows int64 [n]; the sum is its vector."""
        category = self.items.columns[CATEGORY_ROW][rows]
        return self.items.gather(rows), self.categories.gather(category)

    def dense_features(self, rows: np.ndarray, now_ms: int) -> np.ndarray:
        """`item_features` float32 [n, DENSE] of item rows int64 [n] at `now_ms`."""
        columns = self.items.columns
        return item_features(
            columns["impressions"][rows], columns["clicks"][rows], columns["interactions"][rows],
            columns["created"][rows], now_ms,
        )  # fmt: skip

    def _link(self, rows: np.ndarray) -> None:
        """Bring the replica's own columns of these item rows up to date."""
        rows = rows[rows > 0]
        columns = self.items.columns
        columns[CATEGORY_ROW][rows] = self.categories.find(columns["category"][rows])
        columns[AVAILABLE][rows] = self.cards.are_available(self.items.ids_of(rows))
        columns[STAMP][rows] = self.changes

    def _dense(self, version: Version) -> dict[str, np.ndarray]:
        """The ranker's weights in a version: a snapshot also holds what only the trainer needs."""
        return {name: w for name, w in version.dense.items() if name in self._parameters}
