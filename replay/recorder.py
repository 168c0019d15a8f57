"""The recorder: live topics into a recording. It keeps no state but the recording itself.

1. read:  records wait in memory, by partition;
2. write: what waits of a partition becomes a file when its hour is over, when it is so many rows or bytes, when the
          first of it has waited so long, and at the end;
3. go on: at the offset behind the last file, also after a start.

Killed between 1 and 2, the records are read again: Kafka has them. Killed in 2, the file is there, or it is not. So no
record is lost or there twice. What Kafka deleted before it was recorded is stated in the recording, and said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from embedding_store.errors import LogError
from replay.live_topics import LiveTopics, OffsetsGone, Place, offsets
from replay.recording import EVENTS, HOUR_MS, ITEMS, Recorded, RecordedTopic, RecordingWriter, is_recording
from streams.events import Rejected, decode_many, units
from streams.kafka_clients import Bootstrap
from streams.topics import TopicSettings

POLL_S = 0.5
QUIET_S = 2.0  # of an hour that is over nothing more comes after so long: else much of it may still be on its way
FILE_BYTES = 32 << 20  # of keys and values in a file
WAITING_BYTES = 256 << 20  # … and in memory


class RecorderSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """When a file is closed, besides at the end of its hour."""

    rows_per_file: Annotated[int, Meta(ge=1)] = 100_000
    file_seconds: Annotated[float, Meta(gt=0)] = 60.0  # since its first record came


@dataclass
class RecordedSoFar:
    """What a run has added. `events` counts an impression of k items as k, as the joiner's balance does."""

    events: int = 0
    records: int = 0
    items: int = 0
    files: int = 0
    gaps: list[tuple[str, int, int, int]] = field(default_factory=list)  # topic, partition, from, to
    seconds: float = 0.0


@dataclass
class _Waiting:
    """What was read of a partition and is in no file yet."""

    records: list[Recorded] = field(default_factory=list)
    bytes: int = 0
    since: float = 0.0  # its first record is here
    touched: float = 0.0  # its last one is here


class Recorder:
    """Records `events` and `items` of a cluster into the recording at `path`, which is begun where there is none.

    A new recording begins at the ends of the partitions of events, or with `from_beginning` at what Kafka still has of
    them; the catalogue is always recorded whole. See to it that there is one recorder a directory.

    `said` is told, in one line, of records that Kafka deleted before they were recorded. Raises BrokerError, LogError,
    UsageError.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topics: TopicSettings,
        path: str | Path,
        settings: RecorderSettings | None = None,
        from_beginning: bool = False,
        said: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings, self.so_far, self._said = settings or RecorderSettings(), RecordedSoFar(), said
        self._bootstrap = bootstrap
        self._roles = {topics.events: EVENTS, topics.items: ITEMS}
        there = is_recording(path)
        begin = {}  # where there is one already, only the number of partitions matters
        for name, role in self._roles.items():
            whole = from_beginning or there or role == ITEMS
            begin[role] = RecordedTopic(name, tuple(offsets(bootstrap, name, beginning=whole)))
        self._writer = RecordingWriter(path, begin)
        self._waiting: dict[Place, _Waiting] = {
            (name, p): _Waiting() for name, role in self._roles.items() for p in range(len(begin[role].begin))
        }

    def run(
        self,
        stop: Callable[[], bool],
        seconds: float | None = None,
        to_end: bool = False,
        progress: Callable[[RecordedSoFar], None] = lambda so_far: None,
    ) -> RecordedSoFar:
        """Records until `stop` says so, for so long, or (`to_end`) up to where the topics end now; then writes what
        waits."""
        started = time.monotonic()
        with self._connected() as live:
            ends = live.committed_ends() if to_end else None
            while not stop() and (seconds is None or time.monotonic() - started < seconds):
                self._read(live)
                self._write_due()
                self.so_far.seconds = time.monotonic() - started
                progress(self.so_far)
                if ends is not None and all(live.position(place) >= end for place, end in ends.items()):
                    break
            for place in self._waiting:
                self._write(place)
        self.so_far.seconds = time.monotonic() - started
        progress(self.so_far)
        return self.so_far

    def _connected(self) -> LiveTopics:
        while True:
            try:
                return LiveTopics(self._bootstrap, {place: self._next(place) for place in self._waiting})
            except OffsetsGone as gone:
                self._state_gap(gone)

    def _read(self, live: LiveTopics) -> None:
        try:
            for place, records in live.poll(POLL_S):
                self._take(place, records)
        except OffsetsGone as gone:
            self._state_gap(gone)
            live.seek(gone.place, self._next(gone.place))

    def _take(self, place: Place, records: list[Recorded]) -> None:
        waiting = self._waiting[place]
        for record in records:
            last = waiting.records[-1] if waiting.records else None
            if last is not None and (
                record.stamp // HOUR_MS != last.stamp // HOUR_MS
                or len(waiting.records) >= self.settings.rows_per_file
                or waiting.bytes >= FILE_BYTES
            ):
                self._write(place)
            waiting.touched = time.monotonic()
            if not waiting.records:
                waiting.since = waiting.touched
            waiting.records.append(record)
            waiting.bytes += len(record.key or b"") + len(record.value or b"")

    def _write_due(self) -> None:
        now, hour = time.monotonic(), int(time.time() * 1000) // HOUR_MS
        for place, waiting in self._waiting.items():
            if not waiting.records:
                continue
            over = waiting.records[-1].stamp // HOUR_MS < hour and now - waiting.touched >= QUIET_S
            if over or now - waiting.since >= self.settings.file_seconds:
                self._write(place)
        while sum(waiting.bytes for waiting in self._waiting.values()) > WAITING_BYTES:
            self._write(max(self._waiting, key=lambda place: self._waiting[place].bytes))

    def _write(self, place: Place) -> None:
        """What waits of a partition becomes a file."""
        waiting, role = self._waiting[place], self._roles[place[0]]
        records = waiting.records
        if not records:
            return
        self._writer.write(role, place[1], self._next(place), records[-1].offset + 1, records)
        waiting.records, waiting.bytes = [], 0
        self.so_far.files += 1
        if role == ITEMS:
            self.so_far.items += len(records)
            return
        self.so_far.records += len(records)
        for event in decode_many([record.value for record in records]):
            self.so_far.events += 1 if isinstance(event, Rejected) else units(event)

    def _next(self, place: Place) -> int:
        """The first offset that is in no file."""
        return self._writer.next_offset(self._roles[place[0]], place[1])

    def _state_gap(self, gone: OffsetsGone) -> None:
        """What waits becomes a file, and what Kafka has deleted behind it is stated."""
        self._write(gone.place)
        topic, partition = gone.place
        start = self._next(gone.place)
        if start >= gone.earliest:
            raise LogError(
                f"{self._writer.path} has offsets of {topic}, partition {partition}, that Kafka does not have, which "
                f"ends at {gone.end}: it is of another cluster; record into another directory"
            )
        self._writer.gap(self._roles[topic], partition, start, gone.earliest)
        self.so_far.gaps.append((topic, partition, start, gone.earliest))
        self._said(
            f"{topic}, partition {partition}: Kafka had deleted the records {start} to {gone.earliest} before they "
            "were recorded; the recording says so"
        )
