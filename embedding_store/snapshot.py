"""Snapshots: all of a version, for replicas to start from. A directory `<epoch>-<sequence>` of part files.

A snapshot is written beside its place and renamed there, so a directory of that name is whole. Its files are the parts
of `delta.encode`, and where a key is set their signature (signing.py). It holds what replicas need: no momentum, no
trainer's state.

Who needs one puts a `Request` beside them: a file of its own, which goes when a snapshot is there that was begun after
it. The folder is all that the two sides share; either may be away for as long as it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

from embedding_store.checkpoint import CheckpointStore
from embedding_store.columns import MOMENTUM, TOUCHED, TableRows
from embedding_store.copies import sync_directory, write_synced
from embedding_store.delta import Assembler, Version, encode_stream
from embedding_store.errors import CorruptRecord, Forged, StoreError, disk_errors
from embedding_store.families import OWN
from embedding_store.faults import fault
from embedding_store.signing import SEAL, Signer

KEEP = 3
_PART_BYTES = 16 << 20
_CHUNK = 10_000  # rows at a time: small, so that the trainer's thread gets its turn in between
_NAME = re.compile(r"\d+-\d+")
_WANTED = ".wanted-"
_MAX_REQUEST = 4_096  # bytes that are read of a request


class Request:
    """One asker's wish for a snapshot in `directory`. Several askers know nothing of each other."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{_WANTED}{uuid.uuid4().hex}"
        self._made = False

    def make(self, useless: Iterable[Path] = ()) -> None:
        """Ask; `useless`: snapshots that are there and cannot be used. Raises StoreError."""
        with _mapped_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(f"{path.name}\n" for path in useless), "utf-8")
        self._made = True

    @property
    def open(self) -> bool | None:
        """Whether there is no answer yet: a snapshot that was begun after it was made, of the last commit of then or a
        later one. None where nothing is asked for. Raises StoreError."""
        if not self._made:
            return None
        with _mapped_errors(self._path), contextlib.suppress(FileNotFoundError):
            self._path.lstat()
            return True
        return False

    def withdraw(self) -> None:
        """Nothing is asked for any more. Never raises: where the file cannot go, a snapshot too many is written."""
        if self._made:
            self._made = False
            with contextlib.suppress(OSError):
                self._path.unlink()


def requests(directory: Path) -> dict[Path, set[str]]:
    """The open requests in `directory` → the names of the snapshots that are of no use to who asks. Remove a request
    once the snapshot is there, that the asker takes for the answer. Never raises: what cannot be read asks for nothing.
    """
    found: dict[Path, set[str]] = {}
    with contextlib.suppress(OSError):  # there is no such folder yet, or its disk fails: writing to it will say so
        for path in directory.glob(f"{_WANTED}*"):
            with path.open("rb") as file:
                found[path] = set(file.read(_MAX_REQUEST).decode("utf-8", "replace").split())
    return found


def snapshot_of(
    store: CheckpointStore, directory: Path, keep: int = KEEP, wanted: Callable[[Version], bool] = lambda version: True,
    anew: Collection[str] = (), signer: Signer | None = None,
) -> Path | None:  # fmt: skip
    """Writes the last commit of `store` as a snapshot into `directory` and returns its path. One that is there already
    stays, unless its name is among `anew`. It is signed if there is a `signer`.

    None, and nothing is written, where that commit's version (without its rows) is not `wanted`.

    May run in any thread while another commits, but one at a time: 1. RocksDB copies itself by hard links beside
    the store (it holds commits up for 10 to 50 ms). 2. The copy is opened and streamed out; commits go on. What
    the snapshot's name says is what the copy's own head says, so it holds exactly that version, though a newer
    one may be committed by the time it is there. Dense weights too are those of replicas that followed the versions:
    two that are at one version answer alike. 3. The copy goes, and all but the `keep` newest snapshots.

    Raises StoreError (DiskFull) where it cannot be written, or where nothing was committed yet.
    """
    with store.copied(".copy") as copy:
        fault("snapshot.copied")
        with CheckpointStore(copy, store.layouts, read_only=True) as frozen:
            version = frozen.version(as_sent=True)
            if version is None:
                raise StoreError(f"nothing was committed yet to the store {store.path}: no snapshot can be made of it")
            if not wanted(version):
                return None
            return _write(directory, version, _rows(frozen), _blobs(frozen), keep, anew, signer)


def write_snapshot(directory: Path, version: Version, keep: int = KEEP, signer: Signer | None = None) -> Path:
    """Writes a version that holds everything (`base` None) into `directory`; see `snapshot_of`."""
    return _write(directory, version, version.tables.items(), version.blobs.items(), keep, (), signer)


