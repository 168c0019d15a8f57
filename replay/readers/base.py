"""What every log reader does: read rows, turn each into events, count the rows that are wrong, and say so plainly.

A reader of a delimited file is a `DelimitedReader` with `columns` and `convert`. A reader of anything else is a
`LogReader` with `source` and `convert`. Neither keeps more in memory than one row and the catalogue filter.
"""

from __future__ import annotations

import gzip
import heapq
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self, TextIO, TypeAlias, TypeVar

from embedding_store.errors import LogError
from streams.events import MAX_TIME_MS, Event, Item

Record: TypeAlias = Event | Item
Row = TypeVar("Row")

MAX_ID = 10**18 - 1  # fits into 64 bits, which JSON numbers must
MAX_LINE = 1_000_000  # characters; a longer "line" means that the file is not made of lines
MIN_ROWS = 100  # before so many rows no share of rejected ones is judged
KNOWN_ITEMS = 500_000  # catalogue records remembered; past that they are forgotten and told again, which is harmless
SORT_RECORDS = 1_000_000  # records held to put a log in time order, about 300 MB


class BadRow(Exception):
    """A row that cannot become events. `reason` is one word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class LogReader(ABC):
    """Iterates over the events of a log, in the order of its rows; an Item comes just before the first event of that
    item, and again when its record has changed. Every iteration starts at the top and counts anew.

    `rows` is the number of rows read so far, `rejected` counts the bad ones among them by reason.
    Raises LogError while iterating: see `records`.
    """

    name: ClassVar[str]
    has_impressions: ClassVar[bool]  # False: the joiner must run with `implicit`, and no click rate can be claimed

    def __init__(self, path: Path, max_rejected_share: float = 0.01) -> None:
        self.path, self.max_rejected_share = path, max_rejected_share
        self.rows = 0
        self.rejected: Counter[str] = Counter()

    @classmethod
    def open(cls, path: str | Path, max_rejected_share: float = 0.01) -> Self:
        """A reader of the file at `path`. LogError if it is missing, empty or not a file."""
        path = Path(path)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise LogError(f"{path}: {error.strerror}; check the path of the log") from None
        if not path.is_file():
            raise LogError(f"{path}: not a file; name the log file itself")
        if size == 0:
            raise LogError(f"{path}: the file is empty; copy or download it again")
        return cls(path, max_rejected_share)

    def __iter__(self) -> Iterator[Record]:
        return new_items(self.records())

    @abstractmethod
    def source(self) -> Iterator[tuple[int, Sequence[str] | BadRow]]:
        """The rows of the file with their line numbers (from 1); what cannot be taken apart as a BadRow. The errors
        of reading and unpacking are explained by `records`."""

    @abstractmethod
    def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
        """The events of one row, each after the Item it names, if the log tells about items. Raises BadRow.

        Event ids and request ids follow from the row and its number alone. All checks come before the first
        record, so that a row is either all events or rejected.
        """

    def records(self) -> Iterator[Record]:
        """All events in the order of the rows, with an Item before every event that tells of one, new or not.

        Raises LogError with one line: unreadable, cut short, corrupt, not text, or not of this format (more than
        `max_rejected_share` of the rows are bad, judged from 100 rows on, or no row is good).
        """
        self.rows = 0
        self.rejected.clear()
        first_bad = ""
        for number, row in self._explained(self.source()):
            self.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                yield from self.convert(row, number)
            except BadRow as bad:
                self.rejected[bad.reason] += 1
                first_bad = first_bad or f"line {number}, {bad}"
                self._judge(first_bad)
            if self.rows == MIN_ROWS:
                self._judge(first_bad)
        if self.rows == 0:
            raise LogError(f"{self.path}: there is no row in it; copy or download it again")
        if self.rejected.total() == self.rows:
            raise self._wrong_format(first_bad)

    def _judge(self, first_bad: str) -> None:
        if self.rows >= MIN_ROWS and self.rejected.total() > self.max_rejected_share * self.rows:
            raise self._wrong_format(first_bad)

    def _wrong_format(self, first_bad: str) -> LogError:
        return LogError(
            f"{self.path}: not a {self.name} log, {self.rejected.total():,} of the first {self.rows:,} rows are wrong;"
            f" the first is {first_bad}; check the file and the name of its format"
        )

    def _explained(self, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """`rows`, with what goes wrong in reading them said in one line."""
        after = 0
        try:
            for after, row in rows:
                yield after, row
        except EOFError:
            raise LogError(f"{self.path}: cut short after line {after:,}; copy or download it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise LogError(f"{self.path}: corrupt gzip after line {after:,} ({error}); download it again") from None
        except UnicodeDecodeError:
            raise LogError(f"{self.path}: not UTF-8 text after line {after:,}; is this the log file?") from None
        except OSError as error:
            raise LogError(f"{self.path}: {error.strerror or error}; check the file and its rights") from None


class DelimitedReader(LogReader):
    """A text file of one row a line, plain or gzip. `convert` gets the values of `columns`, in that order."""

    delimiters: ClassVar[str] = ","  # of more than one, the file's is the first that stands in its first line
    columns: ClassVar[tuple[str, ...]]
    header: ClassVar[bool] = False  # True: the first line names the columns, in any order and among others
    line = ""  # the text of the row that is being converted

    def source(self) -> Iterator[tuple[int, Sequence[str] | BadRow]]:
        delimiter, width, places = "", len(self.columns), None
        with open_text(self.path) as file:
            for number, line in lines(file, self.path):
                if not delimiter:
                    delimiter = next((d for d in self.delimiters if d in line), self.delimiters[0])
                    if self.header:
                        names = line.split(delimiter)
                        width, places = len(names), self._places(names)
                        continue
                self.line, row = line, line.split(delimiter)
                if len(row) != width:
                    yield number, BadRow("columns", f"{len(row)} columns, not {width}")
                else:
                    yield number, row if places is None else [row[place] for place in places]

    def _places(self, names: list[str]) -> list[int]:
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise LogError(
                f"{self.path}: not a {self.name} log, its first line does not name {', '.join(missing)};"
                " check the file and the name of its format"
            )
        return [names.index(column) for column in self.columns]


def open_text(path: Path) -> TextIO:
    """The text of a file, UTF-8, unpacked if it is gzip by its first bytes or by its name."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"
    if packed:
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without their ends, with their numbers from 1."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise LogError(f"{path}: line {number:,} is longer than {MAX_LINE:,} characters; is this the log file?")
        line = line.rstrip("\r\n")
        if line and not line.isspace():
            yield number, line


