"""Which records of the topic `events` the oracle takes: "What is refused" of docs/architecture.md in plain checks.

streams/events.py says the same independently; the tests hold both together.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

SCENARIOS = {"live", "video", "search", "shelf"}
MAX_BYTES, MAX_TIME, MAX_DURATION, MAX_COUNT = 1_000_000, 1 << 43, 1 << 40, 1 << 31
MAX_PRICE, MAX_DEPTH, MAX_VALUES, MAX_CHARS, MAX_DIGITS = 1e12, 256, 1_000, 1 << 16, 4_300
ALONGSIDE = ("positions", "propensities")  # as long as `items`
Check: TypeAlias = Callable[[Any], bool]


class _Object(dict):
    """A JSON object; `pairs` has the names that stand twice, too."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def parse(value: bytes | None) -> dict | None:
    """The event in a record's value, or None where it must be rejected."""
    if value is None or len(value) > MAX_BYTES:
        return None
    try:
        text = value.decode("utf-8")
        event = json.loads(text, parse_constant=_no_constant, parse_int=_int, object_pairs_hook=_Object)
        if len(text) > 2 * MAX_DEPTH and _depth(text) > MAX_DEPTH:
            return None
        for part in _parts(event):
            if isinstance(part, str):
                part.encode("utf-8")  # an escaped half of a surrogate pair is not text
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, _Object) or not is_one_of(event.get("kind"), set(FIELDS)):
        return None
    known = FIELDS[event["kind"]]
    # Of a name that stands twice the last value counts, but the others must be as good; and a kind is never changed.
    if not all(known[name](value) for name, value in event.pairs if name in known):
        return None
    if any(value != event["kind"] for name, value in event.pairs if name == "kind"):
        return None
    if any(name not in event for name in REQUIRED | NEEDED.get(event["kind"], ACTION)):
        return None
    return event if event["kind"] != "impression" or _is_whole(event) else None


def _depth(text: str) -> int:
    """How deep objects and lists stand in one another in a JSON text."""
    without_strings = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)
    steps = [1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", without_strings)]
    return max(itertools.accumulate(steps), default=0)


def _parts(value: object) -> Iterator[object]:
    """The value, and all names and values in it, at any depth."""
    waiting = [value]
    while waiting:
        yield (part := waiting.pop())
        if isinstance(part, _Object):
            waiting += [each for pair in part.pairs for each in pair]
        elif isinstance(part, list):
            waiting += part


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _int(text: str) -> int | float:
    """Of more digits than Python reads: infinity, which is no integer and past every limit."""
    return int(text) if len(text.lstrip("-")) <= MAX_DIGITS else math.inf


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_word(value: Any) -> bool:
    """An integer that fits 64 bits, signed or not."""
    return is_int(value, -(1 << 63), (1 << 64) - 1)


def is_text(value: object, low: int, high: int) -> bool:
    return isinstance(value, str) and low <= len(value) <= high


def is_id(value: object) -> bool:
    return is_text(value, 1, 256) or is_word(value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_one_of(value: object, names: set[str]) -> bool:
    return isinstance(value, str) and value in names


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, low: int = 0, high: int = MAX_BYTES) -> Check:
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(check, value))


def _is_context(value: object) -> bool:
    return isinstance(value, _Object) and not any(
        isinstance(part, float) and math.isinf(part) for part in _parts(value)
    )


def _between(low: int, high: int) -> Check:
    return lambda value: is_int(value, low, high)


EVENT: dict[str, Check] = {"event_id": is_id, "ts": _between(0, MAX_TIME), "v": _between(1, 1)}
BY_USER = EVENT | {
    "user": is_id, "scenario": lambda value: is_one_of(value, SCENARIOS), "request_id": _or_none(is_id),
}  # fmt: skip
BY_ITEM = BY_USER | {"item": is_id}
REFUND = BY_ITEM | {"quantity": _between(1, MAX_COUNT)}
FIELDS: dict[str, dict[str, Check]] = {
    "impression": BY_USER | {
        "request_id": is_id,
        "items": _list_of(is_id, 1, 1000),
        "positions": _or_none(_list_of(_between(-(1 << 31), 1 << 31))),
        "propensities": _or_none(_list_of(lambda value: is_number(value) and 0 < value <= 1)),
        "model_version": _or_none(lambda value: is_text(value, 0, 256)),
        "feature_hash": _or_none(is_word),
        "context": _or_none(_is_context),
    },
    "click": BY_ITEM, "cart": BY_ITEM, "favourite": BY_ITEM, "refund": REFUND, "forget": BY_USER, "tick": EVENT,
    "watch": BY_ITEM | {"play_ms": _between(0, MAX_DURATION), "duration_ms": _between(0, MAX_DURATION)},
    "purchase": REFUND | {
        "price": _or_none(lambda value: is_number(value) and 0 <= value <= MAX_PRICE),
        "currency": _or_none(lambda value: is_text(value, 0, 16)),
    },
}  # fmt: skip
ACTION = {"user", "item"}
REQUIRED = {"event_id", "ts"}
NEEDED = {
    "impression": {"user", "request_id", "items"}, "watch": ACTION | {"play_ms", "duration_ms"}, "forget": {"user"},
    "tick": set(),
}  # fmt: skip


def _is_whole(event: dict) -> bool:
    """What the fields of an impression must be to one another, and how much its context may hold."""
    if any(event.get(name) is not None and len(event[name]) != len(event["items"]) for name in ALONGSIDE):
        return False
    if event.get("context") is None:
        return True
    values = chars = 0
    waiting = [event["context"]]
    for part in waiting:
        if isinstance(part, dict):
            waiting += part.values()
            chars += sum(map(len, part))
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str):
            chars += len(part)
        elif isinstance(part, int) and not isinstance(part, bool) and not is_word(part):
            return False
        values += 1
    return values <= MAX_VALUES + 1 and chars <= MAX_CHARS