def latest_snapshot(directory: Path, signer: Signer | None = None) -> Path | None:
    """The newest snapshot in `directory`, with a `signer` of those that it signed (what is in them is not looked at);
    None where there is none. Raises StoreError."""
    return next((path for path in snapshots(directory) if signer is None or _is_signed(path, signer)), None)


def snapshots(directory: Path) -> list[Path]:
    """All snapshots in `directory`, the newest first; none where there is no such folder. Raises StoreError."""
    with _mapped_errors(directory):
        try:
            found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(found, key=place_of, reverse=True)


def place_of(path: Path) -> tuple[int, int]:
    """(epoch, sequence) of a snapshot, from its directory's name."""
    epoch, _, sequence = path.name.partition("-")
    return int(epoch), int(sequence)


def read_snapshot(path: Path, signer: Signer | None = None) -> Version:
    """The version in a snapshot, with all of its rows in memory.

    Raises StoreError where it cannot be read (it may have been replaced by a newer one), CorruptRecord where it is
    damaged, Forged where it was not signed with a key of `signer` as the snapshot of its name.
    """
    assembler, version, sha256 = Assembler(), None, {}
    with _mapped_errors(path):
        signed = None if signer is None else _signed(path, signer)
        for file in sorted(file for file in path.iterdir() if file.name != SEAL):
            part = file.read_bytes()
            if signed is not None:  # before anything is made of it
                sha256[file.name] = hashlib.sha256(part).hexdigest()
                if sha256[file.name] != signed.get(file.name):
                    raise Forged(f"the snapshot {path}: {file.name} is not what was signed: delete it", "forged")
            try:
                version = assembler.add(part)
            except CorruptRecord as error:
                raise CorruptRecord(f"the snapshot {path} is damaged in {file.name} ({error}): delete it") from error
    if signed is not None and sha256.keys() != signed.keys():
        raise Forged(f"the snapshot {path} lacks parts that were signed: delete it", "forged")
    if version is None:
        raise CorruptRecord(f"the snapshot {path} lacks some of its parts: delete it, and an older one is taken")
    return version


def _write(
    directory: Path,
    version: Version,
    tables: Iterable[tuple[str, TableRows]],
    blobs: Iterable[tuple[str, dict[int, bytes]]],
    keep: int,
    anew: Collection[str] = (),
    signer: Signer | None = None,
) -> Path:
    final = directory / f"{version.epoch}-{version.sequence}"
    partial = directory / ".partial"
    with _mapped_errors(directory):
        shutil.rmtree(partial, ignore_errors=True)
        if final.exists() and final.name not in anew:
            return final
        partial.mkdir(parents=True)
        try:
            sha256 = {}
            for number, part in enumerate(encode_stream(version, tables, blobs, _PART_BYTES)):
                name = f"part-{number:06}"
                write_synced(partial / name, io.BytesIO(part))
                if signer is not None:
                    sha256[name] = hashlib.sha256(part).hexdigest()
                fault("snapshot.part")
            if signer is not None:
                write_synced(partial / SEAL, io.BytesIO(signer.seal(_claim(final), sha256)))
            sync_directory(partial)
            fault("snapshot.written")
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            fault("snapshot.renamed")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_directory(directory)
        for old in snapshots(directory)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        fault("snapshot.done")
    return final


def _claim(path: Path) -> str:
    return f"snapshot {path.name}"


def _is_signed(path: Path, signer: Signer) -> bool:
    try:
        return bool(_signed(path, signer))
    except (Forged, OSError):
        return False


def _signed(path: Path, signer: Signer) -> dict[str, str]:
    """The SHA-256 that the parts must have. Raises Forged, OSError."""
    seal = path / SEAL
    return signer.unsealed(seal.read_bytes() if seal.exists() else None, _claim(path))


def _rows(store: CheckpointStore) -> Iterator[tuple[str, TableRows]]:
    for table in sorted(store.layouts):
        for rows in store.iter_rows(table, _CHUNK):
            yield table, rows.without(MOMENTUM, TOUCHED)


def _blobs(store: CheckpointStore) -> Iterator[tuple[str, dict[int, bytes]]]:
    for name in (n for n in store.blob_names() if not n.startswith(OWN)):
        blobs = store.iter_blobs(name)
        while chunk := dict(islice(blobs, _CHUNK)):
            yield name, chunk


def _mapped_errors(path: Path) -> AbstractContextManager[None]:
    full = f"no space left for a snapshot in {path}: free some; the store itself is whole"
    return disk_errors(full, f"the snapshot {path} cannot be read or written")
