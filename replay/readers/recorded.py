"""Our own records: one JSON object a line, as `headrace simulate --out` or any other system writes them, or a recording
of the live topics.

Each is a record of the topic `events` or of `items` (kind item), and is held to the same checks as there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from embedding_store.errors import UsageError
from replay.readers import files
from replay.readers.base import LogReader, Record
from replay.readers.settings import ColumnMapping
from replay.readers.values import BadRow, SetAside
from replay.recording import EVENTS, ITEMS, Recording
from streams.events import Impression, Rejected, Tick, decode, decode_item, decode_many

IMPRESSION, LOOK_AHEAD = '"impression"', 10_000


class Events(LogReader):
    name = "events"
    about = "Headrace's own records as JSON lines, as `headrace simulate --out` writes them"

    def __init__(self, path: str, max_rejected_share: float = 0.01) -> None:
        super().__init__(path, max_rejected_share)
        self._impressions: bool | None = None

    @property
    def has_impressions(self) -> bool:  # type: ignore[override]
        """Whether there is an impression among its first 10,000 lines."""
        if self._impressions is None:
            first = itertools.islice(self._explained(self.source()), LOOK_AHEAD)
            self._impressions = any(IMPRESSION in line for _, line in first)
        return self._impressions

    def source(self) -> Iterator[tuple[int, str]]:
        with files.open_bytes(self.path) as file, files.open_text(file, self.path) as text:
            for number, line in files.lines(text, self.path):
                if not line.isspace():
                    yield number, line

    def convert(self, row: str, number: int) -> Iterable[Record]:
        raw = row.encode()
        try:
            return [decode(raw)]
        except Rejected as refused:
            if refused.reason != "unknown_kind":
                raise BadRow(refused.reason, refused.detail) from None
        try:
            return [decode_item(raw)]
        except Rejected as refused:
            raise BadRow(refused.reason, refused.detail) from None


class RecordedTopics(LogReader):
    """`source` gives (topic, value): the catalogue first, then the events as the broker stamped them."""

    name = "recording"
    about = "a recording of the live topics, as `headrace record` makes it: the directory"

    def __init__(self, path: str, max_rejected_share: float = 0.01) -> None:
        super().__init__(path, max_rejected_share)
        self.recording = Recording(path)
        self._impressions: bool | None = None

    @classmethod
    def open(cls, path: str | Path, max_rejected_share: float = 0.01, columns: ColumnMapping | None = None) -> Self:
        if columns is not None and columns != ColumnMapping():
            raise UsageError("a recording has its own columns: leave out [log.columns]")
        return cls(str(path), max_rejected_share)

    @property
    def has_impressions(self) -> bool:  # type: ignore[override]
        """Whether there is an impression among its first 10,000 events."""
        if self._impressions is None:
            first = itertools.islice(self._values(EVENTS), LOOK_AHEAD)
            self._impressions = any(isinstance(event, Impression) for event in decode_many(list(first)))
        return self._impressions

    def identity(self) -> list[Any]:
        return [self.path, *self.recording.identity()]

    def source(self) -> Iterator[tuple[int, tuple[str, bytes | None]]]:
        topics = [topic for topic in (ITEMS, EVENTS) if topic in self.recording.about.topics]
        rows = ((topic, value) for topic in topics for value in self._values(topic))
        yield from enumerate(rows, 1)

    def convert(self, row: tuple[str, bytes | None], number: int) -> Iterable[Record]:
        topic, value = row
        try:
            if topic == ITEMS:
                if value is None:
                    raise SetAside("tombstone", "the catalogue forgets an item")
                return [decode_item(value)]
            event = decode(value)
        except Rejected as refused:
            raise BadRow(refused.reason, refused.detail) from None
        return [] if isinstance(event, Tick) else [event]  # time in idle partitions: who replays it tells it anew

    def _values(self, topic: str) -> Iterator[bytes | None]:
        """Of all partitions, by (stamp, partition, offset)."""
        partitions = range(len(self.recording.begin(topic)))
        lanes = [((r.stamp, p, r.offset, r.value) for r in self.recording.records(topic, p)) for p in partitions]
        return (value for _, _, _, value in heapq.merge(*lanes))
