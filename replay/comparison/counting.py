"""Baselines that count: popularity, and item-to-item neighbours. Vectorised, in memory that does not grow.

Counts are kept in a count-min sketch (Cormode and Muthukrishnan 2005) with exponential decay in event time: a count is
never too small, and too large only where a key shares all of its cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedding_store.ids import combine_all
from online_model.batch import Candidates
from online_model.catalogue import CatalogueItem
from online_model.examples import Part
from online_model.features import CLICK_PRIOR, mix
from online_model.history import HISTORY, RECENT, entry_items
from online_model.neighbours import near
from replay.comparison.stream import Batch, Stream

DAY_MS = 86_400_000
DEPTH = 2  # cells of a key
_ALL = 0  # the key of all items together: no item's id
_MOST = 64.0  # halvings between two rescalings: what was counted before them is no longer seen in a float32


class DecayedCounts:
    """Counts of int64 keys that halve every `half_life_ms` of event time; 2^bits cells, DEPTH of them a key.

    >>> counts = DecayedCounts(bits=10, half_life_ms=1000)
    >>> counts.add(np.array([7, 7, 8]), np.array([0, 0, 0]))
    >>> counts.get(np.array([7, 8, 9]), 1000).tolist()
    [1.0, 0.5, 0.0]
    """

    def __init__(self, bits: int, half_life_ms: float) -> None:
        self._cells = np.zeros((DEPTH, 1 << bits), np.float32)
        self._bits, self._half_life_ms = bits, half_life_ms
        self._origin_ms: int | None = None  # a count of then stands in the cells as it is

    @property
    def nbytes(self) -> int:
        """Of all cells."""
        return self._cells.nbytes

    def add(self, keys: np.ndarray, ts: np.ndarray, amount: np.ndarray | float = 1.0) -> None:
        """Adds `amount` [n] to keys int64 [n], at `ts` int64 [n] ms."""
        if not len(keys):
            return
        if self._origin_ms is None:
            self._origin_ms = int(ts.min())
        newest = (int(ts.max()) - self._origin_ms) / self._half_life_ms
        if newest > _MOST:
            self._cells *= np.float32(2.0**-newest)
            self._origin_ms = int(ts.max())
        grown = amount * np.exp2((ts - self._origin_ms) / self._half_life_ms)
        for cells, at in zip(self._cells, self._places(keys), strict=True):
            np.add.at(cells, at, grown.astype(np.float32))

    def get(self, keys: np.ndarray, ts: np.ndarray | int) -> np.ndarray:
        """The counts of keys int64 [...] as of `ts` (ms, one for all or broadcastable), float64 [...]."""
        if self._origin_ms is None:
            return np.zeros(keys.shape)
        flat = self._places(keys.ravel())
        least = np.min([cells[at] for cells, at in zip(self._cells, flat, strict=True)], axis=0)
        return least.reshape(keys.shape) * np.exp2((self._origin_ms - np.asarray(ts)) / self._half_life_ms)

    def _places(self, keys: np.ndarray) -> np.ndarray:
        """The cells of each key, [DEPTH, n]."""
        shift = np.uint64(64 - self._bits)
        return np.stack([mix(keys ^ np.int64(salt)) >> shift for salt in range(1, DEPTH + 1)]).astype(np.int64)


class Popularity:
    """How often an item was clicked of late; with impressions, what share of its impressions was.

    The rate is smoothed by the rate of all items, which weighs as much as PRIOR impressions.
    """

    HALF_LIFE_MS, PRIOR, BITS = 7 * DAY_MS, 20.0, 20

    def __init__(self, stream: Stream) -> None:
        self.probabilistic = not stream.implicit
        self._clicks = DecayedCounts(self.BITS, self.HALF_LIFE_MS)
        self._shown = DecayedCounts(self.BITS, self.HALF_LIFE_MS)

    @property
    def nbytes(self) -> int:
        return self._clicks.nbytes + self._shown.nbytes

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        """Nothing of it is used."""

    def score(self, candidates: Candidates) -> np.ndarray:
        ts = candidates.ts
        clicks = self._clicks.get(candidates.item, ts)
        if not self.probabilistic:
            return clicks
        every = np.full(len(ts), _ALL)
        base = (self._clicks.get(every, ts) + CLICK_PRIOR) / (self._shown.get(every, ts) + 1)
        return np.minimum((clicks + base * self.PRIOR) / (self._shown.get(candidates.item, ts) + self.PRIOR), 1.0)

    def learn(self, batch: Batch) -> None:
        rows = batch.rows
        for counts, which in ((self._clicks, rows.click == 1), (self._shown, (rows.part == Part.SHOWN))):
            items, ts = rows.item[which], rows.ts[which]
            counts.add(items, ts)
            counts.add(np.full(len(items), _ALL), ts)


class ItemKnn:
    """Item-to-item neighbours by cosine of co-occurrence, kept up to date click by click.

    A click of c by somebody whose recent items are H counts as a co-occurrence of c with each of H, the more the nearer
    (NEAR to the power of the place). A candidate's score is the sum of its similarities to the user's recent items,
    weighed in the same way: item-based kNN as in Ludewig and Jannach 2018, "Evaluation of session-based recommendation
    algorithms", section 3.1, over the last items in place of a session. An item is its own neighbour by how often its
    clicks are repeats, so a log in which people come back to what they know is known as such. Items without a
    neighbour are told apart by popularity.
    """

    HALF_LIFE_MS, NEAR, SHRINK, BITS = 30 * DAY_MS, 0.8, 10.0, 22
    FALLBACK = 1e-4  # of a score, at most: what popularity counts
    probabilistic = False

    def __init__(self, stream: Stream) -> None:
        self._pairs = DecayedCounts(self.BITS, self.HALF_LIFE_MS)
        self._clicks = DecayedCounts(20, self.HALF_LIFE_MS)
        self._popular = Popularity(stream)
        place = np.concatenate((np.arange(RECENT), np.arange(HISTORY - RECENT)))
        self._near = self.NEAR ** place.astype(np.float64)

    @property
    def nbytes(self) -> int:
        return self._pairs.nbytes + self._clicks.nbytes + self._popular.nbytes

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        """Nothing of it is used."""

    def score(self, candidates: Candidates) -> np.ndarray:
        popular = self._popular.score(candidates)
        total = self.FALLBACK * popular / (1 + popular)
        recent = recent_items(candidates.history)
        ts = candidates.moment
        mine = self._clicks.get(recent, ts[:, None])
        own = self._clicks.get(candidates.item, candidates.ts)
        for place in range(HISTORY):  # one at a time: N by HISTORY numbers need not be in memory at once
            past = recent[candidates.ctx, place]
            there = np.flatnonzero(past != 0)
            pairs = self._pairs.get(_pair(candidates.item[there], past[there]), candidates.ts[there])
            norm = np.sqrt(own[there] * mine[candidates.ctx[there], place]) + self.SHRINK
            total[there] += self._near[place] * pairs / norm
        return total

    def learn(self, batch: Batch) -> None:
        rows = batch.rows
        rows = rows.take(rows.click == 1)
        recent = recent_items(rows.history)
        at, place = np.nonzero(recent)
        self._pairs.add(_pair(rows.item[at], recent[at, place]), rows.ts[at], self._near[place])
        self._clicks.add(rows.item, rows.ts)
        self._popular.learn(batch)


def recent_items(history: np.ndarray) -> np.ndarray:
    """States uint8 [B, HISTORY_BYTES] → ids int64 [B, HISTORY], the recent ones and then those of intent, newest first,
    each at its first place only; 0: none."""
    items = entry_items(history)
    return np.where(near(items) > 0, items, 0)


def _pair(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One key for both orders."""
    return combine_all(np.minimum(one, other), np.maximum(one, other))
