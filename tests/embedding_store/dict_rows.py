"""The row map again, plainly: what the fast one is held to."""

from __future__ import annotations

import numpy as np


class DictRowMap:
    """`RowMap`'s answers and row numbers, from a dict."""

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
