"""Our own records, one JSON object a line: what `headrace simulate --out` writes, or any system that sends them.

Every line is a record of the topic `events` or of `items` (kind item), and is held to the same checks as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from replay.readers import files
from replay.readers.base import LogReader, Record
from replay.readers.values import BadRow
from streams.events import Rejected, decode, decode_item

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
