"""Rows of a table outside of it: ids and columns of equal length. What commits, deltas and snapshots are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

WEIGHTS = "weights"  # float32 [n, dim], of every table
MOMENTUM = "momentum"  # the optimizer's state float32 [n] or [n, dim], of tables whose optimizer has one
TOUCHED = "touched_ms"  # int64 [n], of tables whose rows expire: event time when it was last learned


@dataclass
class TableRows:
    """n rows, keyed by feature id, never by row number."""

    ids: np.ndarray  # int64 [n]
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # name → [n, …]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.ids):
                raise ValueError(f"{len(self.ids)} ids but {len(column)} rows of {name!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray | slice) -> TableRows:
        """The rows at `index` (numbers, a mask or a slice); views where it is a slice, else copies."""
        return TableRows(self.ids[index], {name: column[index] for name, column in self.columns.items()})

    def sorted(self) -> TableRows:
        """The same rows in ascending order of their ids."""
        if len(self) < 2 or bool(np.all(self.ids[1:] > self.ids[:-1])):
            return self
        return self.take(np.argsort(self.ids, kind="stable"))

    def without(self, *names: str) -> TableRows:
        """The same rows less some columns."""
        return TableRows(self.ids, {n: c for n, c in self.columns.items() if n not in names})


def concat(parts: Sequence[TableRows]) -> TableRows:
    """All rows of at least one part, in the order given. All parts have the same columns."""
    if len(parts) == 1:
        return parts[0]
    columns = {n: np.concatenate([p.columns[n] for p in parts]) for n in parts[0].columns}
    return TableRows(np.concatenate([p.ids for p in parts]), columns)


def layout(
    dim: int, extras: Mapping[str, tuple[str, tuple[int, ...]]], momentum: tuple[int, ...] | None = ()
) -> np.dtype:
    """The structured dtype of one stored row: weights, momentum, then the extras in the order given.

    `momentum`: the shape of a row's, None: the table has none.

    >>> layout(2, {"seen": ("<f4", ())}).names
    ('weights', 'momentum', 'seen')
    >>> layout(2, {}, None).names
    ('weights',)
    """
    fields = [(WEIGHTS, "<f4", (dim,))] + ([] if momentum is None else [(MOMENTUM, "<f4", momentum)])
    fields += [(name, np.dtype(dtype).newbyteorder("<").str, shape) for name, (dtype, shape) in extras.items()]
    return np.dtype(fields)
