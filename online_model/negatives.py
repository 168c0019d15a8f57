"""Negatives for logs without impressions: recently active items, drawn by a hash, so that a replay draws the same."""

from __future__ import annotations

import numpy as np

from online_model.features import mix


class RecentItems:
    """The last `capacity` distinct items that became active, oldest out first; an item inside stays where it is.

    >>> ring = RecentItems(4)
    >>> ring.push(np.array([7, 8, 7, 9])); ring.items().tolist()
    [7, 8, 9]
    """

    def __init__(self, capacity: int) -> None:
        self._ring = np.zeros(capacity, np.int64)
        self._known = np.empty(0, np.int64)  # the same, sorted
        self._pushed = 0

    def __len__(self) -> int:
        return min(self._pushed, len(self._ring))

    def items(self) -> np.ndarray:
        """Its items in the order of their slots, int64 [len]."""
        return self._ring[: len(self)]

    def push(self, items: np.ndarray) -> None:
        """Adds items int64 [n] in their order; at most the last `capacity` new ones stay."""
        unique, first = np.unique(items, return_index=True)
        if len(self._known):
            at = np.minimum(np.searchsorted(self._known, unique), len(self._known) - 1)
            first = first[self._known[at] != unique]
        if not len(first):
            return
        new = items[np.sort(first)][-len(self._ring) :]
        self._ring[(self._pushed + np.arange(len(new))) % len(self._ring)] = new
        self._pushed += len(new)
        self._known = np.sort(self.items())

    def draw(self, row_ids: np.ndarray, positives: np.ndarray, k: int, seed: int) -> np.ndarray:
        """k negatives for each row, int64 [n, k]: a function of what is inside, the row's id and the seed.

        row_ids, positives: int64 [n]. A row's own positive is never drawn: the item after it is. [n, 0] as long as
        fewer than two items are known.
        """
        size = len(self)
        if size < 2 or not len(row_ids):
            return np.empty((len(row_ids), 0), np.int64)
        offsets = mix(np.arange(1, k + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(k))
        slots = (mix(row_ids.astype(np.uint64)[:, None] ^ offsets[None, :]) % np.uint64(size)).astype(np.int64)
        drawn = self._ring[slots]
        return np.where(drawn == positives[:, None], self._ring[(slots + 1) % size], drawn)

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays (copies)."""
        return {"ring": self._ring.copy(), "pushed": np.array([self._pushed], np.int64)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave. Another capacity keeps the newest items."""
        ring, pushed = state["ring"], int(state["pushed"][0])
        size = min(pushed, len(ring))
        if len(ring) == len(self._ring):
            self._ring[:], self._pushed = ring, pushed
        else:
            ordered = ring[(pushed - size + np.arange(size)) % len(ring)][-len(self._ring) :]
            self._ring[: len(ordered)], self._pushed = ordered, len(ordered)
        self._known = np.sort(self.items())
