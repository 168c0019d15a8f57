"""The trainer's store: all of its state in one RocksDB, changed by one atomic write a commit.

A commit holds the touched rows, the dense weights, the trainer's own state (positions among it) and the encoded
version that tells replicas of it. So after a kill -9 the store is at a commit, never between two, and the versions
that the broker may not have are in its outbox, byte for byte as they were first sent. Where in RocksDB all of it is:
families.py.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, repeat, takewhile
from pathlib import Path
from threading import get_ident

import msgspec
import numpy as np
from safetensors.numpy import load, save

from embedding_store.columns import TableRows
from embedding_store.copies import sync_directory, write_synced
from embedding_store.delta import Version
from embedding_store.digest import Digest, pack
from embedding_store.errors import OtherLayouts, PositionError, StoreError, disk_errors
from embedding_store.expiry import Notes
from embedding_store.families import (
    ABOUT,
    BLOBS,
    GONE,
    META,
    OUTBOX,
    RECORD,
    blob_names,
    blob_prefix,
    described,
    dtype_of,
    ids_of,
    note_families,
    note_family,
    note_keys,
    noted,
    place_of,
    place_value,
    row_family,
    sequence_key,
)
from embedding_store.faults import fault
from embedding_store.rocks import AT, FIRST, Batch, Db, keys_of, open_db

FORMAT = 2
_HEAD, _DENSE, _SENT = b"head", b"dense", b"sent"
CLOSED_AT = "CLOSED-AT"  # a file of the store: a commit that is safely on the disk, as of its last close or copy


@dataclass
class Commit:
    """What becomes true at once. Rows and blobs are absolute values, those not named stay as they are."""

    epoch: int
    sequence: int  # rises with every commit, across epochs too
    state: bytes  # the owner's: positions, counts, whatever it needs to go on
    dense: dict[str, np.ndarray] = field(default_factory=dict)  # all dense weights and their optimizer's state
    rows: dict[str, TableRows] = field(default_factory=dict)  # table → its touched rows, all columns of its layout
    blobs: dict[str, dict[int, bytes]] = field(default_factory=dict)  # family → id → bytes
    parts: list[bytes] = field(default_factory=list)  # the version's encoded parts, for the outbox; none: no entry
    version: Version | None = None  # what the parts were encoded from: its header is what a snapshot will say
    gone: dict[str, np.ndarray] = field(default_factory=dict)  # table → int64 ids that are no more, unless in `rows`
    notes: dict[str, Notes] = field(default_factory=dict)  # of tables that have TOUCHED
    settings: str = ""  # a digest of the owner's settings
    event_time_ms: int = 0  # the newest that is in it
    records: dict[bytes, bytes] = field(default_factory=dict)  # the owner's by key, in no digest; b"" takes one away
    dense_owed: bool = False  # replicas have not `dense`, but that of the last commit of which this was false


@dataclass(frozen=True)
class Head:
    """The last commit, without its rows."""

    epoch: int
    sequence: int
    state: bytes
    dense: dict[str, np.ndarray]
    settings: str
    event_time_ms: int
    created_ms: int  # of its version; 0: it has none

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, sequence)"""
        return self.epoch, self.sequence


class _HeadRecord(msgspec.Struct, array_like=True):
    epoch: int
    sequence: int
    state: bytes
    version: _VersionRecord | None
    settings: str
    event_time_ms: int
    dense_owed: bool = False


class _VersionRecord(msgspec.Struct, array_like=True):
    """What a version says beside rows and weights."""

    created_ms: int
    positions: dict[int, int]
    info: dict
    dense: list[str]  # which of the commit's dense arrays it has


