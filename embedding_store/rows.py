"""Which row an id lives in: a hash map on numpy arrays, looked up and changed in whole batches.

Rows are 1 … capacity. Row 0 is the default row: the answer for id 0 (padding) and for every id that has none.
The row that an id gets follows from the calls alone, so two runs of the same log number their rows alike.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

_MULTIPLY = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(30), np.uint64(27), np.uint64(31)
_ODD, _HIGH = np.uint64(1), np.uint64(40)


class Map(Protocol):
    """What both maps here promise. ids: int64 [n], any value, may repeat; id 0 never has a row."""

    capacity: int

    def __len__(self) -> int:
        """How many ids have a row."""

    @property
    def free(self) -> int:
        """How many more ids can be admitted."""

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The rows of `ids`, int64 [n], 0 where there is none. Changes nothing."""

    def admit(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows of `ids` int64 [n], those ids that are new int64 [k], ascending).

        New ids get rows in ascending order; when the map is full the largest of them go without (row 0).
        """

    def remove(self, ids: np.ndarray) -> np.ndarray:
        """Frees the rows of `ids` and returns them, int64 [k], in ascending order of their ids."""

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """The ids in `rows`, int64 [n]; 0 for row 0 and for free rows."""


class RowMap:
    """The fast map (see `Map`): open addressing with double hashing, at most half full, 40 to 75 bytes an id.

    A slot is a pair (id, row). An empty slot is (0, 0); a removed id leaves (id, 0) behind: it still leads a search
    past it, answers 0 itself, and is taken over by the next id that comes by. When too many of them are left
    the slots are built anew (about 0.2 µs an id). Ids are mixed by a bijection (splitmix64's finaliser, Steele et al.,
    OOPSLA 2014), so ids that share their low bits, or any other bits, spread like others.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ids = np.zeros(capacity + 1, np.int64)  # by row, 0 = free
        self._free = np.arange(capacity, 0, -1, dtype=np.int64)  # a stack: the next free row is the last of them
        self._n_free = capacity
        self._rebuild()

    def __len__(self) -> int:
        return self.capacity - self._n_free

    @property
    def free(self) -> int:
        return self._n_free

    def find(self, ids: np.ndarray) -> np.ndarray:
        return self._slots[self._search(ids) * 2 + 1]

    def admit(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.find(ids)
        absent = np.flatnonzero((rows == 0) & (ids != 0))
        if absent.size == 0:
            return rows, np.empty(0, np.int64)
        wanted, which = np.unique(ids[absent], return_inverse=True)
        new = wanted[: self._n_free]
        new_rows = np.zeros(len(wanted), np.int64)
        new_rows[: len(new)] = self._free[self._n_free - len(new) : self._n_free][::-1]
        self._n_free -= len(new)
        self._ids[new_rows[: len(new)]] = new
        self._insert(new, new_rows[: len(new)])
        rows[absent] = new_rows[which]
        return rows, new

    def remove(self, ids: np.ndarray) -> np.ndarray:
        ids = np.unique(ids)
        slots = self._search(ids) * 2 + 1
        rows = self._slots[slots]
        slots, rows = slots[rows != 0], rows[rows != 0]
        self._slots[slots] = 0
        self._ids[rows] = 0
        self._free[self._n_free : self._n_free + len(rows)] = rows
        self._n_free += len(rows)
        return rows

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        return self._ids[rows]

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` ids; the rows that were given stay. A smaller capacity changes nothing."""
        more = capacity - self.capacity
        if more <= 0:
            return
        new_rows = np.arange(capacity, self.capacity, -1, dtype=np.int64)
        free = np.concatenate([new_rows, self._free[: self._n_free]])  # the rows freed before are given first
        self._free = np.concatenate([free, np.zeros(capacity - len(free), np.int64)])
        self._n_free += more
        self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
        self.capacity = capacity
        self._rebuild()

    def _search(self, ids: np.ndarray) -> np.ndarray:
        """The slot of each id, int64 [n]; where it has none, an empty slot. Both hold the row that it has."""
        mixed = _mix(ids)
        slot = (mixed & self._mask).view(np.int64)
        key = self._slots[slot * 2]
        left = np.flatnonzero((key != ids) & (key != 0))
        if left.size == 0:
            return slot
        ids, at, step = ids[left], slot[left], self._step(mixed[left])
        while True:
            at = (at + step) & self._mask.view(np.int64)
            key = self._slots[at * 2]
            further = np.flatnonzero((key != ids) & (key != 0))
            slot[left] = at
            if further.size == 0:
                return slot
            left, ids, at, step = left[further], ids[further], at[further], step[further]

    def _insert(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Puts distinct ids that are not in the map into the first slot of each search that no living id holds."""
        if self._used + len(ids) > self._limit:
            self._rebuild()  # it takes the new ids along: they are in `_ids` already
            return
        mixed = _mix(ids)
        at, step = (mixed & self._mask).view(np.int64), self._step(mixed)
        while ids.size:
            can = np.flatnonzero(self._slots[at * 2 + 1] == 0)
            slot = at[can] * 2
            empty = self._slots[slot] == 0
            self._slots[slot] = ids[can]  # of those that want the same slot one gets it
            won = self._slots[slot] == ids[can]
            self._slots[slot[won] + 1] = rows[can[won]]
            self._used += int(np.count_nonzero(empty & won))
            rest = np.ones(len(ids), bool)
            rest[can[won]] = False
            ids, rows, step = ids[rest], rows[rest], step[rest]
            at = (at[rest] + step) & self._mask.view(np.int64)

    def _rebuild(self) -> None:
        """New slots without what removed ids left behind."""
        size = 1 << max(3, (2 * self.capacity - 1).bit_length())
        self._slots = np.zeros(2 * size, np.int64)  # id and row side by side: one cache miss for both
        self._mask = np.uint64(size - 1)
        self._limit = size * 3 // 4
        self._used = 0  # slots that are not empty
        rows = np.flatnonzero(self._ids)
        self._insert(self._ids[rows], rows)

    def _step(self, mixed: np.ndarray) -> np.ndarray:
        """How far a search goes from slot to slot: odd, so that it comes by all of them."""
        return ((mixed >> _HIGH) | _ODD).view(np.int64)


def _mix(ids: np.ndarray) -> np.ndarray:
    """A bijection of int64 [n] to uint64 [n] in which every bit depends on all bits."""
    x = ids.astype(np.uint64)
    x ^= x >> _SHIFT[0]
    x *= _MULTIPLY[0]
    x ^= x >> _SHIFT[1]
    x *= _MULTIPLY[1]
    x ^= x >> _SHIFT[2]
    return x


class DictRowMap:
    """The plain reference of `RowMap`: the same answers, the same row numbers, from a dict."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._row: dict[int, int] = {}
        self._id: dict[int, int] = {}
        self._stack = list(range(capacity, 0, -1))

    def __len__(self) -> int:
        return len(self._row)

    @property
    def free(self) -> int:
        return len(self._stack)

    def find(self, ids: np.ndarray) -> np.ndarray:
        return np.array([self._row.get(i, 0) for i in ids.tolist()], np.int64)

    def admit(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        new = sorted(set(ids.tolist()) - set(self._row) - {0})[: self.free]
        for i in new:
            self._row[i] = self._stack.pop()
            self._id[self._row[i]] = i
        return self.find(ids), np.array(new, np.int64)

    def remove(self, ids: np.ndarray) -> np.ndarray:
        rows = [self._row.pop(i) for i in sorted(set(ids.tolist()) & set(self._row))]
        for row in rows:
            del self._id[row]
        self._stack += rows
        return np.array(rows, np.int64)

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self._id.get(r, 0) for r in rows.tolist()], np.int64)

    def grow(self, capacity: int) -> None:
        if capacity > self.capacity:
            self._stack = list(range(capacity, self.capacity, -1)) + self._stack
            self.capacity = capacity
