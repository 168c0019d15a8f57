"""How Headrace opens a RocksDB: the same options, errors and closing for the trainer's store and the joiner's.

RocksDB reports every failure as a bare `Exception` with a text. Here, and nowhere else, they become StoreLocked,
DiskFull or StoreError. Keys and values are `bytes` (raw mode).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rocksdict import (
    AccessType,
    BlockBasedIndexType,
    BlockBasedOptions,
    BottommostLevelCompaction,
    Cache,
    Checkpoint,
    ColumnFamily,
    CompactOptions,
    DbClosedError,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    RdictIter,
    ReadOptions,
    SliceTransform,
    WriteBatch,
    WriteOptions,
)
from xxhash import xxh3_64

from embedding_store.errors import DiskFull, StoreError, StoreLocked
from embedding_store.faults import fault

DEFAULT_FAMILY = "default"  # RocksDB always has this one
AT, FIRST = b"\x00", b"\x00\x00"  # the key of a family's commit, and the first one that may follow
_CACHE_BYTES = 64 << 20
_MANIFEST = b"manifest"  # in the default family: what RocksDB's list of its files was at the last write
_SIGN = np.uint64(1 << 63)


class Batch:
    """Writes that happen together or not at all, over all families: fill it, give it to `Db.write`.

    Not to be used after the Db was closed.
    """

    def __init__(self, handle: Callable[[str], ColumnFamily | None]) -> None:
        self.raw = WriteBatch(raw_mode=True)
        self._handle = handle

    def into(self, family: str) -> WriteBatch:
        """RocksDB's batch, writing to `family` until the next `into`: `w[key] = value`, `del w[key]`, bytes only.

        Put keys in sorted order: RocksDB takes them twice as fast.
        """
        self.raw.set_default_column_family(self._handle(family))
        return self.raw

    def put_all(self, family: str, keys: Iterable[bytes], values: Iterable[bytes]) -> None:
        """All of `keys` (sorted) with their `values`."""
        put = self.into(family).__setitem__
        for key, value in zip(keys, values, strict=True):
            put(key, value)

    def delete_range(self, family: str, begin: bytes, end: bytes) -> None:
        """Deletes the keys in [begin, end)."""
        self.raw.delete_range(begin, end, self._handle(family))


class Db:
    """An open RocksDB and its column families. Reads may come from any thread, also during a write.

    All methods raise StoreError (DiskFull, where no space is left) when RocksDB fails. After a failed write reads
    show the state before it; make a new `batch()` to try again, that opens the database anew. The failed batch is
    then in it as a whole or, nearly always, not at all: write absolute values, so that a second time does no harm.
    """

    def __init__(
        self, path: Path, families: list[str], read_only: bool = False, memory: int = 0, strict: bool = False,
        by_prefix: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.path, self._memory, self._strict, self._by_prefix = path, memory, strict, by_prefix or {}
        self._names = families
        self._read_only = read_only
        self._db: Rdict | None = None
        self._families: dict[str, Rdict] = {}
        self._handles: dict[str, ColumnFamily] = {}
        self._manifest: _Manifest | None = None  # of a store that is open for writing
        self._failed = False  # RocksDB refuses all writes after one that failed, until it is opened anew
        self._connect()

    @property
    def memory_bytes(self) -> int:
        """What RocksDB has in memory: blocks that were read, up to its cache, and what was written and is in no file
        yet. 0 where it is closed. For any thread."""
        waiting = 0
        for family in list(self._families.values()):
            with contextlib.suppress(Exception):  # it is being closed, or opened anew
                waiting += family.property_int_value("rocksdb.cur-size-all-mem-tables") or 0
        return waiting + self._cache.get_usage() if self._db is not None else 0

    def family(self, name: str) -> Rdict:
        """RocksDB's own view of a family. Do not keep it: it holds the LOCK beyond `close`."""
        return self._opened() if name == DEFAULT_FAMILY else self._families[name]

    def get(self, family: str, key: bytes) -> bytes | None:
        """The value of a key, None where there is none."""
        with _mapped_errors(self.path):
            self._opened()
            return self.family(family).get(key)

    def get_many(self, family: str, keys: list[bytes]) -> list[bytes | None]:
        """The values of many keys, None where there is none; sorted keys are twice as fast."""
        with _mapped_errors(self.path):
            self._opened()
            return self.family(family).get(keys) if keys else []  # type: ignore[arg-type, return-value]

    def scan(self, families: Iterable[str]) -> None:
        """Reads all rows of these, so that RocksDB compares the checksums of their blocks. Raises StoreError at the
        first that is damaged."""
        for family in families:
            for _ in self.items(family):
                pass

    def items(self, family: str, from_key: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) in the order of the keys from `from_key` on. Holds the LOCK until it is exhausted or gone.

        rocksdict ends in silence where a block is damaged: what comes after the last key is looked at once more.
        """
        with _mapped_errors(self.path):
            self._opened()
            options = ReadOptions()
            options.set_total_order_seek(True)
            last: Any = from_key
            items: Iterator[Any] = self.family(family).items(from_key=from_key, read_opt=options)
            for item in items:
                last = item[0]
                yield item
            rest = self.family(family).iter(options)
            if last is None:
                rest.seek_to_first()
            else:
                rest.seek(last)
                if rest.valid() and rest.key() == last:
                    rest.next()
            if not rest.valid():
                rest.status()

    def cursor(self, family: str, prefix: int = 0) -> Cursor:
        """For many short looks at a family as it is now. Holds the LOCK until it is gone.

        With `prefix` only keys that begin with the same so many bytes are looked for at a time, those that `by_prefix`
        has for the family.
        """
        with _mapped_errors(self.path):
            self._opened()
            options = ReadOptions()
            if prefix:
                assert prefix == self._by_prefix.get(family), f"the family {family} is not looked at by {prefix} bytes"
                options.set_prefix_same_as_start(True)
            else:
                options.set_total_order_seek(True)
            return Cursor(self.path, self.family(family).iter(options))

    def compact(self, family: str) -> None:
        """Rewrites a family, so that what was overwritten or deleted leaves the disk too. Takes its time."""
        with _mapped_errors(self.path):
            self._opened().flush()  # the log is kept as long as any family needs it
            self.family(family).flush()
            options = CompactOptions()
            options.set_bottommost_level_compaction(BottommostLevelCompaction.force())
            self.family(family).compact_range(None, None, options)

    def drop(self, family: str) -> None:
        """Takes a family away, with all that is in it."""
        with _mapped_errors(self.path):
            db = self._opened()
            self._families.pop(family).close()
            del self._handles[family]
            db.drop_column_family(family)

    def batch(self) -> Batch:
        """An empty batch for `write`; after a failed write the database is opened anew first."""
        self._reopen_if_failed()
        return Batch(lambda name: None if name == DEFAULT_FAMILY else self._handles[name])

    def write(self, batch: Batch, sync: bool = True) -> None:
        """Writes all of the batch at once. With `sync` it outlives a power cut, without it only a kill -9.

        Holds the interpreter's lock until it is done (about 1 µs a row): bound the batch where others must run.
        """
        options = WriteOptions()
        options.sync = sync
        with _mapped_errors(self.path):
            db = self._opened()
            fault("store.write")
            if self._manifest is not None:
                batch.into(DEFAULT_FAMILY)[_MANIFEST] = self._manifest.grown()
            self._failed = True
            db.write(batch.raw, options)
            self._failed = False

    def checkpoint(self, path: Path) -> None:
        """A copy as of now as the new directory `path` on the same file system: hard links, 10 to 40 ms."""
        with _mapped_errors(self.path):
            Checkpoint(self._opened()).create_checkpoint(str(path))

    def flush(self) -> None:
        """What was written is in files that outlive a power cut when this returns."""
        with _mapped_errors(self.path):
            for family in (DEFAULT_FAMILY, *self._families):
                self.family(family).flush()

    def close(self) -> None:
        """Flushes and lets go of the LOCK. Idempotent."""
        db, self._db = self._db, None
        families = list(self._families.values())
        self._families.clear()  # these objects and the handles would keep the LOCK
        self._handles.clear()
        if db is None:
            return
        everything = (*families, db)
        steps = [part.close for part in everything]
        if not (self._read_only or self._failed):
            steps = [part.flush for part in everything] + steps
        for step in steps:
            # The log has all that was acknowledged: what fails here loses nothing, the next opening reads the log.
            with contextlib.suppress(StoreError), _mapped_errors(self.path):
                step()

    def __enter__(self) -> Db:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _opened(self) -> Rdict:
        if self._db is None:
            raise StoreError(f"the store {self.path} is closed: open it again")
        return self._db

    def _reopen_if_failed(self) -> None:
        if self._failed:
            self.close()
            self._connect()
            self._failed = False

    def _connect(self) -> None:
        with _mapped_errors(self.path):
            if not self._read_only:
                self.path.mkdir(parents=True, exist_ok=True)
            exists = (self.path / "CURRENT").exists()
            if not exists and any(self.path.glob("*.sst")):  # RocksDB would begin a new one, and delete them
                raise StoreError(
                    f"the store {self.path} lacks its file CURRENT: go back to a copy, or choose an empty directory"
                )
            before = _Manifest(self.path) if exists else None
            listed = before.read() if before else b""
            found = Rdict.list_cf(str(self.path)) if exists else []  # RocksDB wants all that there are
            names = sorted({*self._names, *found} - {DEFAULT_FAMILY})
            cache = self._cache = Cache(self._memory // 2 or _CACHE_BYTES)
            access = AccessType.read_only(False) if self._read_only else AccessType.read_write()
            options = {name: _options(cache, self._memory) for name in (DEFAULT_FAMILY, *names)}
            for name, prefix in self._by_prefix.items():
                options[name].set_prefix_extractor(SliceTransform.create_fixed_prefix(prefix))
                options[name].set_memtable_prefix_bloom_ratio(0.05)
            if self._strict:
                options[DEFAULT_FAMILY].set_wal_recovery_mode(DBRecoveryMode.absolute_consistency())
            self._db = Rdict(str(self.path), options.pop(DEFAULT_FAMILY), options, access)
            self._families = {n: self._db.get_column_family(n) for n in names}
            self._handles = {n: self._db.get_column_family_handle(n) for n in names}
        try:
            if before is not None:
                self._check(before, listed)
            if not self._read_only:
                self._manifest = _Manifest(self.path)  # RocksDB has begun a new one
                self.write(Batch(lambda name: None), sync=False)
        except StoreError:
            self._failed = True  # nothing is to be flushed
            self.close()
            raise

    def _check(self, before: _Manifest, listed: bytes) -> None:
        """That the list of files began, before RocksDB put another in its place, as it was at the last write.

        Where it ends too early RocksDB takes what is left of it: a family then lacks a file whose log is long gone,
        and has all that was written later.
        """
        noted = self.get(DEFAULT_FAMILY, _MANIFEST)
        if self._read_only:
            listed = before.read()  # another process may have added to it
        name, size, _ = noted.split() if noted else (b"", b"", b"")
        if name == before.name.encode():
            before.add(listed[: int(size)])
            if before.told() != noted:
                raise StoreError(
                    f"the store {self.path} is damaged: {before.name} is not as it was at the last write: go back to "
                    "a copy of it"
                )


class Cursor:
    """A family as it was at one moment."""

    def __init__(self, path: Path, iterator: RdictIter) -> None:
        self._path, self._iterator = path, iterator

    def beginning_with(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """(key, value) of the keys that begin with `prefix`, in order: 1 µs where there are none, then 2 µs each."""
        at, found = self._iterator, []
        with _mapped_errors(self._path):
            at.seek(prefix)
            while at.valid() and (key := at.key()).startswith(prefix):
                found.append((key, at.value()))
                at.next()
            at.status()
        return found


def open_db(
    path: Path | str, families: list[str], read_only: bool = False, memory: int = 0, strict: bool = False,
    by_prefix: Mapping[str, int] | None = None,
) -> Db:  # fmt: skip
    """Opens the RocksDB at `path`, made where it is missing, with at least these families (beside "default").

    Raises StoreLocked where another process (or object) has it open, StoreError where it cannot be opened.
    `read_only` takes no LOCK, and sees what was written up to now. `strict`: a log with anything wrong in it is
    refused; else what stands before that is taken, as after a power cut. `memory`: bytes, half of them for what
    waits for its file and half for what was read, its index and filters included, of all families together; 0: as
    RocksDB has it (64 MB of each family wait, indexes are held outside of a cache of 64 MB). `by_prefix`: family →
    how many bytes its keys begin with when a cursor asks for them; where there are none that is known at once.
    """
    return Db(Path(path), families, read_only, memory, strict, by_prefix)


def keys_of(numbers: np.ndarray | Sequence[int] | Sequence[tuple[int, ...]]) -> list[bytes]:
    """int64 [n] or [n, k] → n keys of 8 k bytes, in whose order the numbers ascend, one after the other."""
    if not len(numbers):
        return []
    array = np.ascontiguousarray(numbers, np.int64).reshape(len(numbers), -1)
    return (array.view(np.uint64) ^ _SIGN).astype(">u8").view(f"V{8 * array.shape[1]}")[:, 0].tolist()


def in_use(path: Path) -> bool:
    """Whether another process has the RocksDB at `path` open for writing."""
    try:
        with (path / "LOCK").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as RocksDB locks it; let go when it is closed
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _options(cache: Cache, memory: int) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_compression_type(DBCompressionType.none())  # rows are random floats: nothing to win
    if memory:
        options.set_db_write_buffer_size(memory // 2)
    else:  # new ids are looked up and missing here first: a fifth less for an event of rows that come and go
        options.set_memtable_prefix_bloom_ratio(0.1)
        options.set_memtable_whole_key_filtering(True)
    options.set_max_total_wal_size(256 << 20)  # a family that is seldom written must not keep all logs alive
    options.set_max_log_file_size(4 << 20)
    options.set_keep_log_file_num(2)
    options.set_stats_dump_period_sec(0)
    options.set_manifest_preallocation_size(64 << 10)
    options.set_max_open_files(512)
    blocks = BlockBasedOptions()
    blocks.set_block_cache(cache)
    blocks.set_cache_index_and_filter_blocks(bool(memory))
    if memory:  # an index of a file whole is hundreds of KB: where the cache holds few, a look-up would read one each
        blocks.set_index_type(BlockBasedIndexType.two_level_index_search())
        blocks.set_partition_filters(True)
        blocks.set_pin_top_level_index_and_filter(True)
    blocks.set_bloom_filter(10, False)  # a new id is looked up once, and missing: 0.4 µs
    options.set_block_based_table_factory(blocks)
    return options


class _Manifest:
    """RocksDB's list of its files, which it only ever adds to: name, length, and a checksum of so much of it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.name = (path / "CURRENT").read_text(errors="replace").strip()
        self._path, self._size, self._sum = path / self.name, 0, xxh3_64()

    def grown(self) -> bytes:
        """"name size checksum", of all that is there. Costs 4 µs where nothing was added."""
        if self._path.stat().st_size > self._size:
            with self._path.open("rb") as file:
                file.seek(self._size)
                self.add(file.read())
        return self.told()

    def add(self, more: bytes) -> None:
        self._size += len(more)
        self._sum.update(more)

    def told(self) -> bytes:
        return f"{self.name} {self._size} {self._sum.hexdigest()}".encode()

    def read(self) -> bytes:
        return self._path.read_bytes()


class _mapped_errors:
    """The one place that knows RocksDB's error texts. (Round every read: a generator would cost more than the read.)"""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if isinstance(error, DbClosedError):
            raise StoreError(f"the store {self._path} is closed: open it again") from error
        if isinstance(error, OSError) or type(error) is Exception:  # RocksDB alone raises a bare one
            raise _translate(self._path, str(error)) from error


def _translate(path: Path, text: str) -> StoreError:
    text = " ".join(text.split())
    if "LOCK: No locks available" in text or "LOCK: Resource temporarily unavailable" in text:
        return StoreLocked(
            f"the store {path} is in use by another process: stop that worker, or choose another data directory"
        )
    if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
        return DiskFull(f"no space left on the disk of the store {path}: free some and try again, nothing was lost")
    if "os error" in text or "[Errno" in text:
        return StoreError(f"the store {path} cannot be opened ({text}): choose a directory that you may write")
    return StoreError(f"the store {path} failed ({text}): check the disk, and go back to a copy of it")
