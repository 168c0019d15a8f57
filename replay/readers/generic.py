"""Any table of events, read by the mapping of its columns in the settings: [log.columns].

What kind of event a row is says, the first that is mapped: `rating` and `clicked` (each row is an impression, and
from `like_from` on or where it is 1 a click 1 ms later), `kind` with the table `kinds`, else `default_kind`.
- An impression with a play time is a watch, too, told when the play has ended.
- Without a `request` column, the rows of one user and time are one page.
- Without an `event_id` column the id of a row is a hash of its values and its number: reading the file again gives the
  same ids, and a row that stands there twice is two events. Of what has its own ids, a second one is a duplicate.
- An item is told to the catalogue if its category or its price is mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from embedding_store.errors import UsageError
from replay.readers import files
from replay.readers.base import Layout, Record, TableReader, shown
from replay.readers.kuairand import played_for
from replay.readers.settings import ColumnMapping
from replay.readers.values import (
    MAX_PLAY_MS,
    MAX_QUANTITY,
    BadRow,
    SetAside,
    flag,
    iso_millis,
    millis,
    name,
    number,
    signed,
    whole,
)
from streams.events import Cart, Click, Favourite, Item, Purchase, Refund, Watch

FIELDS = (
    "user", "item", "time", "kind", "clicked", "rating", "request", "event_id", "category", "price", "quantity",
    "play", "duration", "position", "propensity",
)  # fmt: skip
DELIMITERS = ("\t", ",", ";", "|")
MAX_POSITION = 32_767
MAX_RATING = 1e6
SIMPLE: dict[str, type[Click | Cart | Favourite]] = {"click": Click, "cart": Cart, "favourite": Favourite}
MAX_KEY = 254  # of the 256 that an id may have: some events add two


class Generic(TableReader):
    name = "generic"
    about = "Any table, by the mapping of its columns in [log.columns]"
    columns = FIELDS

    def __init__(self, path: str, max_rejected_share: float = 0.01, columns: ColumnMapping | None = None) -> None:
        """UsageError where the mapping does not say enough."""
        super().__init__(path, max_rejected_share)
        self.mapping = mapping = columns or ColumnMapping()
        check_mapping(mapping)
        self.layouts = (
            Layout(
                tuple(getattr(mapping, field) for field in FIELDS),
                delimiters=(mapping.delimiter,) if mapping.delimiter else DELIMITERS,
                header=mapping.has_header, numbered=not mapping.has_header,
                quoted=len(mapping.delimiter) < 2,  # csv knows no longer ones
            ),
        )  # fmt: skip
        self.has_impressions = bool(mapping.rating or mapping.clicked) or "impression" in (
            mapping.kinds.values() if mapping.kind else (mapping.default_kind,)
        )

    @classmethod
    def open(cls, path: str | Path, max_rejected_share: float = 0.01, columns: ColumnMapping | None = None) -> Self:
        """As of every reader; UsageError where the mapping does not say enough."""
        reader = cls(str(path), max_rejected_share, columns)
        files.check_file(str(path))
        return reader

    def convert(self, row: Sequence[str], number_: int) -> Iterator[Record]:
        cells = dict(zip(FIELDS, row, strict=True))
        kind, clicked = self._kind(cells)
        if kind == "ignore":
            raise SetAside("ignored", "its kind is")
        mapping = self.mapping
        user, item = name(cells["user"]), name(cells["item"])
        ts = iso_millis(cells["time"]) if mapping.time_unit == "iso" else millis(cells["time"], mapping.time_unit)
        key = name(cells["event_id"], "event_id") if mapping.event_id else self.row_key((*row, str(number_)))
        if len(key) > MAX_KEY:
            raise BadRow("event_id", f"{key[:40]!r}… is longer than {MAX_KEY} characters")
        request = name(cells["request"], "request") if cells["request"] else None
        price = number(cells["price"], "price") if cells["price"] else None
        category = name(cells["category"], "category") if cells["category"] else None
        events = list(self._events(kind, clicked, cells, key, ts, user, item, request, price))
        if category is not None or price is not None:
            yield Item(item=item, category=category, price=price)
        yield from events

    def _kind(self, cells: dict[str, str]) -> tuple[str, bool]:
        """The kind of the row's event; of an impression also whether it was clicked."""
        mapping = self.mapping
        if mapping.rating:
            stars = number(cells["rating"], "rating", -MAX_RATING, MAX_RATING)
            return "impression", stars >= mapping.like_from
        if mapping.clicked:
            return "impression", flag(cells["clicked"], "clicked")
        if not mapping.kind:
            return mapping.default_kind, False
        kind = mapping.kinds.get(cells["kind"])
        if kind is None:
            raise BadRow("kind", f"{cells['kind'][:40]!r} is not in the table of kinds")
        return kind, False

    def _events(
        self, kind: str, clicked: bool, cells: dict[str, str], key: str, ts: int, user: str, item: str,
        request: str | None, price: float | None,
    ) -> Iterator[Record]:  # fmt: skip
        scenario = self.mapping.scenario
        match kind:
            case "impression":
                request = request or f"{self.name}-{user}-{ts}"[:256]
                place = whole(cells["position"], "position", MAX_POSITION) if cells["position"] else 0
                if place < self.mapping.position_from:
                    raise BadRow("position", f"{place} is before the first")
                share = number(cells["propensity"], "propensity", 0.0, 1.0) if cells["propensity"] else None
                if share == 0:
                    raise BadRow("propensity", "0 cannot have been shown")
                place -= self.mapping.position_from
                yield from shown(key, ts, user, item, request, clicked, scenario, place, share)
                if cells["play"]:
                    yield self._watch(cells, f"{key}-w", ts, user, item, request, after=True)
            case "watch":
                yield self._watch(cells, key, ts, user, item, request, after=False)
            case "purchase" | "refund":
                pieces = signed(cells["quantity"], "quantity", MAX_QUANTITY) if cells["quantity"] else 1
                if pieces == 0 or (pieces < 0 and kind == "purchase"):
                    raise BadRow("quantity", f"{pieces} pieces bought")
                if kind == "refund":  # some logs count them down
                    yield Refund(
                        event_id=key, ts=ts, user=user, item=item, quantity=abs(pieces), request_id=request,
                        scenario=scenario,
                    )  # fmt: skip
                else:
                    yield Purchase(
                        event_id=key, ts=ts, user=user, item=item, quantity=pieces, price=price,
                        currency=self.mapping.currency or None, request_id=request, scenario=scenario,
                    )  # fmt: skip
            case _:
                yield SIMPLE[kind](event_id=key, ts=ts, user=user, item=item, request_id=request, scenario=scenario)

    def _watch(
        self, cells: dict[str, str], key: str, ts: int, user: str, item: str, request: str | None, after: bool
    ) -> Watch:
        """`after`: `ts` is when the play began."""
        times = 1000 if self.mapping.play_unit == "s" else 1
        play = round(number(cells["play"], "play", most=MAX_PLAY_MS / times) * times)
        duration = round(number(cells["duration"] or "0", "duration", most=MAX_PLAY_MS / times) * times)
        return Watch(
            event_id=key, ts=ts + played_for(play) if after else ts, user=user, item=item, play_ms=play,
            duration_ms=duration, request_id=request, scenario=self.mapping.scenario,
        )  # fmt: skip


