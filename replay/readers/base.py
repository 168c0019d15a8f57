"""What every log reader does: read rows, turn each into events, count the rows that are wrong, and say so plainly.

A reader of a table is a `TableReader` with `columns` and `convert`, and `layouts` where the format is written in more
than one way. The kind of file is not its business: the same columns may come from comma or tab separated text, JSON
lines or Parquet, plain or packed, from a disk or from another machine (`files`). A reader of anything else is a
`LogReader` with `source` and `convert`. None keeps more in memory than a few thousand rows and the catalogue filter.
"""

from __future__ import annotations

import csv
import itertools
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TextIO, TypeAlias, TypeVar

import orjson
import xxhash

from embedding_store.errors import LogError, UsageError
from replay.readers import files
from replay.readers.settings import ColumnMapping
from replay.readers.values import BadRow
from streams.events import Click, Event, Impression, Item, Scenario

Record: TypeAlias = Event | Item
Row = TypeVar("Row")
Numbered: TypeAlias = Iterator[tuple[int, Sequence[str] | BadRow]]

MIN_ROWS = 100  # before so many rows no share of wrong ones is judged
ROW_LINES = 1_000  # that a row with line ends inside quotes may have
KNOWN_ITEMS = 500_000  # catalogue records remembered; past that they are forgotten and told again, which is harmless


