"""The hash of what a model is: the same for the same logical content, however it came to be and is kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xxhash

from embedding_store.columns import TableRows


class Digest:
    """The hash of a model's logical content; rows may come in chunks of any size, but sorted by table and id."""

    def __init__(self, layouts: Mapping[str, np.dtype]) -> None:
        self._layouts = layouts
        self._hash = xxhash.xxh3_128()
        self._table = ""

    def rows(self, table: str, rows: TableRows) -> None:
        """The next rows of `table`, ids ascending."""
        if not len(rows):
            return
        if table != self._table:
            self._table = table
            self.entry(f"table {table}")
        packed = np.empty(len(rows), [("id", "<i8"), ("row", self._layouts[table])])
        packed["id"], packed["row"] = rows.ids, pack(rows, self._layouts[table])
        self._hash.update(packed.data)

    def entry(self, name: str, *values: bytes) -> None:
        """Something by name; lengths are part of it, so that nothing can pass for something else."""
        for value in (name.encode(), *values):
            self._hash.update(len(value).to_bytes(8, "little"))
            self._hash.update(value)

    def finish(self, dense: Mapping[str, np.ndarray], state: bytes) -> str:
        """The 32 hex digits, with the dense weights and the state."""
        for name in sorted(dense):
            self.entry(f"dense {name} {dense[name].dtype.str} {dense[name].shape}", dense[name].tobytes())
        self.entry("state", state)
        return self._hash.hexdigest()


def pack(rows: TableRows, dtype: np.dtype) -> np.ndarray:
    """The rows' columns as one structured array [n] of `dtype`."""
    packed = np.empty(len(rows), dtype)
    for name in dtype.names or ():
        packed[name] = rows.columns[name]
    return packed