def check_mapping(mapping: ColumnMapping) -> None:
    """Raises UsageError where it does not say enough, or what cannot be."""
    missing = [field for field in ("user", "item", "time") if not getattr(mapping, field)]
    if missing:
        raise UsageError(f"[log.columns] does not say which column is {', '.join(missing)}: name it there, or let "
                         "`headrace init FILE` write it")  # fmt: skip
    if mapping.kind and not mapping.kinds:
        raise UsageError('[log.columns] has `kind` but not `kinds`: say what its values mean, as {view = "click"}')
    if mapping.kinds and not mapping.kind:
        raise UsageError("[log.columns] has `kinds` but not `kind`: name the column that tells the kind")
    told = [field for field in ("rating", "clicked", "kind") if getattr(mapping, field)]
    if len(told) > 1:
        raise UsageError(f"[log.columns] {' and '.join(told)} exclude each other: each tells the kind of a row")
    kinds = mapping.kinds.values() if mapping.kind else (mapping.default_kind,)
    if "watch" in kinds and told in ([], ["kind"]) and not mapping.play:
        raise UsageError("[log.columns] has watches but not `play`: name the column of the time played")
    if not mapping.has_header:
        names = [getattr(mapping, field) for field in FIELDS]
        wrong = [name for name in names if name and not (name.isdecimal() and int(name) > 0)]
        if wrong:
            raise UsageError(f"[log.columns] {wrong[0]!r}: without a header columns are called 1, 2, 3 and so on")
