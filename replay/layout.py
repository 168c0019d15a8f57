"""Any log, laid out as a recording: what the topics would hold, had the log been played onto them.

The rules are those of a direct replay (replay/joining.py): events go to the partition of their user, in the order of
time; after every SLICE records each partition hears the time by a tick, and at the end one that closes what is open. So
the examples are those of `headrace replay --direct`.

The stamps. Of an event the time at which it was laid out (or its own, if that is later): so it is never refused as one
from the future, and the files of years lie in one hour. Of an item the day (UTC) of the record before it, which says
when a trainer may know it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from replay.joining import SLICE, partition_of
from replay.readers import Record
from replay.recording import EVENTS, HOUR_MS, ITEMS, Recorded, RecordedTopic, RecordingWriter
from streams.events import Item, Tick, encode, units
from streams.joiner import JoinSettings

FILE_ROWS = 50_000
ITEM_ROWS = 5_000
DAY_MS = 24 * HOUR_MS


@dataclass
class LaidOut:
    """How far it has come. `events` counts an impression of k items as k."""

    events: int = 0
    items: int = 0
    to_ms: int = 0  # event time


@dataclass
class _Queue:
    """The records of a partition that are in no file yet: of one hour."""

    topic: str
    partition: int
    rows: int
    begin: int = 0
    records: list[Recorded] = field(default_factory=list)

    def put(self, writer: RecordingWriter, stamp: int, key: bytes | None, value: bytes) -> None:
        first = self.records[0].stamp if self.records else stamp
        if len(self.records) >= self.rows or first // HOUR_MS != stamp // HOUR_MS:
            self.flush(writer)
        self.records.append(Recorded(self.begin + len(self.records), stamp, key, value))

    def flush(self, writer: RecordingWriter) -> None:
        if self.records:
            end = self.begin + len(self.records)
            writer.write(self.topic, self.partition, self.begin, end, self.records)
            self.begin, self.records = end, []


def lay_out(
    records: Iterable[Record],
    path: str,
    partitions: int,
    settings: JoinSettings,
    now_ms: int,
    progress: Callable[[LaidOut], None] = lambda so_far: None,
    names: tuple[str, str] = (EVENTS, ITEMS),
) -> LaidOut:
    """Makes the recording `path`, of topics of these `names`, out of records that come by time.

    Raises LogError where there is one already, or it cannot be written.
    """
    topics = {EVENTS: RecordedTopic(names[0], (0,) * partitions), ITEMS: RecordedTopic(names[1], (0,))}
    writer = RecordingWriter(path, topics)
    events = [_Queue(EVENTS, p, FILE_ROWS) for p in range(partitions)]
    items, so_far, rest = _Queue(ITEMS, 0, ITEM_ROWS), LaidOut(), iter(records)

    def tick(ts: int) -> None:
        for partition, queue in enumerate(events):
            value = encode(Tick(event_id=f"tick-{partition}-{ts}", ts=ts))
            queue.put(writer, max(now_ms, ts), None, value)

    while part := list(itertools.islice(rest, SLICE)):
        for record in part:
            if isinstance(record, Item):
                so_far.items += 1
                day = so_far.to_ms // DAY_MS * DAY_MS
                items.put(writer, day, _key(record.item), encode(record))
            elif not isinstance(record, Tick):  # a recorded log has its own; time is told here
                so_far.events += units(record)
                so_far.to_ms = max(so_far.to_ms, record.ts)
                queue = events[partition_of(record.user, partitions)]
                queue.put(writer, max(now_ms, so_far.to_ms), _key(record.user), encode(record))
        tick(so_far.to_ms)
        progress(so_far)
    tick(so_far.to_ms + settings.closing_ms)
    for queue in [*events, items]:
        queue.flush(writer)
    return so_far


def _key(who: Any) -> bytes:
    return str(who).encode("utf-8", "surrogatepass")
