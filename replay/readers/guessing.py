"""A mapping of columns for a table that is of no known format: guessed from its names and its first rows."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec
import orjson

from embedding_store.errors import LogError
from replay.readers import files
from replay.readers.base import Layout, Record, TableReader, plain_names
from replay.readers.generic import DELIMITERS
from replay.readers.settings import ColumnMapping, Kind
from replay.readers.values import BadRow, iso_millis

SAMPLE_ROWS = 10_000
Unit: TypeAlias = Literal["s", "ms", "us", "ns", "iso"]
LEAST: dict[Unit, float] = {"ns": 1e17, "us": 1e14, "ms": 1e11}  # 1973; in the next larger unit the year 5138
MOST_KINDS = 50  # a column with more different values does not tell kinds

# In lower case, without anything but letters and digits; the first that is there is taken.
NAMES: dict[str, tuple[str, ...]] = {
    "user": (
        "userid", "user", "uid", "visitorid", "visitor", "customerid", "customer", "memberid", "accountid", "clientid",
        "reviewerid", "fullvisitorid", "householdid", "sessionid", "session",
    ),
    "item": (
        "itemid", "item", "iid", "productid", "product", "videoid", "movieid", "articleid", "contentid", "parentasin",
        "asin", "sku", "stockcode", "trackid", "songid", "newsid", "businessid", "gameid", "video", "movie",
    ),
    "time": (
        "timestamp", "timems", "timestampms", "eventtime", "unixts", "ts", "time", "datetime", "createdat", "date",
        "invoicedate", "unixreviewtime", "transactiontimestamp", "transactiontime",
    ),
    "kind": ("event", "eventtype", "behavior", "behaviour", "behaviortype", "action", "actiontype", "eventname", "kind",
             "interaction", "type"),
    "clicked": ("isclick", "clicked", "click"),
    "rating": ("rating", "stars", "overall", "score"),
    "request": ("requestid", "impressionid", "pageviewid"),
    "event_id": ("eventid",),
    "category": ("categoryid", "category", "catid", "categorycode"),
    "play": ("playtimems", "playms"),
    "duration": ("durationms",),
    "price": ("price", "unitprice"),
    "quantity": ("quantity", "qty"),
    "position": ("position",),
    "propensity": ("propensity", "propensityscore"),
}  # fmt: skip
SHOWN = ("request", "position", "propensity", "play", "duration")  # mapped where rows are impressions
KINDS: dict[Kind, tuple[str, ...]] = {
    "click": ("click", "clicks", "view", "pv", "pageview", "detail", "itemview", "productview"),
    "cart": ("cart", "addtocart", "basket", "addtobasket"),
    "favourite": ("fav", "favorite", "favourite", "like", "wishlist", "addtowishlist", "save", "collect"),
    "purchase": ("buy", "purchase", "transaction", "order", "checkout"),
    "refund": ("refund", "return"),
}


class _Sample(TableReader):
    """The texts of some columns, of any kind of file. Only its `source` is used."""

    name, about, has_impressions = "generic", "", False

    def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
        return ()

    def values(self, columns: tuple[str, ...]) -> Iterator[Sequence[str]]:
        self.columns = columns
        self.layouts = (Layout(columns, DELIMITERS, header=True, quoted=True, optional=frozenset(columns)),)
        sample = itertools.islice(self._explained(self.source()), SAMPLE_ROWS)
        return (row for _, row in sample if not isinstance(row, BadRow))


def table_names(path: str) -> list[str]:
    """The names of a table's columns: of its first line, the keys of its first JSON object, or its Parquet schema.

    Raises LogError for a file that cannot be read; a text without names gives its first row.
    """
    files.check_file(path)
    try:
        with files.open_bytes(path) as file:
            if files.is_parquet(file):
                return files.open_parquet(file, path).schema_arrow.names
            with files.open_text(file, path, errors="replace") as text:
                line = next((line for _, line in files.lines(text, path) if not line.isspace()), "").strip()
    except (*files.UNPACKING_ERRORS, *files.remote_errors(), EOFError) as error:
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise LogError(f"{path}: cannot be read ({what}); copy or download it again") from None
    if line.startswith("{"):
        try:
            return list(orjson.loads(line))
        except orjson.JSONDecodeError:
            return []
    delimiter = next((d for d in DELIMITERS if d in line), ",")
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:  # a field of more than 131,072 characters
        return []


def guess_columns(path: str) -> ColumnMapping:
    """What the columns of the table at `path` seem to be, for the format `generic`.

    Raises LogError where the user, the item or the time is not among the names: it says which names there are.
    """
    names = table_names(path)
    plain = {_plain(name.partition(":")[0]): place for place, name in reversed(list(enumerate(names)))}
    found: dict[str, str] = {}
    for field, known in NAMES.items():
        place = next((plain[name] for name in known if name in plain), None)
        if place is not None:
            found[field] = names[place] if names[place] in plain_names(names) else names[place].strip()
    missing = [field for field in ("user", "item", "time") if field not in found]
    if missing:
        shown = ", ".join(name[:40] if name.isprintable() else repr(name[:40]) for name in names[:12])
        shown += ", …" if len(names) > 12 else ""
        raise LogError(
            f"{path}: no format fits, and of its columns ({shown}) none seems to tell the {' and the '.join(missing)};"
            " name them in [log.columns], with [log] format = \"generic\""
        )
    mapping = ColumnMapping(
        user=found["user"], item=found["item"], time=found["time"], time_unit=_unit(path, found["time"])
    )
    kinds = _kinds(path, found["kind"]) if "kind" in found else {}
    if kinds:
        mapping = msgspec.structs.replace(mapping, kind=found["kind"], kinds=kinds)
        shown_by: tuple[str, ...] = ()
    else:
        shown_by = next(((field,) for field in ("clicked", "rating") if field in found), ())
    others = ("event_id", "category", *shown_by, *(SHOWN if shown_by else ()))
    if "purchase" in kinds.values():
        others = (*others, "price", "quantity")
    return msgspec.structs.replace(mapping, **{field: found[field] for field in others if field in found})


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unit(path: str, column: str) -> Unit:
    """Of the first time in the table that is one."""
    for (text,) in _Sample(path).values((column,)):
        text = text.strip()
        try:
            number = float(text)
        except ValueError:
            try:
                iso_millis(text)
            except BadRow:
                continue
            return "iso"
        return next((unit for unit, least in LEAST.items() if number >= least), "s")
    raise LogError(
        f"{path}: no value of its column {column} is a time; it takes numbers since 1970, or ISO 8601"
        " (2024-05-01T12:30:00)"
    )


def _kinds(path: str, column: str) -> dict[str, Kind]:
    """What the values of the column mean; those that are not known are ignored. {} if none is known."""
    values = Counter(row[0] for row in _Sample(path).values((column,)))
    kind_of = {word: kind for kind, words in KINDS.items() for word in words}
    known: dict[str, Kind] = {value: kind_of.get(_plain(value), "ignore") for value in sorted(values) if value}
    if len(known) > MOST_KINDS or not set(known.values()) - {"ignore"}:
        return {}
    return known
