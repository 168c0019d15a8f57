"""Backfill: months of log through the very joiner (streams/joiner.py), partition by partition, into files.

The unit is the Kafka partition: watermark and duplicates are defined in it, so its records must pass one joiner in the
order of their offsets. `join_partition` does that for one, with its state in RocksDB as a join worker has it, so memory
is bounded however long the log is. Engine `local` takes one partition after the other, and is the reference; engine
`spark` (replay/spark/) takes as many at once as the cluster has cores. Both call `join_partition`, and their files are
the same.

1. layout: a log that is no recording is laid out as one (replay/layout.py).
2. join:   each partition: its files, its state, then `done/<partition>.json`.
3. commit: what no partition names is removed, backfill.json is written.

Killed at any moment and run again it comes to the same: partitions that are done are left out, the others begin anew.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from msgspec import Struct

from embedding_store.errors import LogError, UsageError
from online_model.examples import ExamplesDigest
from replay.joining import sum_of
from replay.recording import EVENTS, ITEMS, Recording
from streams.backfill import (
    ABOUT,
    ITEM_ROWS,
    Folder,
    Manifest,
    Origin,
    Part,
    PartWriter,
    snapshot_settings,
)
from streams.backfill import (
    ITEMS as ITEM_COLUMNS,
)
from streams.join_snapshots import LaneSnapshots
from streams.join_store import JoinStore
from streams.joiner import Joiner
from streams.joiner import Record as LogRecord

SLICE = 2_000  # records that are joined and committed at once, and make a block
WRAP = (1 << 64) - 1
STATES = "join"


@dataclass(frozen=True)
class Range:
    """[begin, end) of a partition, by the offsets of the recording. `shift` is added to make those of the backfill."""

    begin: int
    end: int
    shift: int = 0


@dataclass(frozen=True)
class Task:
    """What joins partitions, wherever it runs: small, and plain enough to be sent there."""

    out: str
    origin: Origin
    ranges: dict[int, Range]
    scratch: str | None = None  # a folder for RocksDB; none: where temporary files go

    def done(self, partition: int) -> Part | None:
        """What came of a partition, if that was finished before."""
        raw = Folder(self.out).read(_marker(partition))
        found = msgspec.json.decode(raw, type=_Done) if raw else None
        range_ = self.ranges[partition]
        wanted = (self.origin, range_.begin + range_.shift, range_.end + range_.shift)
        if found is None or (found.origin, found.part.from_offset, found.part.next_offset) != wanted:
            return None
        return found.part


class _Done(Struct, frozen=True):
    origin: Origin
    part: Part


def ranges_of(recording: Recording, before_the_topic: bool) -> dict[int, Range]:
    """The partitions that have records. `before_the_topic`: their offsets are to end at 0."""
    begin, ends = recording.begin(EVENTS), recording.next_offsets(EVENTS)
    return {
        p: Range(begin[p], end, -end if before_the_topic else 0) for p, end in sorted(ends.items()) if end > begin[p]
    }


def join_partition(
    task: Task,
    partition: int,
    records: Iterable[tuple[int, int, bytes | None]],
    heard: Callable[[int], None] = lambda events: None,
) -> Part:
    """Joins (offset, stamp, value) records, by ascending offset, and writes all that comes of one partition.

    `heard` is called after each slice with the events since the last call. Some thousand records, and what a join
    worker holds, are in memory. Raises LogError where the offsets are not those of the range, StoreError.
    """
    folder, range_, origin = Folder(task.out), task.ranges[partition], task.origin
    begin, end = range_.begin + range_.shift, range_.end + range_.shift
    with tempfile.TemporaryDirectory(prefix="headrace-backfill-", dir=task.scratch) as scratch:
        path = Path(scratch) / str(partition)
        settings = snapshot_settings(task.out, origin, Path(scratch))
        digest, row_ids = ExamplesDigest(), 0
        with JoinStore(path, origin.settings, cached=settings.in_memory) as store, PartWriter(folder, partition) as out:
            joiner = Joiner(origin.settings, partition, begin, store.state())
            for some in _slices(records, range_, partition):
                before = joiner.counts.events_in
                joined = joiner.process(some, to_offset=None if some else end)
                store.commit(joined, [])
                joiner.trim(settings.in_memory)
                out.add(joined.block)
                digest.add(joined.block.examples)
                row_ids += int(joined.block.examples.row_id.view("uint64").sum(dtype="uint64"))
                heard(joiner.counts.events_in - before)
            out.close()
            snapshots = LaneSnapshots(settings, partition, path)
            folder.remove(f"{settings.topics.prefix}{STATES}/{partition}")
            snapshots.send(snapshots.copy(store), end, lambda: False)
            counts = joiner.counts
    part = Part(partition, begin, end, digest.rows, row_ids & WRAP, digest.sum, counts, out.files)
    folder.put(_marker(partition), msgspec.json.encode(_Done(origin, part)))
    return part


def _slices(
    records: Iterable[tuple[int, int, bytes | None]], range_: Range, partition: int
) -> Iterator[list[LogRecord]]:
    """SLICE records at a time; at the end an empty slice, where offsets without a record are left."""
    last, rest = range_.begin - 1, iter(records)
    while some := list(itertools.islice(rest, SLICE)):
        for offset, _, _ in some:
            if not last < offset < range_.end:
                expected = f"an offset above {last} and below {range_.end}"
                raise LogError(f"partition {partition}: offset {offset} where {expected} is next: record it again")
            last = offset
        yield [LogRecord(offset + range_.shift, stamp, value) for offset, stamp, value in some]
    if last + 1 < range_.end:
        yield []


Engine = Callable[[Task, Recording, list[int]], None]


def join_locally(
    task: Task, recording: Recording, partitions: list[int], heard: Callable[[int], None] = lambda events: None
) -> None:
    """One partition after the other, in this process."""
    for partition in partitions:
        end = task.ranges[partition].end
        records = ((r.offset, r.stamp, r.value) for r in recording.records(EVENTS, partition) if r.offset < end)
        join_partition(task, partition, records, heard)


def existing(out: str, origin: Origin) -> Manifest | None:
    """The backfill that is at `out` already. Raises UsageError where it is of something else."""
    raw = Folder(out).read(ABOUT)
    if raw is None:
        return None
    try:
        found = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError:
        found = None
    if found is None or found.origin != origin:
        raise UsageError(f"{out} holds a backfill of another log, or with other settings: choose another --out")
    return found


def backfill(task: Task, recording: Recording, engine: Engine) -> Manifest:
    """The whole of it, but what is done already. Raises UsageError, LogError, StoreError."""
    folder = Folder(task.out)
    there = existing(task.out, task.origin)
    waiting = [p for p in task.ranges if task.done(p) is None]
    if there is not None and (waiting or {p.partition for p in there.parts} != set(task.ranges)):
        folder.remove(ABOUT)  # the recording has grown: until all of it is joined there is none
    if waiting:
        engine(task, recording, waiting)
    parts = [part for p in task.ranges if (part := task.done(p)) is not None]
    if len(parts) < len(task.ranges):
        missing = sorted(set(task.ranges) - {part.partition for part in parts})
        raise LogError(f"partitions {missing} came to no end: look at what the engine said, and run it again")
    items, item_files = _copy_items(folder, recording)
    for kind in ("examples", "blocks"):
        folder.sweep(kind, [f"partition={part.partition}/{name}" for part in parts for name in part.files])
    folder.sweep("items", item_files)
    digest = ExamplesDigest()
    digest.rows, digest.sum = sum(p.rows for p in parts), sum(p.digest for p in parts) & WRAP
    manifest = Manifest(task.origin, parts, digest.hexdigest(), items, item_files)
    folder.put(ABOUT, msgspec.json.format(msgspec.json.encode(manifest)))
    return manifest


def _copy_items(folder: Folder, recording: Recording) -> tuple[int, list[str]]:
    """The catalogue's records in their order: how many, and the files."""
    if ITEMS not in recording.about.topics:
        return 0, []
    partitions = range(len(recording.begin(ITEMS)))
    rest = ((r.stamp, r.value) for p in partitions for r in recording.records(ITEMS, p))
    count, files = 0, list[str]()
    while some := list(itertools.islice(rest, ITEM_ROWS)):
        name = f"part-{len(files):05}.parquet"
        with folder.writing(f"items/{name}", ITEM_COLUMNS) as writer:
            stamps, values = zip(*some, strict=True)
            columns = [pa.array(stamps, pa.int64()), pa.array(values, pa.binary())]
            writer.write_batch(pa.record_batch(columns, schema=ITEM_COLUMNS))
        files.append(name)
        count += len(some)
    return count, files


def figures(manifest: Manifest) -> dict[str, Any]:
    """What `headrace backfill --json` says of it."""
    counts = sum_of(part.counts for part in manifest.parts)
    names = ("events_in", "rejected", "duplicates", "late", "joined", "history_only", "open", "set_aside")
    return {
        "events_in": counts.events_in,
        "examples": sum(part.rows for part in manifest.parts),
        "examples_digest": manifest.examples_digest,
        "balance": {name: getattr(counts, name) for name in names},
        "partitions": {part.partition: part.next_offset for part in manifest.parts},
        "items": manifest.items,
    }


def _marker(partition: int) -> str:
    return f"done/{partition}.json"
