"""A recording: topics of the live cluster as Parquet files, by hour, on any file system that fsspec knows.

    DIR/recording.json                            format, topics, and the offsets at which they begin: written once
    DIR/topic=events/hour=2026-11-30T02/0003-000000000000120-000000000000890.parquet
    DIR/topic=events/_gap-0003-000000000000890-000000000000950     deleted by Kafka before it was recorded

A file's name is its partition and its range [from, to) of offsets: it has every record of that range (transaction
markers and what compaction removed leave holes), all stamped by the broker in that hour, UTC. A file is there whole or
not at all, so the names alone say how far the recording is. Columns: partition int32, offset int64, stamp int64 (the
broker's, ms UTC), key and value binary (null value: a tombstone); rows in the order of offsets; zstd.

`spark.read.parquet(DIR + "/topic=events")` and `pyarrow.dataset` read it as a table partitioned by `hour`.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.core
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from msgspec import Struct

from embedding_store.copies import sync_directory
from embedding_store.errors import LogError, PositionError, UsageError

FORMAT = 1
ABOUT = "recording.json"
EVENTS, ITEMS = "events", "items"
SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("stamp", pa.int64(), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
    ]
)
GROUP_ROWS = 8_192  # of a row group: what a reader holds
HOUR_MS = 3_600_000
_RANGE = r"(\d{4,})-(\d{15,})-(\d{15,})"
_FILE = re.compile(rf"hour=(\d{{4}}-\d\d-\d\dT\d\d)/{_RANGE}\.parquet")
_GAP = re.compile(rf"_gap-{_RANGE}")
_PARTIAL = ".partial"  # of names that begin with a dot: no reader of Parquet looks at them
_SINGLE_PUT = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}  # elsewhere half a file can be seen: write, rename


class Recorded(NamedTuple):
    """A record of a partition. `stamp`: ms UTC, the broker's."""

    offset: int
    stamp: int
    key: bytes | None
    value: bytes | None


class RecordedTopic(Struct, frozen=True, forbid_unknown_fields=True):
    """A topic by its name in the cluster. `begin`: the offset of each partition at which its recording begins."""

    name: str
    begin: tuple[int, ...]


class About(Struct, frozen=True, forbid_unknown_fields=True):
    """What recording.json says."""

    topics: dict[str, RecordedTopic]
    format: int = FORMAT


class RecordedFile(NamedTuple):
    """A file of a recording: all records with from_offset <= offset < to_offset. `hour`: as 2026-11-30T02, UTC.

    `path` is that of the file system; `""` stands for a range that Kafka had deleted before it was recorded.
    """

    partition: int
    from_offset: int
    to_offset: int
    hour: str
    path: str


def is_recording(path: str | Path) -> bool:
    """Whether there is a recording at `path`, a local one or a URL. Raises LogError where that cannot be seen."""
    folder = _Folder(str(path))
    return folder.read(ABOUT) is not None


