"""The texts of a row as ids, numbers and times. What cannot be one raises BadRow, with a word to count it by."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from streams.events import MAX_TIME_MS

MAX_ID = 10**18 - 1  # fits into 64 bits, which JSON numbers must
MAX_ID_TEXT = 256  # characters, of the records' own ids
MAX_PLAY_MS = 1 << 40  # of the records' own fields
MAX_QUANTITY = 1 << 31
MAX_PRICE = 1e12
UNITS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1_000), "ns": (1, 1_000_000)}  # ms = number * first // second

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)


class BadRow(Exception):
    """A row that cannot become events. `reason` is one word for counting."""

    wrong = True  # counts towards the share at which the file is refused

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class SetAside(BadRow):
    """A row that is as it should be, but tells of nothing that the system has an event for: counted among the
    rejected by its reason, and never held against the file."""

    wrong = False


def whole(text: str, reason: str, most: int = MAX_ID) -> int:
    """A whole number from 0 to `most`. Raises BadRow(reason)."""
    if not text.isdecimal() or len(text) > 18 or int(text) > most:
        raise BadRow(reason, f"{text[:40]!r} is not a whole number of 0 to {most:,}")
    return int(text)


def signed(text: str, reason: str, most: int = MAX_QUANTITY) -> int:
    """A whole number from -`most` to `most`; 6.0 will do. Raises BadRow(reason)."""
    negative = text.startswith("-")
    value = whole(text[negative:].removesuffix(".0"), reason, most)
    return -value if negative else value


def number(text: str, reason: str, least: float = 0.0, most: float = MAX_PRICE) -> float:
    """A number from `least` to `most`. Raises BadRow(reason)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise BadRow(reason, f"{text[:40]!r} is not a number of {least:g} to {most:g}")
    return value


def name(text: str, reason: str = "id") -> str:
    """An id as a text, without the spaces around it. Raises BadRow(reason)."""
    text = text.strip()
    if not 0 < len(text) <= MAX_ID_TEXT:
        raise BadRow(reason, f"{text[:40]!r} is not an id of 1 to {MAX_ID_TEXT} characters")
    return text


def flag(text: str, reason: str) -> bool:
    """0 or 1 (or false or true). Raises BadRow(reason)."""
    if text in ("0", "1"):
        return text == "1"
    if text.lower() not in ("true", "false"):
        raise BadRow(reason, f"{text[:40]!r} is neither 0 nor 1")
    return text.lower() == "true"


def millis(text: str, unit: str = "ms") -> int:
    """A time in ms UTC, rounded down, from a number of `unit` (s, ms, us, ns) since 1970, or from an ISO 8601 time,
    which speaks for itself; one without a zone is UTC. Raises BadRow("time")."""
    if text.isdecimal() and len(text) <= 20:
        times, parts = UNITS[unit]
        value = int(text) * times // parts
    elif text[4:5] == "-" and text[7:8] == "-":
        return iso_millis(text)
    else:
        try:
            times, parts = UNITS[unit]
            value = math.floor(round(float(text) * times / parts, 3))  # 1396437466.94 s is …939999 in binary
        except (ValueError, OverflowError):
            value = -1
    if not 0 <= value <= MAX_TIME_MS:
        raise BadRow("time", f"{text[:40]!r} is not a time in {unit} since 1970, nor an ISO 8601 one")
    return value


def iso_millis(text: str) -> int:
    """A time in ms UTC, rounded down, from an ISO 8601 time. Raises BadRow("time")."""
    try:
        when = datetime.fromisoformat(text)
        value = ((when if when.tzinfo else when.replace(tzinfo=UTC)) - _EPOCH) // _MS
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_TIME_MS:
        raise BadRow("time", f"{text[:40]!r} is not an ISO 8601 time since 1970")
    return value
