"""A backfill: what the joiner makes of months of log, in files, for a trainer to begin with and a join worker to go on
from.

    DIR/backfill.json                            written last: what is in it; without it nothing counts
    DIR/done/0.json                              the same of one partition: a run that was killed goes on after it
    DIR/examples/partition=0/part-00000.parquet  a row an example: the columns of online_model/examples.py, and the
                                                 offsets [from_offset, to_offset) of the block that it came in
    DIR/blocks/partition=0/part-00000.parquet    a row a block, of the examples in the file of the same name
    DIR/items/part-00000.parquet                 the catalogue's records, as they came
    DIR/join/0/<next offset>/                    the joiner's state at its end: a shared snapshot (join_snapshots.py)

Each file is a function of the records and the settings alone, whoever writes it and however often: a task that is done
twice does no harm, and no file needs to be renamed.

The log of a backfill may be a recording of the very topic that is to go on: offsets are then the topic's. Any other log
comes before the topic's first record: its offsets are negative, and end at 0.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import fsspec.core
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Meta, Struct

from embedding_store.copies import inside, mapped_errors, sync_file, sync_folder
from embedding_store.errors import CorruptRecord, PositionError, StoreError, UsageError
from online_model.catalogue import CatalogueItem
from online_model.examples import Block, Counts, Examples
from online_model.history import HISTORY_BYTES
from streams.blocks import ROWS, batch_of_rows, rows_of_batch
from streams.catalogue import CHUNK, item_in
from streams.join_snapshots import settings_hash
from streams.joiner import JoinSettings
from streams.settings import JoinWorkerSettings
from streams.topics import TopicSettings

FORMAT = 1
ABOUT = "backfill.json"
GROUP_ROWS, GROUP_BLOCKS = 10_000, 200  # of examples, or of blocks, that are written (and held) at once
FILE_ROWS = 400_000
ITEM_ROWS = 50_000

_OFFSETS = [pa.field(name, pa.int64(), nullable=False) for name in ("from_offset", "to_offset")]
EXAMPLES = pa.schema([*ROWS, *_OFFSETS])
BLOCKS = pa.schema(
    [
        *_OFFSETS,
        pa.field("handled", pa.int64(), nullable=False),
        pa.field("watermark", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),  # of its examples
        pa.field("counts", pa.string(), nullable=False),  # the balance, as JSON
        pa.field("users", pa.binary(), nullable=False),  # int64 [u]
        pa.field("histories", pa.binary(), nullable=False),  # uint8 [u, HISTORY_BYTES]
    ]
)
ITEMS = pa.schema([pa.field("stamp", pa.int64(), nullable=False), pa.field("value", pa.binary())])


FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]  # never a way out of its folder


class Origin(Struct, frozen=True, forbid_unknown_fields=True):
    """What a backfill is a function of."""

    topic: str  # of events, which it is or comes before
    log: list[Any]  # what tells the log from another one
    join: str  # hash of the [join] settings, as the shared snapshots have it
    settings: JoinSettings
    format: int = FORMAT


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """What came of one partition."""

    partition: int
    from_offset: int
    next_offset: int
    rows: int
    row_ids: int  # their sum modulo 2^64
    digest: int  # the sum of an ExamplesDigest
    counts: Counts
    files: list[FileName]  # names, in their order, in the partition's folders of `examples` and of `blocks`


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What backfill.json says. `items`: records of the catalogue; `item_files`: where they are."""

    origin: Origin
    parts: list[Part]
    examples_digest: str
    items: int
    item_files: list[FileName]


class Piece(NamedTuple):
    """What a trainer is given at once: records of the catalogue (as many as `read`), then a block."""

    items: list[CatalogueItem]
    read: int
    block: Block | None
    size: int  # bytes, roughly