def whole(text: str, reason: str, most: int = MAX_ID) -> int:
    """A whole number from 0 to `most`. Raises BadRow(reason)."""
    if not text.isdecimal() or len(text) > 18 or int(text) > most:
        raise BadRow(reason, f"{text[:40]!r} is not a whole number of 0 to {most:,}")
    return int(text)


def millis(text: str, scale: int = 1) -> int:
    """A time in ms from a whole number of units of `scale` ms. Raises BadRow("time")."""
    return whole(text, "time", MAX_TIME_MS // scale) * scale


def new_items(records: Iterable[Record]) -> Iterator[Record]:
    """Leaves out the Items that say nothing new."""
    known: dict[str | int, Item] = {}
    for record in records:
        if isinstance(record, Item):
            if known.get(record.item) == record:
                continue
            if len(known) >= KNOWN_ITEMS:
                known.clear()
            known[record.item] = record
        yield record


def in_time_order(log: LogReader, hold: int = SORT_RECORDS) -> Iterator[Record]:
    """The records of `log` by time, rows of one time in the order of the file; Items stay before their event.

    Holds at most `hold` records: any log up to that size comes out sorted, a longer one if no record is further than
    that from its place; else LogError. (A sort on disk can take this function's place.)
    """
    return new_items(_sorted(log, _timed(log.records()), hold))


def _timed(records: Iterable[Record]) -> Iterator[tuple[int, int, Record]]:
    """(time, number, record); an Item has the time of the event after it."""
    waiting: list[Item] = []
    number = 0
    for record in records:
        if isinstance(record, Item):
            waiting.append(record)
            continue
        for item in waiting:
            yield record.ts, number, item
            number += 1
        waiting.clear()
        yield record.ts, number, record
        number += 1


def _sorted(log: LogReader, timed: Iterator[tuple[int, int, Record]], hold: int) -> Iterator[Record]:
    held: list[tuple[int, int, Record]] = []
    for entry in timed:
        held.append(entry)
        if len(held) == hold:
            break
    held.sort()  # a sorted list is a heap, too
    reached = 0
    for entry in timed:
        ts, _, record = heapq.heappushpop(held, entry)
        if ts < reached:
            raise LogError(
                f"{log.path}: too far out of time order to be sorted in memory ({hold:,} records);"
                " sort it by time first"
            )
        reached = ts
        yield record
    held.sort()
    for _, _, record in held:
        yield record
