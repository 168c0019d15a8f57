"""When the rows of a table were last learned, and which have not been for too long.

Rows that are only in the store are found by notes: the store keeps, for each row, its id under the grain of event time
in which it was last learned. There is exactly one note a row, written and taken out in the commits that change the row,
so which rows expire, and when, does not hang on when commits or evictions happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRAIN_MS = 1 << 20  # 17.5 minutes: a row that is learned all the time is noted anew so often


@dataclass
class Notes:
    """What changes of a table's notes: each row of a table that has TOUCHED is noted under a time."""

    old_ids: np.ndarray  # int64 [n] whose note goes …
    old_times: np.ndarray  # int64 [n] … ms, that it stands under
    ids: np.ndarray  # int64 [m]
    times: np.ndarray  # int64 [m] ms, not negative


def all_notes(parts: Sequence[Notes]) -> Notes:
    """Those of at least one part."""
    columns = zip(*((n.old_ids, n.old_times, n.ids, n.times) for n in parts), strict=True)
    return Notes(*map(np.concatenate, columns))


class Calendar:
    """Of one table. Rows expire in sweeps, each time that `now - after` enters another grain of event time.

    So a row goes when it was not learned for `after_ms`, and up to GRAIN_MS more.
    """

    def __init__(self, after_ms: int, touched: np.ndarray) -> None:
        """touched: int64 [capacity + 1], the table's own column of event times, by row."""
        self._after, self._touched = after_ms, touched
        self._noted = np.full(len(touched), -1, np.int64)  # the grain under which the store has the row; -1: none
        self._void: list[tuple[np.ndarray, np.ndarray]] = []  # (ids, grains) of notes whose rows are gone
        self._swept = 0

    def cutoff(self, now_ms: int) -> int | None:
        """Rows last learned before it are to go now; None: nothing is due."""
        cutoff = int(grain(now_ms - self._after))
        if cutoff <= self._swept:
            return None
        self._swept = cutoff
        return cutoff

    def loaded(self, rows: np.ndarray) -> None:
        """Rows are in memory as the store has them."""
        self._noted[rows] = grain(self._touched[rows])

    def freed(self, rows: np.ndarray) -> None:
        """Rows hold no id any more, in memory."""
        self._noted[rows] = -1

    def void_rows(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """The ids int64 [n], which are in `rows`, are no more."""
        noted = self._noted[rows] >= 0
        self.void(ids[noted], self._noted[rows[noted]])

    def void(self, ids: np.ndarray, grains: np.ndarray) -> None:
        """Ids int64 [n], which the store has noted under `grains` int64 [n], are no more."""
        if len(ids):
            self._void.append((ids, grains))

    def notes(self, ids: np.ndarray, rows: np.ndarray) -> Notes:
        """What the commit of `ids`, which are in `rows` (both int64 [n]), changes. Once it is done: `committed`."""
        now, noted = grain(self._touched[rows]), self._noted[rows]
        moved, had = now != noted, (now != noted) & (noted >= 0)
        void = [*self._void, (ids[had], noted[had])]
        old_ids, old_grains = (np.concatenate(part) for part in zip(*void, strict=True))
        return Notes(old_ids, old_grains, ids[moved], now[moved])

    def committed(self, rows: np.ndarray) -> None:
        """The notes of `rows` are written, and those of rows that are gone taken out."""
        self.loaded(rows)
        self._void.clear()


def grain(times_ms: np.ndarray | int) -> np.ndarray:
    """The beginning of the grain of each event time, ms."""
    return np.maximum(times_ms, 0) // GRAIN_MS * GRAIN_MS
