"""Recordings made for tests: a log as the live topics would hold it, with offsets, stamps and ticks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from replay.joining import partition_of
from replay.readers import Record
from replay.recording import EVENTS, ITEMS, Recorded, RecordedTopic, RecordingWriter, hour_of
from streams.events import Item, Tick, encode

START_MS = 1_796_000_000_000
TICK_RECORDS = 50


class Log:
    """A log as the records of topics: `rows[topic, partition]`. Stamped 2 ms apart, whatever the events say."""

    def __init__(self, records: Iterable[Record], partitions: int = 4) -> None:
        self.partitions = partitions
        self.rows: dict[tuple[str, int], list[Recorded]] = {(EVENTS, p): [] for p in range(partitions)}
        self.rows[ITEMS, 0] = []
        ts = 0
        for number, record in enumerate(records):
            stamp = START_MS + 2 * number
            if isinstance(record, Item):
                self._put(ITEMS, 0, stamp, str(record.item), encode(record))
            elif not isinstance(record, Tick):
                ts = max(ts, record.ts)
                self._put(EVENTS, partition_of(record.user, partitions), stamp, str(record.user), encode(record))
            if number % TICK_RECORDS == 0 and ts:
                for p in range(partitions):
                    self._put(EVENTS, p, stamp, None, encode(Tick(event_id=f"tick-{p}-{ts}", ts=ts)))

    def record(self, path: Path, until: float = 1.0, rows_per_file: int = 500) -> Path:
        """The first part `until` (0 to 1) of each partition into the recording at `path`, going on from what is there.
        """
        names = {EVENTS: RecordedTopic("events", (0,) * self.partitions), ITEMS: RecordedTopic("items", (0,))}
        writer = RecordingWriter(path, names)
        for (topic, p), rows in self.rows.items():
            wanted = [r for r in rows[: int(until * len(rows))] if r.offset >= writer.next_offset(topic, p)]
            while wanted:
                hour = hour_of(wanted[0].stamp)
                file = [r for r in wanted[:rows_per_file] if hour_of(r.stamp) == hour]
                writer.write(topic, p, writer.next_offset(topic, p), file[-1].offset + 1, file)
                wanted = wanted[len(file) :]
        return path

    def _put(self, topic: str, p: int, stamp: int, key: str | None, value: bytes) -> None:
        rows = self.rows[topic, p]
        rows.append(Recorded(len(rows), stamp, None if key is None else key.encode(), value))
