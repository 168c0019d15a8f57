"""Rows and versions made up for the tests of this package."""

from __future__ import annotations

import numpy as np

from embedding_store.columns import MOMENTUM, TableRows, layout
from embedding_store.delta import Version

LAYOUTS = {
    "item": layout(4, {"clicks": ("<f4", ()), "created": ("<i8", ())}),
    "user": layout(4, {"history": ("<i8", (3,))}),
}


def rows_of(table: str, ids: np.ndarray | list[int], seed: int = 0) -> TableRows:
    """All columns of the table's layout, drawn from `seed`."""
    dtype, n = LAYOUTS[table], len(ids)
    rng = np.random.default_rng(seed)
    columns = {
        name: (rng.standard_normal((n, *dtype[name].shape)) * 1000).astype(dtype[name].base)
        for name in dtype.names or ()
    }
    return TableRows(np.array(ids, np.int64), columns)


def version_of(sequence: int, n: int = 50, seed: int = 0) -> Version:
    """A version with something in every place."""
    rng = np.random.default_rng(seed)
    ids = np.unique(rng.integers(-(2**63), 2**63 - 1, n))
    return Version(
        epoch=1,
        sequence=sequence,
        base=(1, sequence - 1),
        created_ms=1_700_000_000_000 + sequence,
        positions={0: 17, 3: sequence},
        info={"metrics": {"click": {"auc": 0.5}}, "name": 'a "quoted" é', "nothing": None},
        dense={"w": rng.standard_normal((5, 7)).astype(np.float32), "scale": np.array(3.5, np.float32)},
        tables={t: rows_of(t, ids, seed).without(MOMENTUM) for t in LAYOUTS},
        gone={"user": np.array([5, -6], np.int64)},
        blobs={"card": {int(i): b"{%d}" % i for i in ids}, "other": {1: b""}},
    )


def assert_same_rows(a: TableRows, b: TableRows) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    assert a.columns.keys() == b.columns.keys()
    for name, column in a.columns.items():
        assert column.dtype == b.columns[name].dtype
        assert column.tobytes() == b.columns[name].tobytes(), name


def assert_same_version(a: Version, b: Version) -> None:
    for name in ("epoch", "sequence", "base", "created_ms", "positions", "info", "blobs"):
        assert getattr(a, name) == getattr(b, name), name
    for mine, theirs in ((a.dense, b.dense), (a.gone, b.gone)):
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
            np.testing.assert_array_equal(array, theirs[name])
    assert a.tables.keys() == b.tables.keys()
    for name, rows in a.tables.items():
        assert_same_rows(rows, b.tables[name])