class LogReader(ABC):
    """Iterates over the events of a log, in the order of its rows; an Item comes just before the first event of that
    item, and again when its record has changed. Every iteration starts at the top and counts anew.

    `rows` is the number of rows read so far, `good` of those that became records, `rejected` counts the others by
    reason, `wrong` is how many of those are held against the file; `events` counts the records but Items. Between two
    rows, and at the end, rows = good + rejected. Raises LogError while iterating: see `records`.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # one line: what the log is, and how its rows become events
    has_users: ClassVar[bool] = True  # False: what stands for a user is a group of people
    has_impressions: bool  # False: the joiner must run with `implicit`, and no click rate can be claimed

    def __init__(self, path: str, max_rejected_share: float = 0.01) -> None:
        self.path, self.max_rejected_share = path, max_rejected_share
        self.rows = self.good = self.wrong = self.events = 0
        self.rejected: Counter[str] = Counter()
        self._fraction: Callable[[], float | None] = lambda: None

    @classmethod
    def open(cls, path: str | Path, max_rejected_share: float = 0.01, columns: ColumnMapping | None = None) -> Self:
        """A reader of the file at `path`, a local one or a URL that fsspec knows. LogError if it is missing, empty or
        not a file; UsageError for a mapping of columns, which is for the format `generic`."""
        if columns is not None and columns != ColumnMapping():
            raise UsageError(f"a log of format {cls.name} has its own columns: leave out [log.columns]")
        files.check_file(str(path))
        return cls(str(path), max_rejected_share)

    def __iter__(self) -> Iterator[Record]:
        return new_items(self.records())

    @abstractmethod
    def source(self) -> Iterator[tuple[int, Any]]:
        """The rows of the file with their line numbers (from 1); what cannot be taken apart as a BadRow. The errors
        of reading and unpacking are explained by `records`."""

    @abstractmethod
    def convert(self, row: Any, number: int) -> Iterable[Record]:
        """The events of one row, each after the Item it names, if the log tells about items; `number` is its place
        among the rows, from 1. Raises BadRow for a wrong row and SetAside for one that tells of nothing.

        Event ids and request ids follow from the row and its number alone. All checks come before the first
        record, so that a row is either all events or rejected.
        """

    def records(self) -> Iterator[Record]:
        """All events in the order of the rows, with an Item before every event that tells of one, new or not.

        Raises LogError with one line: unreadable, cut short, corrupt, not text, or not of this format (more than
        `max_rejected_share` of the rows are wrong, judged from 100 rows on, or no row is good).
        """
        self.rows = self.good = self.wrong = self.events = 0
        self.rejected.clear()
        first_bad = ""
        for number, row in self._explained(self.source()):
            self.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                for record in self.convert(row, self.rows):
                    if not isinstance(record, Item):
                        self.events += 1
                    yield record
                self.good += 1
            except BadRow as bad:
                self.rejected[bad.reason] += 1
                self.wrong += bad.wrong
                first_bad = first_bad or (f"line {number}, {bad}" if bad.wrong else "")
                self._judge(first_bad)
            if self.rows == MIN_ROWS:
                self._judge(first_bad)
        if self.rows == 0:
            raise LogError(f"{self.path}: there is no row in it; copy or download it again")
        if self.wrong == self.rows:
            raise self._wrong_format(first_bad)
        if self.good == 0:
            raise LogError(f"{self.path}: none of its {self.rows:,} rows tells of an event; is this the log file?")

    def identity(self) -> list[Any]:
        """What tells this log from another one, or from itself when it was changed: JSON-ready."""
        return files.identity(self.path)

    def progress(self) -> float | None:
        """How much of the file was read since the top, 0 to 1; None if that is not known."""
        return self._fraction()

    def _judge(self, first_bad: str) -> None:
        if self.rows >= MIN_ROWS and self.wrong > self.max_rejected_share * self.rows:
            raise self._wrong_format(first_bad)

    def _wrong_format(self, first_bad: str) -> LogError:
        return LogError(
            f"{self.path}: not a {self.name} log, {self.wrong:,} of the first {self.rows:,} rows are wrong;"
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
        except UnicodeDecodeError:
            raise LogError(f"{self.path}: not UTF-8 text after line {after:,}; is this the log file?") from None
        except (*files.UNPACKING_ERRORS, *files.remote_errors()) as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            if getattr(error, "errno", None):
                text = f"{getattr(error, 'strerror', None) or text}; check the file and its rights"
            elif "Truncated" in text:  # of zstd and lz4
                text = f"cut short after line {after:,}; copy or download it again"
            else:
                text = f"corrupt after line {after:,} ({text}); copy or download it again"
            raise LogError(f"{self.path}: {text}") from None


@dataclass(frozen=True)
class Layout:
    """One of the ways in which a format is written.

    `names`: what the reader's columns are called in the file, "" for one that it does not have. Where the file is text
    without a header they stand in this order, and there are no others.
    """

    names: tuple[str, ...]
    delimiters: tuple[str, ...] = (",",)
    header: bool = False  # True: text always begins with a line of names, in any order and among others
    quoted: bool = False  # values may stand in quotes, with delimiters and line ends in them (RFC 4180)
    optional: frozenset[str] = frozenset()  # names that may be absent
    numbered: bool = False  # names are the places of the columns, from 1, among others: text without a header

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in self.names if name and name not in names and name not in self.optional]

    def split(self, line: str, delimiter: str) -> list[str]:
        line = line.rstrip("\r\n")
        try:
            return next(csv.reader([line], delimiter=delimiter), []) if self.quoted else line.split(delimiter)
        except csv.Error:  # a field of more than 131,072 characters
            return []


class TableReader(LogReader):
    """A table of any kind of file. `convert` gets the values of `columns` as texts, in that order, "" for what is not
    there. Of `layouts` the first takes the file whose names its own are, or by number of columns where it has none;
    without any, the file has the columns themselves."""

    columns: Sequence[str]
    layouts: Sequence[Layout] = ()
    text_errors: ClassVar[str] = "strict"  # "replace": of a text that is not UTF-8 the odd letters are lost

    def source(self) -> Numbered:
        layouts = self.layouts or (Layout(tuple(self.columns)),)
        with files.open_bytes(self.path) as file:
            self._fraction = files.fraction_read(file)
            if files.is_parquet(file):
                yield from self._parquet(file, layouts)
                return
            with files.open_text(file, self.path, self.text_errors) as text:
                numbered = files.lines(text, self.path)
                first = next((entry for entry in numbered if not entry[1].isspace()), None)
                if first is None:
                    return
                head = first[1].lstrip()
                if head.startswith("{"):
                    yield from _json(itertools.chain([first], numbered), layouts)
                elif head.startswith("[{") or head.rstrip() == "[":
                    raise LogError(f"{self.path}: a JSON array; write one object a line (jq -c '.[]')")
                else:
                    yield from self._delimited(*first, text, numbered, layouts)

    def _parquet(self, file: Any, layouts: Sequence[Layout]) -> Numbered:
        table = files.open_parquet(file, self.path)
        names = plain_names(table.schema_arrow.names)
        layout = min(layouts, key=lambda layout: len(layout.missing(list(names))))
        if missing := layout.missing(list(names)):
            raise self._not_named("its table does not name", missing)
        places = [names.get(name) for name in layout.names]
        chosen = [place for place in places if place is not None]
        if len({*table.schema_arrow.names}) != len(table.schema_arrow.names):
            raise LogError(f"{self.path}: two columns have the same name; rename one")
        self._fraction = lambda: self.rows / max(1, table.metadata.num_rows)
        rows = files.parquet_rows(table, [table.schema_arrow.names[place] for place in chosen])
        if len(chosen) == len(places):
            yield from rows
            return
        order = [len(chosen) if place is None else chosen.index(place) for place in places]
        for number, row in rows:
            values = (*row, "")
            yield number, [values[place] for place in order]

    def _delimited(
        self, number: int, line: str, text: TextIO, numbered: Iterator[tuple[int, str]], layouts: Sequence[Layout]
    ) -> Numbered:
        layout, delimiter, names = self._layout(line, layouts)
        first = layout.split(line, delimiter)
        width = len(first)
        if names is not None:
            places = [names.get(name, -1) for name in layout.names]
        elif layout.numbered:
            places = [int(name) - 1 if name else -1 for name in layout.names]
        else:
            places, width = [], 0
            for name in layout.names:
                places.append(width if name else -1)
                width += bool(name)
        in_order = places == list(range(width))
        lines = numbered if names is not None else itertools.chain([(number, line)], numbered)
        for number, cells in _quoted(lines, delimiter) if layout.quoted else _plain(lines, delimiter):
            if isinstance(cells, BadRow):
                yield number, cells
            elif len(cells) != width:
                yield number, BadRow("columns", f"{len(cells)} columns, not {width}")
            elif in_order:
                yield number, cells
            else:
                cells.append("")  # what place -1 is
                yield number, [cells[place] for place in places]

    def _layout(self, line: str, layouts: Sequence[Layout]) -> tuple[Layout, str, dict[str, int] | None]:
        """How a file is written that begins with `line`: layout, delimiter, and the places of the names if it is a
        header."""
        ways = [(layout, d) for layout in layouts for d in layout.delimiters if d in line]
        for layout, delimiter in ways:
            names = plain_names(layout.split(line, delimiter))
            if not layout.numbered and not layout.missing(list(names)):
                return layout, delimiter, names
        for layout, delimiter in ways:
            cells = layout.split(line, delimiter)
            if layout.numbered and len(cells) >= max(int(name) for name in layout.names if name):
                return layout, delimiter, None
            if not layout.header and not layout.numbered and len(cells) == sum(map(bool, layout.names)):
                return layout, delimiter, None
        bare = [layout for layout in layouts if not layout.header]
        if not bare or bare[0].numbered:
            layout = layouts[0]
            delimiter = next((d for d in layout.delimiters if d in line), layout.delimiters[0])
            names = plain_names(layout.split(line, delimiter))
            raise self._not_named("its first line does not name", layout.missing(list(names)))
        return bare[0], next((d for d in bare[0].delimiters if d in line), bare[0].delimiters[0]), None

    def _not_named(self, where: str, missing: list[str]) -> LogError:
        return LogError(
            f"{self.path}: not a {self.name} log, {where} {', '.join(missing)};"
            " check the file and the name of its format"
        )

    def row_key(self, row: Sequence[str]) -> str:
        """An id for the events of a row: a hash of its values. A row that stands in a log twice gets the same id both
        times, whatever kind of file it stands in, so that the joiner counts the second as a duplicate."""
        return f"{self.name}-{xxhash.xxh3_64_hexdigest(chr(31).join(row).encode())}"


def plain_names(names: Sequence[str]) -> dict[str, int]:
    """Names of columns to their places; `name:type`, as RecBole writes them, also as `name`."""
    places = {name.strip(): place for place, name in enumerate(names)}
    for place, name in enumerate(names):
        places.setdefault(name.partition(":")[0].strip(), place)
    return places


def _plain(numbered: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    for number, line in numbered:
        line = line.rstrip("\r\n")
        if line and not line.isspace():
            yield number, line.split(delimiter)


def _quoted(numbered: Iterator[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    """Rows with their first lines' numbers. Where a quote is not closed, only its line is given up: what it would have
    swallowed is read again."""
    ahead: deque[tuple[int, str]] = deque()
    used: list[tuple[int, str]] = []  # the lines of the row

    def texts() -> Iterator[str]:
        while entry := ahead.popleft() if ahead else next(numbered, None):
            used.append(entry)
            if len(used) > ROW_LINES:
                raise csv.Error(f"a quote is not closed for {ROW_LINES:,} lines")
            yield entry[1]

    rows = csv.reader(texts(), delimiter=delimiter)
    while True:
        used.clear()
        try:
            cells = next(rows, None)
            if cells is None:
                return
            if len(used) > 1:  # csv itself takes the end of a file, or the next quote in it, for the closing one
                list(csv.reader((line for _, line in used), delimiter=delimiter, strict=True))
        except csv.Error as error:
            yield used[0][0], BadRow("quotes", str(error))
            ahead.extendleft(reversed(used[1:]))
            rows = csv.reader(texts(), delimiter=delimiter)
        else:
            if cells and (len(cells) > 1 or not cells[0].isspace()):
                yield used[0][0], cells


def _json(numbered: Iterable[tuple[int, str]], layouts: Sequence[Layout]) -> Numbered:
    layout: Layout | None = None
    for number, line in numbered:
        if line.isspace():
            continue
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield number, BadRow("json", str(error))
            continue
        if not isinstance(fields, dict):
            yield number, BadRow("json", "not an object")
            continue
        if layout is None:
            layout = min(layouts, key=lambda layout: len(layout.missing(list(fields))))
        if missing := layout.missing(list(fields)):
            yield number, BadRow("columns", f"no {', '.join(missing)}")
            continue
        yield number, [files.as_text(fields.get(name)) if name else "" for name in layout.names]


def shown(
    key: str, ts: int, user: str | int, item: str | int, request: str, clicked: bool,
    scenario: Scenario = "shelf", position: int = 0, propensity: float | None = None,
) -> Iterator[Impression | Click]:  # fmt: skip
    """The impression of one item, and if it was clicked the click.

    Such logs have one time for both. The click must come after its impression, and features see strictly smaller
    times, so it is put 1 ms later: the least that orders them.
    """
    yield Impression(
        event_id=f"{key}-i", ts=ts, user=user, scenario=scenario, request_id=request, items=[item],
        positions=[position], propensities=None if propensity is None else [propensity],
    )  # fmt: skip
    if clicked:
        yield Click(event_id=f"{key}-c", ts=ts + 1, user=user, scenario=scenario, request_id=request, item=item)


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
