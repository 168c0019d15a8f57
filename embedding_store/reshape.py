"""A store's tables added, taken away, widened: from the layouts that it was written with to those that are wanted.

| | what becomes of it |
|---|---|
| a table that is new | begins empty |
| one that is not wanted any more | goes: rows, notes, what is owed of it, its sketch of sightings |
| a larger dim | rows keep their values, new weights are zero; so is their part of an optimizer's state by weight |
| another kind of optimizer's state | begins at zero |
| a column that is new | is zero; TOUCHED, of rows that expire from now on: the event time of the last commit |
| a column that is not wanted any more | goes |
| a smaller dim, another type of a column | refused |

Tables whose layout stays are not read, let alone written: their files are hard links. The others are rewritten in
chunks, some 3 µs a row, and 3 more where each is noted anew. Ids that went before are still known as gone
(`gone_since`), of tables that are gone too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from itertools import chain, islice, takewhile
from pathlib import Path

import msgspec
import numpy as np

from embedding_store.checkpoint import FORMAT, CheckpointStore, Head
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS
from embedding_store.copies import replace_directory
from embedding_store.errors import StoreError, UsageError
from embedding_store.expiry import grain
from embedding_store.families import (
    ABOUT,
    BLOBS,
    META,
    OWN,
    RECORD,
    blob_names,
    blob_prefix,
    described,
    ids_of,
    note_families,
    note_family,
    note_keys,
    place_value,
    row_family,
)
from embedding_store.faults import fault
from embedding_store.rocks import AT, FIRST, Db, open_db

_CHUNK_BYTES = 8 << 20  # of rows at a time
_KEYS = 100_000  # at a time, where keys alone go by
_ID_BYTES = 8


def changes(stored: Mapping[str, np.dtype], wanted: Mapping[str, np.dtype]) -> list[str]:
    """What a reshaping does, in words; none: the layouts are the same. Raises UsageError for what is refused."""
    said = [f"table {table} added" for table in sorted(wanted.keys() - stored.keys())]
    said += [f"table {table} removed" for table in sorted(stored.keys() - wanted.keys())]
    for table in sorted(stored.keys() & wanted.keys()):
        if stored[table] != wanted[table]:
            said += _changes_of(table, stored[table], wanted[table])
    return said


def reshape(path: Path, layouts: Mapping[str, np.dtype], commit: Callable[[CheckpointStore], None]) -> list[str]:
    """Gives the store at `path`, which nobody may have open, the wanted `layouts`. Returns what `changes` says.

    1. A copy is made beside the store, by hard links. 2. Tables are rewritten in the copy. 3. `commit` writes to it
    what goes with the new layouts: the copy is open, and at the last commit. 4. The copy takes the store's place, then
    the old one goes. Up to 4 the store's LOCK is held. Killed at any moment the store is the old one or the new one,
    once `settle_directory` has been there: do it again.

    Raises UsageError for what is refused, StoreError, StoreLocked, DiskFull, and what `commit` raises: the store is
    then the old one.
    """
    copy = _beside(path)
    with CheckpointStore(path, None) as store:
        said = changes(store.layouts, layouts)
        discard_half(path)
        try:
            store.checkpoint(copy)
            fault("reshape.copied")
            with open_db(copy, [*map(row_family, layouts), *note_families(layouts)]) as db:
                _rewrite(db, store.layouts, layouts, store.head())
                db.flush()
            fault("reshape.rewritten")
            with CheckpointStore(copy, layouts) as reshaped:
                commit(reshaped)
                reshaped.db.flush()  # what `close` cannot flush it passes over
            fault("reshape.committed")
        except BaseException:
            discard_half(path)
            raise
    aside = replace_directory(path, copy)
    shutil.rmtree(aside, ignore_errors=True)
    fault("reshape.done")
    return said


def discard_half(path: Path) -> None:
    """Takes away what a reshaping of the store at `path` has left beside it when it was killed. Hold its LOCK."""
    shutil.rmtree(_beside(path), ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".reshaped")


def _dim(layout: np.dtype) -> int:
    return layout[WEIGHTS].shape[0]


def _changes_of(table: str, old: np.dtype, new: np.dtype) -> list[str]:
    """Of a table whose layouts are `old` and `new`, not the same."""
    before, after = _dim(old), _dim(new)
    if after < before:
        raise UsageError(
            f"the rows of table {table!r} have dim {before} in the store and {after} in the settings: they cannot be "
            f"made narrower, set dim back to {before} or more, or choose an empty data directory"
        )
    said = [f"table {table} widened from dim {before} to {after}"] if after > before else []
    had, has = old.names or (), new.names or ()
    for name in (name for name in has if name in had):
        # Shapes may differ where they follow the dim, and of what the optimizer keeps.
        if old[name].base != new[name].base or (name not in (WEIGHTS, MOMENTUM) and old[name].shape != new[name].shape):
            raise UsageError(
                f"column {name!r} of table {table!r} is {old[name]} in the store and is to be {new[name]}: it cannot "
                "be converted, use the release that wrote the store, or choose an empty data directory"
            )
        if name == MOMENTUM and old[name].ndim != new[name].ndim:
            said.append(f"optimizer of table {table} begun anew")
    said += [f"column {table}.{name} added" for name in has if name not in had]
    said += [f"column {table}.{name} removed" for name in had if name not in has]
    return said or [f"columns of table {table} put in another order"]


def _rewrite(db: Db, stored: Mapping[str, np.dtype], wanted: Mapping[str, np.dtype], head: Head | None) -> None:
    """Step 2, with nothing of it that counts before all of it is done."""
    before, after = set(note_families(stored)), set(note_families(wanted))
    for table in stored.keys() - wanted.keys():
        db.drop(row_family(table))
        _drop_sketch(db, table)
        _drop_records(db, table)
        fault("reshape.table")
    for family in before - after:
        db.drop(family)
    for table in stored.keys() & wanted.keys():
        if stored[table] != wanted[table]:
            _rewrite_rows(db, table, stored[table], wanted[table], head.event_time_ms if head else 0)
            fault("reshape.table")
    batch = db.batch()
    if head is not None:
        for family in (*map(row_family, wanted.keys() - stored.keys()), *(after - before)):
            batch.into(family)[AT] = place_value(head.place)
    batch.into(META)[ABOUT] = msgspec.json.encode({"format": FORMAT, "layouts": described(wanted)})
    db.write(batch)


def _rewrite_rows(db: Db, table: str, old: np.dtype, new: np.dtype, now_ms: int) -> None:
    dated = TOUCHED in (new.names or ()) and TOUCHED not in (old.names or ())
    items = db.items(row_family(table), FIRST)  # as they were when it began
    size = max(1, _CHUNK_BYTES // new.itemsize)
    while flat := list(chain.from_iterable(islice(items, size))):
        keys, values = flat[::2], b"".join(flat[1::2])
        if len(values) != len(keys) * old.itemsize:
            raise StoreError(f"the store {db.path} holds rows of another size in {table!r}: go back to a kept one")
        rows = _converted(np.frombuffer(values, old), new)
        batch = db.batch()
        if dated:
            rows[TOUCHED] = now_ms
            notes = note_keys(grain(rows[TOUCHED]), ids_of(keys))
            batch.put_all(note_family(table), notes, (b"" for _ in notes))
        batch.put_all(row_family(table), keys, rows.view(f"V{new.itemsize}").tolist())
        db.write(batch, sync=False)


def _converted(rows: np.ndarray, new: np.dtype) -> np.ndarray:
    """Rows [n] of one layout in another: what both have is kept, all else zero."""
    out = np.zeros(len(rows), new)
    for name in new.names or ():
        if name not in (rows.dtype.names or ()) or rows[name].ndim != out[name].ndim:
            continue
        if rows[name].ndim == 1:
            out[name] = rows[name]
        else:
            out[name][:, : rows[name].shape[1]] = rows[name]
    return out


def _drop_sketch(db: Db, table: str) -> None:
    """Its counts of sightings, whatever cells and seed they were made with (`Table.sketch_name`)."""
    own = re.compile(re.escape(f"{OWN}seen.{table}.") + r"\d+\.\d+")
    batch = db.batch()
    for name in filter(own.fullmatch, blob_names(db)):
        batch.delete_range(BLOBS, blob_prefix(name), name.encode() + b"\x01")
    db.write(batch, sync=False)


def _drop_records(db: Db, table: str) -> None:
    """What is owed of it to replicas (`Owed`): keys of the table's name and an id."""
    prefix = RECORD + table.encode()
    found = takewhile(lambda key: key.startswith(prefix), (key for key, _ in db.items(META, prefix)))
    own = (key for key in found if len(key) == len(prefix) + _ID_BYTES)  # not of a table whose name goes on
    while keys := list(islice(own, _KEYS)):
        batch = db.batch()
        meta = batch.into(META)
        for key in keys:
            del meta[key]
        db.write(batch, sync=False)