class CheckpointStore:
    """One process at a time. One thread commits and acknowledges, others may read. All methods raise StoreError."""

    def __init__(
        self,
        path: Path | str,
        layouts: Mapping[str, np.dtype] | None,
        read_only: bool = False,
        sync: bool = False,
        strict: bool = False,
    ) -> None:
        """Opens or makes the store at `path`; `layouts`: table → structured dtype of its rows (`columns.layout`).

        With `layouts` None a store that is there is opened with those that it was written with. With `sync` a commit
        waits for the disk and outlives a power cut, without it only a kill -9. `strict`: see `open_db`.

        Raises StoreLocked where another process has it open, OtherLayouts where it was written with others (see
        reshape.py), StoreError where it has another format, is damaged, or (with None) is not there.
        """
        self.path, self._sync = Path(path), sync
        if layouts is None and not (self.path / "CURRENT").exists():
            raise StoreError(f"there is no store at {self.path}: name the data directory of a train worker")
        self._read_only, self._closed, self._remembers = read_only, False, False
        families = [META, BLOBS, OUTBOX, GONE, *map(row_family, layouts or ()), *note_families(layouts or {})]
        self._db = open_db(self.path, families, read_only, strict=strict)
        try:
            self.layouts = self._checked_layouts(layouts, read_only)
            record = self._head_record()
            self._last = (record.epoch, record.sequence) if record else (0, 0)
            self._dense_owed = record is not None and record.dense_owed
            self._check_commits()
            self._outbox = [int.from_bytes(key, "big") for key, _ in self._db.items(OUTBOX, FIRST)]
        except BaseException:
            self._db.close()
            raise

    @property
    def memory_bytes(self) -> int:
        """As of `Db`."""
        return self._db.memory_bytes

    def commit(self, commit: Commit) -> None:
        """Writes all of the commit or, where it raises, none of it that anybody sees.

        1. Everything is put into one batch, rows sorted by id. 2. The batch is written. 3. Only then does
        the outbox here know the version. Where 2 fails (DiskFull) the caller keeps its touched rows and commits
        again under the same sequence, once there is space.

        Raises PositionError where epoch or sequence does not go on from the last commit.
        """
        if commit.epoch < self._last[0] or commit.sequence <= self._last[1]:
            raise PositionError(
                f"commit {commit.epoch}.{commit.sequence} does not follow {self._last[0]}.{self._last[1]} "
                f"of the store {self.path}: restore from the store before going on"
            )
        about = _version_record(commit.version) if commit.version else None
        if about and not commit.dense.keys() >= set(about.dense):
            raise ValueError("the version has dense weights that its commit has not")
        batch = self._db.batch()
        place = place_value((commit.epoch, commit.sequence))
        for table, ids in commit.gone.items():
            self._put_gone(batch, table, ids, place)
        for table, rows in commit.rows.items():
            self._put_rows(batch, table, rows.sorted())
        for table, notes in commit.notes.items():
            _put_notes(batch, note_family(table), notes)
        for name, blobs in commit.blobs.items():
            ids = np.array(sorted(blobs), np.int64)
            prefix = blob_prefix(name)
            batch.put_all(BLOBS, (prefix + key for key in keys_of(ids)), (blobs[i] for i in ids.tolist()))
        if commit.parts:
            batch.into(OUTBOX)[sequence_key(commit.sequence)] = msgspec.msgpack.encode(commit.parts)
        self._put_sent(batch, commit.dense_owed, about)
        meta = batch.into(META)
        meta[_DENSE] = save({n: np.ascontiguousarray(a) for n, a in commit.dense.items()})
        head = _HeadRecord(
            commit.epoch, commit.sequence, commit.state, about, commit.settings, commit.event_time_ms,
            commit.dense_owed,
        )  # fmt: skip
        meta[_HEAD] = msgspec.msgpack.encode(head)
        _put_records(batch, commit.records)
        for family in self._dated():
            batch.into(family)[AT] = place
        fault("commit.filled")
        self._db.write(batch, self._sync)
        fault("commit.written")
        self._last, self._dense_owed = (commit.epoch, commit.sequence), commit.dense_owed
        if commit.parts:
            self._outbox.append(commit.sequence)

    def head(self) -> Head | None:
        """The last commit; None where there is none."""
        record = self._head_record()
        if record is None:
            return None
        return Head(
            record.epoch, record.sequence, record.state, load(self._db.get(META, _DENSE) or b""), record.settings,
            record.event_time_ms, record.version.created_ms if record.version else 0,
        )  # fmt: skip

    def version(self, as_sent: bool = False) -> Version | None:
        """The last commit as a version that holds everything (`base` None), but without tables and blobs.

        Its dense weights are the commit's; `as_sent`: those that replicas have at it, which may be owed the commit's.
        """
        record, head = self._head_record(), self.head()
        if record is None or head is None:
            return None
        about = record.version or _VersionRecord(0, {}, {}, list(head.dense))
        found = load(self._db.get(META, _SENT) or b"") if as_sent and record.dense_owed else head.dense
        dense = {name: found[name] for name in about.dense}
        return Version(head.epoch, head.sequence, None, about.created_ms, about.positions, about.info, dense)

    def iter_rows(self, table: str, chunk: int = 100_000) -> Iterator[TableRows]:
        """All rows of a table sorted by id, in chunks of up to `chunk`. Do not commit while it runs."""
        items = self._db.items(row_family(table), FIRST)
        while flat := list(chain.from_iterable(islice(items, chunk))):  # pairs would be work for the garbage collector
            yield self._unpack(table, ids_of(flat[::2]), flat[1::2])

    def read_rows(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, TableRows]:
        """ids int64 [n] → (found bool [n], the rows of those that were found, in their order). 2 to 4 µs an id."""
        order = np.argsort(ids, kind="stable")
        values = self._db.get_many(row_family(table), keys_of(ids[order]))
        found_sorted = np.fromiter((v is not None for v in values), bool, len(values))
        found = np.empty(len(ids), bool)
        found[order] = found_sorted
        rows = self._unpack(table, ids[order][found_sorted], [v for v in values if v is not None])
        return found, rows.take(np.argsort(order[found_sorted], kind="stable"))

    def noted_before(self, table: str, time: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [n], their times int64 [n] ms) of a table's notes under times before `time`, 1 µs each."""
        end = time.to_bytes(8, "big")
        keys = takewhile(lambda key: key < end, (key for key, _ in self._db.items(note_family(table), FIRST)))
        times, ids = noted(list(keys))
        return ids, times

    def has_rows(self, table: str) -> bool:
        """Whether the table has any row."""
        return next(self._db.items(row_family(table), FIRST), None) is not None

    def iter_blobs(self, name: str) -> Iterator[tuple[int, bytes]]:
        """(id, bytes) of a blob family, sorted by id."""
        prefix = blob_prefix(name)
        for key, value in self._db.items(BLOBS, prefix):
            if not key.startswith(prefix):
                return
            yield int(ids_of([key[len(prefix) :]])[0]), value

    def blob_names(self) -> list[str]:
        """The blob families that hold something."""
        return list(blob_names(self._db))

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of the owner's records, sorted by key."""
        for key, value in self._db.items(META, RECORD):
            if not key.startswith(RECORD):
                return
            yield key[len(RECORD) :], value

    def outbox(self) -> list[tuple[int, list[bytes]]]:
        """(sequence, parts) of the versions that were not acknowledged, oldest first, as they were committed."""
        keys = [sequence_key(s) for s in self._outbox]
        values = self._db.get_many(OUTBOX, keys)
        stored = zip(self._outbox, values, strict=True)
        return [(s, msgspec.msgpack.decode(v, type=list[bytes])) for s, v in stored if v is not None]

    def acknowledge(self, up_to_sequence: int) -> None:
        """Forgets the versions up to and with this one: the broker has them.

        Not synced: a power cut may bring them back, they are then sent again.
        """
        gone = [s for s in self._outbox if s <= up_to_sequence]
        if not gone:
            return
        fault("acknowledge.begun")
        batch = self._db.batch()
        outbox = batch.into(OUTBOX)
        for sequence in gone:
            del outbox[sequence_key(sequence)]
        self._db.write(batch, sync=False)
        fault("acknowledge.written")
        self._outbox = self._outbox[len(gone) :]

    def digest(self, state: bytes | None = None) -> str:
        """32 hex digits over all logical rows and blobs sorted by id, the dense weights, and `state`.

        `state`: what of the owner's state must be alike in two runs (positions, counts); None: the head's as it is.
        Not in it: epoch, sequence, outbox, row numbers, notes (they say what the rows say).
        """
        return self.content(state)[0]

    def content(self, state: bytes | None = None) -> tuple[str, dict[str, int]]:
        """(digest, table → how many rows it has), all of it read."""
        head = self.head()
        digest, count = Digest(self.layouts), dict.fromkeys(sorted(self.layouts), 0)
        for table in count:
            for rows in self.iter_rows(table):
                digest.rows(table, rows)
                count[table] += len(rows)
        for name in self.blob_names():
            digest.entry(f"blobs {name}", *(part for i, v in self.iter_blobs(name) for part in (str(i).encode(), v)))
        if state is None and head is not None:
            state = head.state
        return digest.finish(head.dense if head else {}, state or b""), count

    def purge(self) -> None:
        """Rewrites the files, so that rows that are gone and versions that were sent leave the disk as well.

        Commits may go on meanwhile, in another thread.
        """
        for family in (META, GONE, *self._dated()):
            self._db.compact(family)

    def remember_gone(self, since: tuple[int, int] | None) -> None:
        """From now on commits note which ids are `gone`, so that going back to a copy of the store does not bring them
        back. Forgets those noted up to the version `since`, that of the oldest copy; None: no copy is kept, so all of
        them, and notes no more. Raises StoreError.
        """
        self._remembers = since is not None
        batch = self._db.batch()
        notes = batch.into(GONE)
        count = 0
        for key, value in self._db.items(GONE):
            if since is None or place_of(value) <= since:
                del notes[key]
                count += 1
        if count:
            self._db.write(batch, sync=False)

    def gone_since(self, since: tuple[int, int]) -> dict[str, np.ndarray]:
        """table → int64 ids, ascending, that commits after the version `since` took away, as far as it was noted."""
        keys: dict[str, list[bytes]] = {}
        for key, value in self._db.items(GONE):
            if place_of(value) > since:
                keys.setdefault(key[:-9].decode(), []).append(key[-8:])
        return {table: ids_of(some) for table, some in keys.items()}

    def scan(self) -> None:
        """Reads all of it: `Db.scan`. Raises StoreError where it is damaged."""
        self._db.scan((META, GONE, *self._dated()))

    def checkpoint(self, path: Path) -> None:
        """A copy of the store as of the last commit as the new directory `path`, by hard links: `Db.checkpoint`."""
        at = self._last
        self._db.checkpoint(path)
        _say_closed(self.path / CLOSED_AT, at)  # it has flushed all that

    @contextmanager
    def copied(self, ending: str) -> Iterator[Path]:
        """A copy as of the last commit beside the store, named as it with `ending`, for as long as it is needed."""
        copy = self.path.with_name(self.path.name + ending)
        shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed
        try:
            self.checkpoint(copy)
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the store. Idempotent."""
        if not (self._read_only or self._closed):
            with contextlib.suppress(StoreError):  # what could not be flushed is in RocksDB's log, and nothing is said
                self._db.flush()
                _say_closed(self.path / CLOSED_AT, self._last)
        self._closed = True
        self._db.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def db(self) -> Db:
        """The RocksDB beneath, for its figures."""
        return self._db

    def _head_record(self) -> _HeadRecord | None:
        value = self._db.get(META, _HEAD)
        return None if value is None else msgspec.msgpack.decode(value, type=_HeadRecord)

    def _dated(self) -> list[str]:
        """The families that say which commit they are at."""
        return [BLOBS, OUTBOX, *map(row_family, self.layouts), *note_families(self.layouts)]

    def _checked_layouts(self, layouts: Mapping[str, np.dtype] | None, read_only: bool) -> dict[str, np.dtype]:
        raw = self._db.get(META, ABOUT)
        if raw is None:
            if layouts is None or read_only:
                raise StoreError(f"{self.path} is no store of a train worker: check the path")
            batch = self._db.batch()
            batch.into(META)[ABOUT] = msgspec.json.encode({"format": FORMAT, "layouts": described(layouts)})
            self._db.write(batch)
            return dict(layouts)
        about = msgspec.json.decode(raw)
        if about["format"] != FORMAT:
            raise StoreError(
                f"the store {self.path} has the format {about['format']}, this release has {FORMAT}: use the release "
                "that wrote it, or choose an empty data directory"
            )
        stored = {table: dtype_of(fields) for table, fields in about["layouts"].items()}
        if layouts is not None and stored != dict(layouts):
            different = [t for t in {**stored, **layouts} if stored.get(t) != layouts.get(t)]
            raise OtherLayouts(
                f"the store {self.path} was written with other tables, dimensions or optimizers "
                f"({', '.join(sorted(different))}): start a train worker with these settings, it reshapes the store"
            )
        return stored

    def _check_commits(self) -> None:
        """That the families are at one commit, and at one not before that in the file CLOSED_AT."""
        closed_at = _closed_at(self.path / CLOSED_AT)
        if closed_at > self._last:
            raise StoreError(
                f"the store {self.path} is damaged: it was safe at commit {closed_at[0]}.{closed_at[1]} and is at "
                f"{self._last[0]}.{self._last[1]}: go back to a kept one with `headrace checkpoint rollback`"
            )
        for family in self._dated():
            value = self._db.get(family, AT)
            at = place_of(value) if value else (0, 0)
            if at != self._last:
                raise StoreError(
                    f"the store {self.path} is damaged: {family!r} is at commit {at[0]}.{at[1]}, the rest at "
                    f"{self._last[0]}.{self._last[1]}: go back to a kept one with `headrace checkpoint rollback`"
                )

    def _put_gone(self, batch: Batch, table: str, ids: np.ndarray, place: bytes) -> None:
        keys = keys_of(np.unique(ids))
        delete = batch.into(row_family(table))
        for key in keys:
            del delete[key]
        if self._remembers:
            batch.put_all(GONE, (blob_prefix(table) + key for key in keys), (place for _ in keys))

    def _put_sent(self, batch: Batch, owed: bool, about: _VersionRecord | None) -> None:
        """The dense weights that replicas have are kept while newer ones are owed to them: once, as these begin to."""
        meta = batch.into(META)
        if owed and not self._dense_owed:
            sent = load(self._db.get(META, _DENSE) or b"")
            meta[_SENT] = save({name: sent[name] for name in (about.dense if about else sent)})
        elif self._dense_owed and not owed:
            del meta[_SENT]

    def _put_rows(self, batch: Batch, table: str, rows: TableRows) -> None:
        dtype = self.layouts[table]
        if set(rows.columns) != set(dtype.names or ()):
            raise ValueError(f"rows of {table!r} have the columns {sorted(rows.columns)}, not those of its layout")
        packed = pack(rows, dtype)
        batch.put_all(row_family(table), keys_of(rows.ids), packed.view(f"V{dtype.itemsize}").tolist())

    def _unpack(self, table: str, ids: np.ndarray, values: list[bytes] | tuple[bytes, ...]) -> TableRows:
        dtype = self.layouts[table]
        joined = b"".join(values)
        if len(joined) != len(ids) * dtype.itemsize:
            raise StoreError(f"the store {self.path} holds rows of another size in {table!r}: restore from a snapshot")
        packed = np.frombuffer(joined, dtype)
        return TableRows(ids, {n: packed[n].copy() for n in dtype.names or ()})


def _put_records(batch: Batch, records: dict[bytes, bytes]) -> None:
    meta = batch.into(META)
    for key, value in sorted(records.items()):
        if value:
            meta[RECORD + key] = value
        else:
            del meta[RECORD + key]


def _version_record(version: Version) -> _VersionRecord:
    return _VersionRecord(version.created_ms, version.positions, version.info, list(version.dense))


def _say_closed(path: Path, place: tuple[int, int]) -> None:
    new = path.with_suffix(f".{get_ident()}")
    with disk_errors(f"no space left for {path}: free some; nothing was lost", f"{path} cannot be written"):
        write_synced(new, io.BytesIO(b"%d.%d\n" % place))
        new.replace(path)
        sync_directory(path.parent)


def _closed_at(path: Path) -> tuple[int, int]:
    """The commit in the file, (0, 0) where there is none. Raises StoreError."""
    try:
        epoch, sequence = path.read_bytes().removesuffix(b"\n").split(b".")
        return int(epoch), int(sequence)
    except FileNotFoundError:
        return 0, 0
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): check the disk, and delete it to go on from what the store has"
        ) from error


def _put_notes(batch: Batch, family: str, notes: Notes) -> None:
    delete = batch.into(family)
    for key in note_keys(notes.old_times, notes.old_ids):
        del delete[key]
    batch.put_all(family, note_keys(notes.times, notes.ids), repeat(b"", len(notes.ids)))