class Folder:
    """The directory of a backfill, wherever it lies. Methods raise StoreError where it cannot be read or written."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with mapped_errors(url):
            try:
                self.system, self.root = fsspec.core.url_to_fs(self.url)
            except (ValueError, ImportError) as error:
                raise StoreError(f"{url}: {error}: install what it needs, or choose another address") from error

    def read(self, name: str) -> bytes | None:
        with mapped_errors(self.url):
            self.system.invalidate_cache()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return self.system.cat_file(f"{self.root}/{name}")
            return None

    def put(self, name: str, data: bytes) -> None:
        """A small file, whole or not there at all."""
        path = f"{self.root}/{name}"
        partial = f"{path}.partial"
        with mapped_errors(path):
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.system.open(partial, "wb") as file:
                file.write(data)
                sync_file(self.system, file)
            self.system.mv(partial, path)
            sync_folder(self.system, path.rpartition("/")[0])

    @contextlib.contextmanager
    def writing(self, name: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """A new Parquet file, in place of one that may be there."""
        path = f"{self.root}/{name}"
        with mapped_errors(path):
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.system.open(path, "wb") as file:
                with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                    yield writer
                sync_file(self.system, file)
            sync_folder(self.system, path.rpartition("/")[0])

    def batches(self, name: str, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """A Parquet file by so many rows. Raises CorruptRecord where it is none, or has other columns."""
        path = f"{self.root}/{name}"
        try:
            with mapped_errors(path), self.system.open(path, "rb") as file:
                yield from pq.ParquetFile(file).iter_batches(rows, columns=columns, use_threads=False)
        except StoreError as error:
            if isinstance(error.__cause__, pa.ArrowException | FileNotFoundError):
                text = f"{path} is damaged or missing: make the backfill again"
                raise CorruptRecord(text) from error
            raise

    def remove(self, name: str) -> None:
        """A file, or a folder and all in it, if there is one."""
        with mapped_errors(self.url), contextlib.suppress(FileNotFoundError):
            self.system.rm(f"{self.root}/{name}", recursive=True)

    def sweep(self, folder: str, keep: Iterable[str]) -> None:
        """Removes all files below `folder` but those of these names in it: what an earlier run left."""
        kept = set(keep)
        with mapped_errors(self.url):
            self.system.invalidate_cache()
            for path in self.system.find(f"{self.root}/{folder}"):
                if str(path).rpartition(f"/{folder}/")[2] not in kept:
                    self.system.rm_file(path)


class PartWriter:
    """Writes the blocks of one partition, in their order. About GROUP_ROWS rows are held."""

    def __init__(self, folder: Folder, partition: int) -> None:
        self._folder, self._partition = folder, partition
        self._blocks: list[Block] = []
        self._rows = self._in_file = 0
        self._open = contextlib.ExitStack()
        self.files: list[str] = []

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def add(self, block: Block) -> None:
        self._blocks.append(block)
        self._rows += len(block.examples)
        if self._rows >= GROUP_ROWS or len(self._blocks) >= GROUP_BLOCKS:
            self._write()

    def close(self) -> None:
        """Writes what is left."""
        self._write()
        self._open.close()

    def _write(self) -> None:
        blocks, self._blocks, rows, self._rows = self._blocks, [], self._rows, 0
        if not blocks:
            return
        if not self.files or self._in_file >= FILE_ROWS:
            self._open.close()
            name = f"partition={self._partition}/part-{len(self.files):05}.parquet"
            self._examples = self._open.enter_context(self._folder.writing(f"examples/{name}", EXAMPLES))
            self._heads = self._open.enter_context(self._folder.writing(f"blocks/{name}", BLOCKS))
            self.files.append(name.rpartition("/")[2])
            self._in_file = 0
        self._in_file += rows
        batch = batch_of_rows(Examples.concat([block.examples for block in blocks]))
        lengths = [len(block.examples) for block in blocks]
        offsets = [np.repeat([getattr(b, field.name) for b in blocks], lengths) for field in _OFFSETS]
        self._examples.write_batch(pa.record_batch([*batch.columns, *offsets], schema=EXAMPLES))
        heads = [
            {
                "from_offset": b.from_offset, "to_offset": b.to_offset, "handled": b.handled, "watermark": b.watermark,
                "rows": len(b.examples), "counts": msgspec.json.encode(b.counts).decode(), "users": b.users.tobytes(),
                "histories": b.histories.tobytes(),
            }
            for b in blocks
        ]  # fmt: skip
        self._heads.write_batch(pa.RecordBatch.from_pylist(heads, schema=BLOCKS))


class Backfill:
    """The backfill at `url`, a path or a URL.

    Raises UsageError where there is none, or one of another format; StoreError where it cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)
        raw = self.folder.read(ABOUT)
        if raw is None:
            raise UsageError(f"{url}: no backfill is there (no {ABOUT}): check the path, or run `headrace backfill`")
        try:
            self.manifest = msgspec.json.decode(raw, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UsageError(f"{url}/{ABOUT}: {error}: make the backfill again with this version") from None
        if self.manifest.origin.format != FORMAT:
            found = self.manifest.origin.format
            raise UsageError(f"{url} is a backfill of format {found}, this version reads {FORMAT}: make it again")
        for name in self.manifest.item_files:
            inside(Path("items"), name)
        self.parts = {part.partition: part for part in self.manifest.parts}

    def check(self, topics: TopicSettings, join: JoinSettings | None = None) -> None:
        """Raises UsageError where it does not fit the topics, or was made with other [join] settings."""
        origin, url = self.manifest.origin, self.folder.url
        if origin.topic != topics.events:
            raise UsageError(f"{url} is a backfill of {origin.topic}, not {topics.events}: look at the topic prefix")
        if outside := [p for p in self.parts if p >= topics.partitions]:
            raise UsageError(f"{url} has partition {outside[0]}, {topics.events} has {topics.partitions}: set as many")
        if join is not None and settings_hash(join) != origin.join:
            ours, theirs = msgspec.to_builtins(join), msgspec.to_builtins(origin.settings)
            differing = ", ".join(f"{name} = {theirs[name]}" for name in theirs if theirs[name] != ours[name])
            raise UsageError(f"{url} was made with [join] {differing}: set it so, or make the backfill again")

    def next_offset(self, partition: int) -> int | None:
        """Where the live stream goes on; None: there is nothing of this partition."""
        part = self.parts.get(partition)
        return part.next_offset if part is not None and part.next_offset > part.from_offset else None

    def is_behind(self, positions: Mapping[int, int], items: int) -> bool:
        """Whether a trainer that has these next offsets, and so many records of the catalogue, has it all."""
        every = all(positions.get(p, part.from_offset) >= part.next_offset for p, part in self.parts.items())
        return every and items >= self.manifest.items

    def join_settings(self, data_dir: Path) -> JoinWorkerSettings:
        """Those that the states were put as shared snapshots with."""
        return snapshot_settings(self.folder.url, self.manifest.origin, data_dir)

    def pieces(self, positions: Mapping[int, int], items: int) -> Iterator[Piece]:
        """All that comes after these next offsets and after so many records of the catalogue, in one order: blocks by
        their watermarks, before each the records of the catalogue that were stamped up to then.

        Raises PositionError where an offset lies inside a block: what stopped there has learned something else;
        CorruptRecord, StoreError.
        """
        catalogue = self._items(items)
        waiting = next(catalogue, None)
        by_partition = [self._blocks(part, positions.get(p, part.from_offset)) for p, part in self.parts.items()]
        for block in heapq.merge(*by_partition, key=lambda block: (block.watermark, block.partition)):
            while waiting is not None and waiting[0] <= block.watermark:
                piece, waiting = _gathered(waiting, catalogue, block.watermark)
                yield piece
            yield Piece([], 0, block, 500 * len(block.examples) + HISTORY_BYTES * len(block.users))
        while waiting is not None:
            piece, waiting = _gathered(waiting, catalogue, None)
            yield piece

    def _items(self, skip: int) -> Iterator[tuple[int, bytes | None]]:
        """(stamp, value) of the catalogue's records, less the first `skip`."""
        values = (
            pair
            for name in self.manifest.item_files
            for batch in self.folder.batches(f"items/{name}", ITEMS.names, CHUNK)
            for pair in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
        )
        return itertools.islice(values, skip, None)

    def _blocks(self, part: Part, start: int) -> Iterator[Block]:
        """Those from the offset `start` on."""
        where = f"partition={part.partition}"
        for name in part.files:
            path = f"blocks/{where}/{name}"
            heads = self.folder.batches(path, BLOCKS.names, 100)
            rows = _Rows(self.folder.batches(f"examples/{where}/{name}", ROWS.names, GROUP_ROWS))
            for head in (head for batch in heads for head in batch.to_pylist()):
                if head["to_offset"] <= start:
                    rows.skip(head["rows"])
                    continue
                if head["from_offset"] < start:
                    raise PositionError(
                        f"partition {part.partition}: offset {start} is next, but a block of {self.folder.url} is "
                        f"[{head['from_offset']}, {head['to_offset']}): begin with an empty --data-dir, or without it"
                    )
                yield _block(part.partition, head, rows.take(head["rows"]))


class _Rows:
    """The rows of a file, so many at a time."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._batch, self._at, self._skip = batches, None, 0, 0

    def skip(self, rows: int) -> None:
        """As `take`, but nothing is made of them; read only when it must be."""
        self._skip += rows

    def take(self, rows: int) -> Examples:
        while self._skip:
            self._skip -= len(self._next(self._skip))
        parts = []
        while rows:
            batch = self._next(rows)
            rows -= len(batch)
            parts.append(rows_of_batch(batch))
        return Examples.concat(parts)

    def _next(self, most: int) -> pa.RecordBatch:
        while self._batch is None or self._at == len(self._batch):
            self._batch, self._at = next(self._batches, None), 0
            if self._batch is None:
                raise CorruptRecord("a file of a backfill has fewer examples than its blocks: make the backfill again")
        batch = self._batch.slice(self._at, most)
        self._at += len(batch)
        return batch


def _block(partition: int, head: dict[str, Any], examples: Examples) -> Block:
    users = np.frombuffer(head["users"], np.int64)
    return Block(
        partition, head["from_offset"], head["to_offset"], head["handled"], head["watermark"],
        msgspec.json.decode(head["counts"], type=Counts), examples, users,
        np.frombuffer(head["histories"], np.uint8).reshape(len(users), HISTORY_BYTES),
    )  # fmt: skip


def _gathered(
    first: tuple[int, bytes | None], more: Iterator[tuple[int, bytes | None]], until: int | None
) -> tuple[Piece, tuple[int, bytes | None] | None]:
    """A piece of `first` and those after it that were stamped up to `until`, CHUNK at most; and the one after them."""
    values, waiting = [first[1]], None
    for waiting in more:
        if (until is not None and waiting[0] > until) or len(values) == CHUNK:
            break
        values.append(waiting[1])
        waiting = None
    items = [item for value in values if (item := item_in(value, "the backfill")) is not None]
    return Piece(items, len(values), None, sum(len(value or b"") for value in values)), waiting


def snapshot_settings(url: str, origin: Origin, data_dir: Path) -> JoinWorkerSettings:
    """The settings with which LaneSnapshots puts and finds the states of the backfill at `url`."""
    topics = TopicSettings(prefix=origin.topic.removesuffix("events"))
    return JoinWorkerSettings(bootstrap="", data_dir=data_dir, topics=topics, join=origin.settings, snapshots=url)
