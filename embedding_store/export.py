"""A checkpoint for others: safetensors and Parquet, which need nothing of Headrace to be read.

    DIR/about.json                    what it is, and which files belong to which table
    DIR/dense.safetensors             dense weights and their optimizer's state, by name
    DIR/<table>-<n>.safetensors       weights float32 [rows, dim], of a chunk, and the optimizer's state, if it has one:
                                      momentum float32 [rows] or [rows, dim]
    DIR/<table>-<n>.parquet           id of each of its rows, in the same order, and what else a row carries
    DIR/<blobs>.parquet               id and bytes, such as an item's record
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from embedding_store.checkpoint import CheckpointStore
from embedding_store.columns import MOMENTUM, WEIGHTS, TableRows
from embedding_store.errors import disk_errors

ROWS = 1_000_000  # of a file at most


def export_store(store: CheckpointStore, out: Path, about: dict[str, Any]) -> list[str]:
    """Writes the last commit of `store` to the new directory `out` and returns the names of its files.

    `about`: JSON-ready, goes into about.json. Raises StoreError (DiskFull); `out` is then not there.
    """
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(f"no space left for {out}: free some, or choose another disk", f"{out} cannot be written"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            files = _write(store, partial, about)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return files


def _write(store: CheckpointStore, folder: Path, about: dict[str, Any]) -> list[str]:
    head = store.head()
    assert head is not None
    save_file({name: np.ascontiguousarray(a) for name, a in head.dense.items()}, folder / "dense.safetensors")
    tables: dict[str, list[str]] = {}
    for table in sorted(store.layouts):
        tables[table] = []
        for number, chunk in enumerate(store.iter_rows(table, ROWS)):
            _write_rows(folder / f"{table}-{number}", chunk)
            tables[table].append(f"{table}-{number}")
    for name in store.blob_names():
        _write_blobs(folder / f"{name}.parquet", store.iter_blobs(name))
    (folder / "about.json").write_bytes(msgspec.json.format(msgspec.json.encode(about | {"tables": tables})))
    return sorted(path.name for path in folder.iterdir())


def _write_rows(path: Path, rows: TableRows) -> None:
    numbers = {name: np.ascontiguousarray(c) for name, c in rows.columns.items() if name in (WEIGHTS, MOMENTUM)}
    save_file(numbers, path.with_suffix(".safetensors"))
    columns = {"id": pa.array(rows.ids)}
    columns |= {name: _array(c) for name, c in rows.columns.items() if name not in numbers}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))


def _array(column: np.ndarray) -> pa.Array:
    """[n] as it is; bytes [n, width] as binary of that width; anything else [n, …] as lists."""
    if column.ndim == 1:
        return pa.array(column)
    width = int(np.prod(column.shape[1:]))
    flat = np.ascontiguousarray(column).reshape(-1)
    if column.dtype == np.uint8:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(column), [None, pa.py_buffer(flat)])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), width)


def _write_blobs(path: Path, blobs: Iterator[tuple[int, bytes]]) -> None:
    schema = pa.schema([("id", pa.int64()), ("value", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(blobs, 100_000)):
            ids, values = zip(*chunk, strict=True)
            writer.write_table(pa.table({"id": list(ids), "value": list(values)}, schema))
