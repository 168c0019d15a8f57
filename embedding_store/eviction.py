"""Which rows leave memory first when a table is full. They stay in the store, so this changes no answer, only its cost.

What is kept here is of rows in memory only: a row that comes back begins anew, as after a restart.
"""

from __future__ import annotations

import numpy as np

from embedding_store.specs import RowRules

_COUNT_SHIFT = np.int64(40)  # a rank of `Lfu` holds the tick below it
_MOST = np.int64((1 << 22) - 1)  # uses that still count: more would not fit above it


class Lru:
    """The longest unused first. rows: int64 [n], may repeat; tick: rises by one a step."""

    def __init__(self, capacity: int) -> None:
        self.last = np.zeros(capacity + 1, np.int64)  # the tick of a row's last use

    def use(self, rows: np.ndarray, tick: int) -> None:
        """Rows are looked up, once a call however often they are in it."""
        self.last[rows] = tick

    def enter(self, rows: np.ndarray, tick: int) -> None:
        """Rows hold other ids from now on."""
        self.last[rows] = tick

    def rank(self, rows: np.ndarray, tick: int) -> np.ndarray:
        """[n]: the lower, the sooner it goes."""
        return self.last[rows]


class Lfu(Lru):
    """The least often used first, of equals the longest unused."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._count = np.zeros(capacity + 1, np.int64)

    def use(self, rows: np.ndarray, tick: int) -> None:
        super().use(rows, tick)
        self._count[rows] += 1

    def enter(self, rows: np.ndarray, tick: int) -> None:
        super().enter(rows, tick)
        self._count[rows] = 1

    def rank(self, rows: np.ndarray, tick: int) -> np.ndarray:
        return (np.minimum(self._count[rows], _MOST) << _COUNT_SHIFT) + self.last[rows]


class Decayed(Lru):
    """The lowest score first: a use counts 1, and half as much `half_life` steps later."""

    def __init__(self, capacity: int, half_life: int) -> None:
        super().__init__(capacity)
        self._half_life = half_life
        self._score = np.zeros(capacity + 1)  # as of the row's last use

    def use(self, rows: np.ndarray, tick: int) -> None:
        self._score[rows] = self.rank(rows, tick) + 1
        super().use(rows, tick)

    def enter(self, rows: np.ndarray, tick: int) -> None:
        super().enter(rows, tick)
        self._score[rows] = 1

    def rank(self, rows: np.ndarray, tick: int) -> np.ndarray:
        return self._score[rows] * np.exp2((self.last[rows] - tick) / self._half_life)


def policy(rules: RowRules, capacity: int) -> Lru:
    """What `rules.evict` names."""
    if rules.evict == "lru":
        return Lru(capacity)
    return Lfu(capacity) if rules.evict == "lfu" else Decayed(capacity, rules.evict_half_life)


def lowest(rank: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` (1 … n) lowest of `rank` [n] are, int64 [count] ascending; of equals the first."""
    border = np.partition(rank, count - 1)[count - 1]
    below = np.flatnonzero(rank < border)
    return np.sort(np.concatenate((below, np.flatnonzero(rank == border)[: count - len(below)])))
