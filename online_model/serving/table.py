"""One embedding table as a replica holds it: rows by feature id, growing as ids arrive in versions.

Only `put` and `remove` write. A look-up of an unknown id gives row 0, the default row, which is all zeros for ever.

Weights are held in an encoding (embedding_store/encoding.py: 4, 2 or 1 byte a number, and 8 a row), once more than on
their way: fp16 is off by 2^-11 of the value, int8 by 1/510 of what lies between the row's least and largest. What is
looked up is float32 whatever it is; a row is put whole, so errors do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from embedding_store.columns import WEIGHTS, TableRows
from embedding_store.encoding import Encoding, decode_weights, encode_weights
from embedding_store.errors import CorruptRecord
from embedding_store.rows import RowMap

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # column → (dtype, shape of one row)
_SCANNED = 1 << 15  # rows that are decoded at a time: they stay in the cache


class Table:
    """Columns [capacity + 1, …] of one table by row: weights [dim] in their encoding, the `extras` that versions carry,
    and `own` columns that the replica makes itself. Memory that no row has used is not touched.
    """

    def __init__(
        self, name: str, dim: int, extras: Layout, capacity: int, own: Layout | None = None, encoding: Encoding = "fp32"
    ) -> None:
        self.name = name
        self.carried = _dtypes({WEIGHTS: ("<f4", (dim,)), **extras})
        self._map = RowMap(capacity)
        self._encoding = encoding
        codes = encode_weights(np.zeros((1, dim), np.float32), encoding)
        self._codes = {part: f"{WEIGHTS}.{part}" if part else WEIGHTS for part in codes}  # part of them → column
        held = {self._codes[part]: (array.dtype, array.shape[1:]) for part, array in codes.items()}
        held |= _dtypes({**extras, **(own or {})})
        self.columns = {c: np.zeros((capacity + 1, *s), d) for c, (d, s) in held.items()}
        self.end = 1  # no row from here on was ever used
        self.members = 0  # moves when an id comes or goes

    def __len__(self) -> int:
        return len(self._map)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for the columns and the map of ids: at most twice what the most rows ever held need, or what
        the capacity said. What no row has used is not in memory."""
        return self._map.nbytes + sum(column.nbytes for column in self.columns.values())

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Rows int64 [n] of ids int64 [n]; 0 where there is none. Changes nothing."""
        return self._map.find(ids)

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Ids int64 [n] of rows int64 [n]; 0 for row 0 and for free rows."""
        return self._map.ids_of(rows)

    def used(self, column: str) -> np.ndarray:
        """A view of a column's rows [end, …] that were ever used, the default row first."""
        return self.columns[column][: self.end]

    def scores(self, vector: np.ndarray) -> torch.Tensor:
        """float32 [end]: the inner products of all rows that were ever used with `vector` float32 [dim]."""
        with_ = torch.from_numpy(vector)
        if self._encoding == "fp32":
            return torch.mv(torch.from_numpy(self.used(WEIGHTS)), with_)
        out = torch.empty(self.end)
        for start in range(0, self.end, _SCANNED):
            rows = slice(start, min(start + _SCANNED, self.end))
            torch.mv(torch.from_numpy(self._decoded(rows)), with_, out=out[rows])
        return out

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """Copies of the weights float32 [n, dim] in rows int64 [n]."""
        if self._encoding == "fp32":
            return torch.from_numpy(self.columns[WEIGHTS].take(rows, axis=0))
        return torch.from_numpy(self._decoded(rows))

    def _decoded(self, rows: np.ndarray | slice) -> np.ndarray:
        return decode_weights({part: self.columns[name][rows] for part, name in self._codes.items()}, self._encoding)

    def check(self, rows: TableRows) -> None:
        """Raises CorruptRecord unless `rows` can be put: the columns carried, finite, each id once and none 0."""
        if absent := self.carried.keys() - rows.columns.keys():
            raise self._refusal(f"it lacks {', '.join(sorted(absent))}")
        if rows.ids.dtype != np.int64 or rows.ids.ndim != 1:
            raise self._refusal(f"its ids are {rows.ids.dtype} {rows.ids.shape}, not int64 [n]")
        ids = np.sort(rows.ids)
        if (ids[1:] == ids[:-1]).any() or (ids == 0).any():
            raise self._refusal("an id is 0 or there twice")
        for name, (dtype, shape) in self.carried.items():
            column = rows.columns[name]
            if column.dtype != dtype or column.shape != (len(rows), *shape):
                raise self._refusal(f"{name} is {column.dtype} {column.shape}, not {dtype} {(len(rows), *shape)}")
            if dtype.kind == "f" and not np.isfinite(column).all():
                raise self._refusal(f"{name} holds numbers that are not finite")

    def put(self, rows: TableRows) -> np.ndarray:
        """Write `rows`, which `check` has passed; their row numbers, int64 [n]."""
        if len(rows) > self._map.free:  # else there is room whatever is new: a look less
            new = len(rows) - int(np.count_nonzero(self.find(rows.ids)))
            if new > self._map.free:
                self._grow(len(self) + new)
        index, added = self._map.admit(rows.ids)
        self.members += len(added)
        into = _run_of(index)
        for part, codes in encode_weights(rows.columns[WEIGHTS], self._encoding).items():
            self.columns[self._codes[part]][into] = codes
        for name in self.carried.keys() - {WEIGHTS}:
            self.columns[name][into] = rows.columns[name]
        self.end = max(self.end, int(index.max(initial=0)) + 1)
        return index

    def remove(self, ids: np.ndarray) -> np.ndarray:
        """Forget ids, known or not: the row numbers that are free and zero now, int64 [m]."""
        rows = self._map.remove(ids)
        self.members += len(rows)
        for column in self.columns.values():
            column[rows] = 0
        return rows

    def _grow(self, least: int) -> None:
        """Room for at least `least` rows; doubling, so that a row is copied less than twice on average."""
        capacity = max(least, 2 * self._map.capacity)
        self._map.grow(capacity)
        for name, old in self.columns.items():
            self.columns[name] = np.zeros((capacity + 1, *old.shape[1:]), old.dtype)
            self.columns[name][: self.end] = old[: self.end]

    def _refusal(self, why: str) -> CorruptRecord:
        return CorruptRecord(
            f"a version does not fit table {self.name!r}: {why}; run trainer and replicas with the same settings"
        )


def _run_of(index: np.ndarray) -> np.ndarray | slice:
    """Row numbers int64 [n], as a slice where they are one after the other, as a snapshot's are: a plain copy."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _dtypes(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in layout.items()}
