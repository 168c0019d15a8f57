"""Which row an id lives in: a hash map, looked up and changed in whole batches.

Rows are 1 … capacity. Row 0 is the default row: the answer for id 0 (padding) and for every id that has none.
The row that an id gets follows from the calls alone, so two runs of the same log number their rows alike.
"""

from __future__ import annotations

import numpy as np

from embedding_store import probing


class RowMap:
    """Open addressing, at most half full, in compiled loops (`probing`). 48 to 80 bytes an id.

    ids: int64 [n], any value, may repeat; id 0 never has a row. They may be hostile: how long a search is
    hangs on random words of this map alone, which change no answer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ids = np.zeros(capacity + 1, np.int64)  # by row, 0 = free
        self._free = np.arange(capacity, 0, -1, dtype=np.int64)  # a stack: the next free row is the last of them
        self._n_free = capacity
        entropy = np.random.default_rng()  # the system's
        self._tables = entropy.integers(0, 1 << 64, probing.TABLES, np.uint64)
        self._rebuild()

    def __len__(self) -> int:
        """How many ids have a row."""
        return self.capacity - self._n_free

    @property
    def free(self) -> int:
        """How many more ids can be admitted."""
        return self._n_free

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._ids.nbytes + self._free.nbytes + self._slots.nbytes

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The rows of `ids`, int64 [n], 0 where there is none. Changes nothing."""
        return self._find(ids)[0]

    def admit(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows of `ids` int64 [n], those ids that are new int64 [k], ascending).

        New ids get rows in ascending order; when the map is full the largest of them go without (row 0).
        """
        rows, absent = self._find(ids)
        if not absent:
            return rows, np.empty(0, np.int64)
        missing = np.flatnonzero(rows == 0)
        wanted = ids[missing]
        new = _distinct(wanted)[: self._n_free]
        new_rows = self._free[self._n_free - len(new) : self._n_free][::-1].copy()
        self._n_free -= len(new)
        self._ids[new_rows] = new
        probing.insert(new, new_rows, self._slots, self._tables, self._mask)
        rows[missing] = self.find(wanted)
        return rows, new

    def remove(self, ids: np.ndarray) -> np.ndarray:
        """Frees the rows of `ids` and returns them, int64 [k], in ascending order of their ids."""
        ids = _distinct(ids)
        rows = np.empty(len(ids), np.int64)
        probing.remove(ids, self._slots, self._tables, self._mask, rows)
        rows = rows[rows != 0]
        self._ids[rows] = 0
        self._free[self._n_free : self._n_free + len(rows)] = rows
        self._n_free += len(rows)
        return rows

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """The ids in `rows`, int64 [n]; 0 for row 0 and for free rows."""
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

    def _find(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """(the rows of `ids`, how many are 0)."""
        ids = np.ascontiguousarray(ids, np.int64)
        rows = np.empty(len(ids), np.int64)
        return rows, probing.find(ids, self._slots, self._tables, self._mask, rows)

    def _rebuild(self) -> None:
        size = 1 << max(3, (2 * self.capacity - 1).bit_length())
        self._slots = np.zeros(2 * size, np.int64)  # id and row side by side: one cache miss for both
        self._mask = size - 1
        rows = np.flatnonzero(self._ids)
        probing.insert(self._ids[rows], rows, self._slots, self._tables, self._mask)


def _distinct(ids: np.ndarray) -> np.ndarray:
    """The ids int64 [n] but 0, ascending, each once. (numpy's `unique` is slower: it hashes.)"""
    ids = np.sort(np.asarray(ids, np.int64))
    keep = ids != 0
    keep[1:] &= ids[1:] != ids[:-1]
    return ids[keep]
