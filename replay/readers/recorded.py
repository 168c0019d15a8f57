"""Our own records, one JSON object a line: what `headrace simulate --out` writes, or any system that sends them.

Every line is a record of the topic `events` or of `items` (kind item), and is held to the same checks as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from replay.readers import files
from replay.readers.base import LogReader, Record
from replay.readers.values import BadRow
from streams.events import Rejected, decode, decode_item

ITEM = b'"item"'


class Events(LogReader):
    name = "events"
    about = "Headrace's own records as JSON lines, as `headrace simulate --out` writes them"
    has_impressions = True

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
            if ITEM not in raw:
                raise BadRow(refused.reason, refused.detail) from None
        try:
            return [decode_item(raw)]
        except Rejected as refused:
            raise BadRow(refused.reason, refused.detail) from None
