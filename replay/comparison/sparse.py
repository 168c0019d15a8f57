"""The features of the peers: what one would give a linear model or a factorization machine, all from before the event.

A candidate is a set of ids, one a field: user, item, category, seller, scenario, what was searched for, hour of the
day, place on the page (if it was shown), the user's last items, how often the item was clicked so far (by powers of
two), and whether the user did something with it of late. Crosses are for those that make none themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from embedding_store.ids import combine_all
from online_model.batch import Candidates
from online_model.catalogue import CatalogueItem
from online_model.history import HISTORY
from replay.comparison.counting import DAY_MS, DecayedCounts, recent_items
from replay.comparison.stream import Batch

LAST = 3  # of the user's last items, so many are features
HOUR_MS = 3_600_000
BITS = 22  # of a feature's id: more than so many features share weights
CROSSED = (
    "user item", "user category", "item last0", "item last1", "item last2", "category last_category", "item scenario",
    "item query", "category query", "user seller",
)  # fmt: skip


class Fields:
    """Makes the ids. It learns what items are and how often they were clicked, and nothing else."""

    def __init__(self) -> None:
        self._items = np.empty(0, np.int64)  # sorted
        self._about = np.empty((0, 2), np.int64)  # category, seller of each
        self._clicks = DecayedCounts(20, 1e6 * DAY_MS)  # they do not decay

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        """Their categories and sellers, from now on."""
        if items:
            new = np.array([(item[0], item[2], item[3]) for item in items], np.int64)[::-1]
            every = np.concatenate((new[:, 0], self._items))
            self._items, first = np.unique(every, return_index=True)  # of several the last record holds
            self._about = np.concatenate((new[:, 1:], self._about))[first]

    def learn(self, batch: Batch) -> None:
        """The clicks of a batch."""
        clicked = batch.rows.click == 1
        self._clicks.add(batch.rows.item[clicked], batch.rows.ts[clicked])

    def of(self, c: Candidates) -> dict[str, np.ndarray]:
        """Field → ids int64 [N]; 0: there is none."""
        recent = recent_items(c.history)
        last = recent[:, :LAST]
        repeats = sum((recent[c.ctx, place] == c.item for place in range(HISTORY)), np.zeros(len(c.item), np.int64))
        clicks = self._clicks.get(c.item, c.ts)
        category, seller = self._known(c.item).T
        query = reduce(combine_all, c.query.T)
        return {
            "user": c.user[c.ctx], "item": c.item, "category": category, "seller": seller,
            "scenario": c.scenario[c.ctx] + 1, "query": np.where(c.query.any(1), query, 0)[c.ctx],
            "hour": c.ts // HOUR_MS % 24 + 1, "position": c.position + 1,
            "clicks": np.floor(np.log2(1 + np.rint(clicks))).astype(np.int64) + 1,
            "repeats": np.minimum(repeats, 1), **{f"last{n}": last[c.ctx, n] for n in range(LAST)},
            "last_category": self._known(last[:, 0])[c.ctx, 0],
        }  # fmt: skip

    def _known(self, items: np.ndarray) -> np.ndarray:
        """int64 [n, 2] category and seller, 0 where the catalogue has none."""
        if not len(self._items):
            return np.zeros((len(items), 2), np.int64)
        at = np.minimum(np.searchsorted(self._items, items), len(self._items) - 1)
        return np.where((self._items[at] == items)[:, None], self._about[at], 0)


def hashed(fields: dict[str, np.ndarray], crossed: bool) -> list[list[int]]:
    """The features of each candidate as ids below 2^BITS, those that are there; with `crossed` the CROSSED ones too."""
    columns, there = [], []
    names = [(name,) for name in fields] + [tuple(cross.split()) for cross in CROSSED if crossed]
    for number, name in enumerate(names):
        parts = [fields[part] for part in name]
        mixed = reduce(combine_all, parts, np.full(len(parts[0]), number + 1, np.int64))
        columns.append((mixed.view(np.uint64) >> np.uint64(64 - BITS)).astype(np.int64))
        there.append(np.all([part != 0 for part in parts], axis=0))
    ids, kept = np.stack(columns, 1), np.stack(there, 1)
    if kept.all():
        return ids.tolist()
    ends = np.cumsum(kept.sum(1))
    flat = ids[kept].tolist()
    return [flat[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