class Recording:
    """What is recorded at `path`, a local directory or a URL, as it was when this was opened.

    Raises LogError where there is no recording, one of another format, or one that leaves out or repeats offsets.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._folder = str(path), _Folder(str(path))
        self.about = _about(self._folder)
        self._files = {topic: self._found(topic) for topic in self.about.topics}

    @property
    def partitions(self) -> int:
        """Of the topic of events."""
        return len(self.about.topics[EVENTS].begin)

    def begin(self, topic: str) -> tuple[int, ...]:
        """The offset of each partition at which the recording begins."""
        return self.about.topics[topic].begin

    def next_offsets(self, topic: str) -> dict[int, int]:
        """partition → the first offset that is not recorded."""
        ends = dict(enumerate(self.begin(topic)))
        for file in self._files[topic]:
            ends[file.partition] = file.to_offset
        return ends

    def next_places(self) -> dict[tuple[str, int], int]:
        """(name of a topic in the cluster, partition) → the first offset that is not recorded."""
        topics = self.about.topics
        return {(topics[topic].name, p): at for topic in topics for p, at in self.next_offsets(topic).items()}

    def files(self, topic: str) -> list[RecordedFile]:
        """By partition and offset."""
        return [file for file in self._files[topic] if file.path]

    def gaps(self, topic: str) -> list[RecordedFile]:
        """The ranges that Kafka had deleted before they were recorded."""
        return [file for file in self._files[topic] if not file.path]

    def records(
        self, topic: str, partition: int, from_offset: int | None = None, hours: Collection[str] | None = None
    ) -> Iterator[Recorded]:
        """The records of a partition in the order of their offsets, from `from_offset` on, of these `hours` only.

        Some thousand records are held. Raises LogError for a file that cannot be read or is not what its name says.
        """
        for file in self.files(topic):
            if file.partition != partition or (from_offset is not None and file.to_offset <= from_offset):
                continue
            if hours is None or file.hour in hours:
                yield from self._rows(file, -1 if from_offset is None else from_offset)

    def identity(self) -> list[Any]:
        """What tells this recording, as far as it goes, from another one."""
        return [self.about.topics[EVENTS].name, *(sorted(self.next_offsets(topic).items()) for topic in self._files)]

    def _rows(self, file: RecordedFile, from_offset: int) -> Iterator[Recorded]:
        with _explained(file.path), self._folder.system.open(file.path, "rb") as source:
            table = pq.ParquetFile(source)
            if missing := set(SCHEMA.names) - set(table.schema_arrow.names):
                raise LogError(f"{file.path}: no column {', '.join(sorted(missing))}: this is no file of a recording")
            last = file.from_offset - 1
            for batch in table.iter_batches(GROUP_ROWS, columns=SCHEMA.names, use_threads=False):
                offsets = batch.column("offset").to_numpy()
                partitions = batch.column("partition").to_numpy()
                if not len(offsets):
                    continue
                ordered = offsets[0] > last and bool((np.diff(offsets) > 0).all())
                last = int(offsets[-1])
                if not ordered or last >= file.to_offset or (partitions != file.partition).any():
                    raise LogError(f"{file.path}: its offsets are not those of its name: record it again")
                values = [batch.column(name).to_pylist() for name in SCHEMA.names[2:]]
                for record in map(Recorded, offsets.tolist(), *values):
                    if record.offset >= from_offset:
                        yield record

    def _found(self, topic: str) -> list[RecordedFile]:
        """The files and gaps of a topic by partition and offset, each going on where the one before it ends."""
        found: list[RecordedFile] = []
        begin = self.begin(topic)
        for name in self._folder.names(f"topic={topic}"):
            path = f"{self._folder.root}/topic={topic}/{name}"
            if match := _FILE.fullmatch(name):
                hour, *numbers = match.groups()
            elif match := _GAP.fullmatch(name):
                hour, path, numbers = "", "", list(match.groups())
            elif name.endswith(".parquet"):
                raise LogError(f"{path}: not a file of a recording: take it away")
            else:
                continue
            partition, start, end = map(int, numbers)
            found.append(RecordedFile(partition, start, end, hour, path))
        found.sort()
        ends = dict(enumerate(begin))
        for file in found:
            where = f"{self.path}, {topic}, partition {file.partition}"
            if file.partition not in ends:
                raise LogError(f"{where}: the topic has {len(begin)} partitions: take away {file.path}")
            expected = ends[file.partition]
            if file.from_offset > expected:
                raise LogError(f"{where}: offsets {expected} to {file.from_offset} are missing: bring their file back")
            if file.from_offset < expected:
                raise LogError(f"{where}: offsets {file.from_offset} to {expected} are there twice: take one file away")
            ends[file.partition] = file.to_offset
        return found


class RecordingWriter:
    """Adds files to the recording at `path`, or begins one. One writer at a time: see to it with a lock.

    `topics`: those that are recorded; where there is a recording already, it keeps the offsets at which it began.
    Raises LogError as Recording does, UsageError where it is of other topics.
    """

    def __init__(self, path: str | Path, topics: Mapping[str, RecordedTopic]) -> None:
        self.path, self._folder = str(path), _Folder(str(path))
        if self._folder.read(ABOUT) is None:
            self._folder.put(ABOUT, msgspec.json.format(msgspec.json.encode(About(dict(topics)))))
        recording = Recording(path)
        there = {name: (topic.name, len(topic.begin)) for name, topic in recording.about.topics.items()}
        wanted = {name: (topic.name, len(topic.begin)) for name, topic in topics.items()}
        if there != wanted:
            said = "; ".join(f"{name} of {count} partitions" for name, count in there.values())
            raise UsageError(f"{path} is a recording of {said}: record these topics into another directory")
        self._next = {topic: recording.next_offsets(topic) for topic in topics}
        self._folder.remove_partial()

    def next_offset(self, topic: str, partition: int) -> int:
        """Where to go on recording."""
        return self._next[topic][partition]

    def write(self, topic: str, partition: int, from_offset: int, to_offset: int, records: Sequence[Recorded]) -> None:
        """Adds the file of [from_offset, to_offset): all its records, at least one, of one hour by their stamps.

        It is there, and on the disk, when this returns. Raises PositionError where it does not go on from the file
        before it or the records are not of the range; LogError where it cannot be written: nothing of it is there then.
        """
        self._check(topic, partition, from_offset, to_offset)
        offsets = [record.offset for record in records]
        hours = {record.stamp // HOUR_MS for record in records}
        inside = bool(offsets) and from_offset <= offsets[0] and offsets[-1] < to_offset
        if not inside or len(hours) != 1 or any(a >= b for a, b in itertools.pairwise(offsets)):
            raise PositionError(f"{topic}, partition {partition}: these are no records of one hour in [{from_offset}, "
                                f"{to_offset}), in their order")  # fmt: skip
        columns = [[partition] * len(records), *map(list, zip(*records, strict=True))]
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
        packed = io.BytesIO()
        pq.write_table(table, packed, compression="zstd", row_group_size=GROUP_ROWS)
        name = f"topic={topic}/hour={hour_of(records[0].stamp)}/{_name(partition, from_offset, to_offset)}.parquet"
        self._folder.put(name, packed.getvalue())
        self._next[topic][partition] = to_offset

    def gap(self, topic: str, partition: int, from_offset: int, to_offset: int) -> None:
        """States that Kafka had deleted [from_offset, to_offset) before it was recorded. Raises as `write` does."""
        self._check(topic, partition, from_offset, to_offset)
        said = b"Kafka had deleted these offsets before they were recorded\n"
        self._folder.put(f"topic={topic}/_gap-{_name(partition, from_offset, to_offset)}", said)
        self._next[topic][partition] = to_offset

    def _check(self, topic: str, partition: int, from_offset: int, to_offset: int) -> None:
        expected = self._next[topic][partition]
        if from_offset != expected or to_offset <= from_offset:
            raise PositionError(f"{topic}, partition {partition}: offset {expected} is to be recorded next, not the "
                                f"range [{from_offset}, {to_offset})")  # fmt: skip


def hour_of(stamp: int) -> str:
    """The hour of a time in ms UTC, as 2026-11-30T02."""
    return _hour(stamp // HOUR_MS)


@lru_cache(maxsize=16)
def _hour(hours: int) -> str:
    return datetime.fromtimestamp(hours * 3600, UTC).strftime("%Y-%m-%dT%H")


def _name(partition: int, from_offset: int, to_offset: int) -> str:
    return f"{partition:04}-{from_offset:015}-{to_offset:015}"


def _about(folder: _Folder) -> About:
    raw = folder.read(ABOUT)
    if raw is None:
        raise LogError(f"{folder.url}: no recording is there (no {ABOUT}): check the path; `headrace record` makes one")
    try:
        about = msgspec.json.decode(raw, type=About)
    except msgspec.DecodeError as error:
        raise LogError(f"{folder.url}/{ABOUT}: {error}; bring the file back as it was") from None
    if about.format != FORMAT or EVENTS not in about.topics:
        raise LogError(f"{folder.url} is a recording of format {about.format}; this version reads {FORMAT}")
    return about


class _Folder:
    """The directory of a recording, wherever it lies."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.system, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError, OSError) as error:
            raise LogError(f"{url}: {error}; install what it needs, or choose another address") from None
        self._local = isinstance(self.system, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        with _explained(self.url):
            try:
                return self.system.cat_file(f"{self.root}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                return None

    def names(self, folder: str) -> list[str]:
        """The files below `folder`, by their paths in it."""
        with _explained(self.url):
            self.system.invalidate_cache()  # a recorder writes here
            found = self.system.find(f"{self.root}/{folder}")
        return [str(path).rpartition(f"/{folder}/")[2] for path in found]

    def put(self, name: str, data: bytes) -> None:
        """Whole, or not at all."""
        path = f"{self.root}/{name}"
        folder, _, base = path.rpartition("/")
        partial = f"{folder}/.{base}{_PARTIAL}"
        with _explained(path):
            self.system.makedirs(folder, exist_ok=True)
            if self._local:
                with open(partial, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(partial, path)
                sync_directory(Path(folder))
            elif _SINGLE_PUT.isdisjoint([self.system.protocol] if isinstance(self.system.protocol, str)
                                        else self.system.protocol):  # fmt: skip
                self.system.pipe_file(partial, data)
                self.system.mv(partial, path)
            else:
                self.system.pipe_file(path, data)

    def remove_partial(self) -> None:
        """What a writer that was killed had begun."""
        with _explained(self.url):
            for path in self.system.find(self.root):
                base = str(path).rpartition("/")[2]
                if base.startswith(".") and base.endswith(_PARTIAL):
                    self.system.rm_file(path)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What a file system, or Parquet, says is wrong, in one line."""
    client = sys.modules.get("aiohttp")  # where a file system uses it
    errors = (OSError, pa.ArrowException, *([client.ClientError] if client else []))
    try:
        yield
    except errors as error:
        text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise LogError(f"{path}: {text}; check it, its rights, and the room that is left") from None
