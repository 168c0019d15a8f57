"""Snapshots: all of a version, for replicas to start from. A directory `<epoch>-<sequence>` of part files.

A snapshot is written beside its place and renamed there, so a directory of that name is whole. Its files are the parts
of `delta.encode`. It holds what replicas need: no momentum, no trainer's state.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

from embedding_store.checkpoint import OWN, CheckpointStore
from embedding_store.columns import MOMENTUM, TOUCHED, TableRows
from embedding_store.copies import sync_directory, write_synced
from embedding_store.delta import Assembler, Version, encode_stream
from embedding_store.errors import CorruptRecord, StoreError, disk_errors
from embedding_store.faults import fault

KEEP = 3
_PART_BYTES = 16 << 20
_CHUNK = 10_000  # rows at a time: small, so that the trainer's thread gets its turn in between
_NAME = re.compile(r"\d+-\d+")


def snapshot_of(
    store: CheckpointStore, directory: Path, keep: int = KEEP, wanted: Callable[[Version], bool] = lambda version: True
) -> Path | None:
    """Writes the last commit of `store` as a snapshot into `directory` and returns its path.

    None, and nothing is written, where that commit's version (without its rows) is not `wanted`.

    May run in any thread while another commits, but one at a time: 1. RocksDB copies itself by hard links beside
    the store (it holds commits up for 10 to 50 ms). 2. The copy is opened and streamed out; commits go on. What
    the snapshot's name says is what the copy's own head says, so it holds exactly that version, though a newer
    one may be committed by the time it is there. 3. The copy goes, and all but the `keep` newest snapshots.

    Raises StoreError (DiskFull) where it cannot be written, or where nothing was committed yet.
    """
    with store.copied(".copy") as copy:
        fault("snapshot.copied")
        with CheckpointStore(copy, store.layouts, read_only=True) as frozen:
            version = frozen.version()
            if version is None:
                raise StoreError(f"nothing was committed yet to the store {store.path}: no snapshot can be made of it")
            if not wanted(version):
                return None
            return _write(directory, version, _rows(frozen), _blobs(frozen), keep)


def write_snapshot(directory: Path, version: Version, keep: int = KEEP) -> Path:
    """Writes a version that holds everything (`base` None) into `directory`; see `snapshot_of`."""
    return _write(directory, version, version.tables.items(), version.blobs.items(), keep)


def latest_snapshot(directory: Path) -> Path | None:
    """The newest snapshot in `directory`; None where there is none."""
    return max(_snapshots(directory), key=place_of, default=None)


def place_of(path: Path) -> tuple[int, int]:
    """(epoch, sequence) of a snapshot, from its directory's name."""
    epoch, _, sequence = path.name.partition("-")
    return int(epoch), int(sequence)


def read_snapshot(path: Path) -> Version:
    """The version in a snapshot, with all of its rows in memory.

    Raises StoreError where it cannot be read (it may have been replaced by a newer one), CorruptRecord where it is
    damaged.
    """
    assembler, version = Assembler(), None
    with _mapped_errors(path):
        for file in sorted(path.iterdir()):
            try:
                version = assembler.add(file.read_bytes())
            except CorruptRecord as error:
                raise CorruptRecord(f"the snapshot {path} is damaged in {file.name} ({error}): delete it") from error
    if version is None:
        raise CorruptRecord(f"the snapshot {path} lacks some of its parts: delete it, and an older one is taken")
    return version


def _write(
    directory: Path,
    version: Version,
    tables: Iterable[tuple[str, TableRows]],
    blobs: Iterable[tuple[str, dict[int, bytes]]],
    keep: int,
) -> Path:
    final = directory / f"{version.epoch}-{version.sequence}"
    partial = directory / ".partial"
    with _mapped_errors(directory):
        shutil.rmtree(partial, ignore_errors=True)
        if final.exists():
            return final
        partial.mkdir(parents=True)
        try:
            for number, part in enumerate(encode_stream(version, tables, blobs, _PART_BYTES)):
                write_synced(partial / f"part-{number:06}", io.BytesIO(part))
                fault("snapshot.part")
            sync_directory(partial)
            fault("snapshot.written")
            partial.rename(final)
            fault("snapshot.renamed")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_directory(directory)
        for old in sorted(_snapshots(directory), key=place_of)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        fault("snapshot.done")
    return final


def _rows(store: CheckpointStore) -> Iterator[tuple[str, TableRows]]:
    for table in sorted(store.layouts):
        for rows in store.iter_rows(table, _CHUNK):
            yield table, rows.without(MOMENTUM, TOUCHED)


def _blobs(store: CheckpointStore) -> Iterator[tuple[str, dict[int, bytes]]]:
    for name in (n for n in store.blob_names() if not n.startswith(OWN)):
        blobs = store.iter_blobs(name)
        while chunk := dict(islice(blobs, _CHUNK)):
            yield name, chunk


def _snapshots(directory: Path) -> list[Path]:
    return [p for p in directory.iterdir() if _NAME.fullmatch(p.name)] if directory.is_dir() else []


def _mapped_errors(path: Path) -> AbstractContextManager[None]:
    full = f"no space left for a snapshot in {path}: free some; the store itself is whole"
    return disk_errors(full, f"the snapshot {path} cannot be read or written")
