"""The records of the topics `events` and `items`: what is accepted, and why a record is refused.

A record is one JSON object with `kind` in it. Times are int64 milliseconds UTC; ids are strings or integers of 64 bits,
signed or not. Events are keyed by user in Kafka, so one partition sees all of a user's events. Fields that are not
known are left out; `v` is the version of the record's schema, 1 where it is missing.

A refused record has a reason out of REASONS. They are stable: dashboards, alerts and repair scripts count on them.
What exactly is refused, duplicate names and numbers past 64 bits included: docs/architecture.md, "What is refused".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec
import orjson
from msgspec import Meta, Struct

from embedding_store.errors import HeadraceError

VERSION: Literal[1] = 1  # of the schema of the records
MAX_EVENT_BYTES = 1_000_000
MAX_TIME_MS = 1 << 43  # the year 2248: whatever is past it is a unit error (µs, ns), not a time
MAX_PRICE = 1e12
MAX_DEPTH = 256  # of objects and lists in one another; what a decoder could take hangs on the stack that is left to it
MAX_CONTEXT_VALUES = 1_000  # at any depth
MAX_CONTEXT_CHARS = 1 << 16  # in its names and strings
MAX_DETAIL_CHARS = 500

REASONS = {
    "not_json": "it is no JSON, or there is no value at all",
    "not_utf8": "its bytes are not UTF-8",
    "too_large": f"more than {MAX_EVENT_BYTES:,} bytes",
    "too_deep": f"objects and lists more than {MAX_DEPTH} deep in one another",
    "unknown_kind": "`kind` is none that this version knows",
    "unknown_version": "`v` is none that this version knows",
    "missing_field": "a field that its kind must have is missing",
    "wrong_type": "a field holds another type; or the record is no object",
    "out_of_range": "a number, a length or a size past its limits; a word that is none of those allowed",
    "inconsistent": "its fields contradict one another",
    "from_the_future": "`ts` is further ahead of Kafka's clock than `[join] future_ms`",
}

# An `int` here has no upper limit: msgspec knows none past 2^63 - 1. `_check_numbers` sees to it.
Word: TypeAlias = Annotated[int, Meta(ge=-(1 << 63))]
Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)] | Word
Name: TypeAlias = Annotated[str, Meta(max_length=256)]
Region: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Position: TypeAlias = Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)]
Millis: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TIME_MS)]
Duration: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40)]
Quantity: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 31)]
Price: TypeAlias = Annotated[float, Meta(ge=0, le=MAX_PRICE)]
Propensity: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
Count: TypeAlias = Annotated[int, Meta(ge=-(1 << 53), le=1 << 53)]
Scenario: TypeAlias = Literal["live", "video", "search", "shelf"]
SCENARIOS: tuple[str, ...] = ("live", "video", "search", "shelf")


class Rejected(HeadraceError):
    """A record that is not an event. `reason` is one of REASONS, the message says what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class _Event(Struct, kw_only=True, frozen=True, tag_field="kind", gc=False):
    event_id: Id
    ts: Millis
    v: Literal[1] = VERSION


class _UserEvent(_Event, kw_only=True, frozen=True, gc=False):
    user: Id
    scenario: Scenario = "shelf"
    request_id: Id | None = None


class Impression(_UserEvent, kw_only=True, frozen=True, tag="impression"):
    """`items` were shown for one request. `feature_hash`: of the user's state they were scored with."""

    request_id: Id
    items: Annotated[list[Id], Meta(min_length=1, max_length=1000)]
    positions: list[Position] | None = None
    propensities: list[Propensity] | None = None
    model_version: Name | None = None
    feature_hash: Word | None = None
    context: dict | None = None

    def __post_init__(self) -> None:
        n = len(self.items)
        if self.positions is not None and len(self.positions) != n:
            raise ValueError("`positions` and `items` differ in length")
        if self.propensities is not None and len(self.propensities) != n:
            raise ValueError("`propensities` and `items` differ in length")
        if self.context is not None:
            _check_context(self.context)


class _Action(_UserEvent, kw_only=True, frozen=True, gc=False):
    item: Id


class Click(_Action, kw_only=True, frozen=True, gc=False, tag="click"):
    pass


class Cart(_Action, kw_only=True, frozen=True, gc=False, tag="cart"):
    pass


class Favourite(_Action, kw_only=True, frozen=True, gc=False, tag="favourite"):
    pass


class Watch(_Action, kw_only=True, frozen=True, gc=False, tag="watch"):
    """`duration_ms` 0: the length of what was played is not known."""

    play_ms: Duration
    duration_ms: Duration


class Purchase(_Action, kw_only=True, frozen=True, gc=False, tag="purchase"):
    quantity: Quantity = 1
    price: Price | None = None
    currency: Annotated[str, Meta(max_length=16)] | None = None


class Refund(_Action, kw_only=True, frozen=True, gc=False, tag="refund"):
    quantity: Quantity = 1


class Forget(_UserEvent, kw_only=True, frozen=True, gc=False, tag="forget"):
    """From here on nothing may be known of the user: state, history and rows are erased, here and downstream."""


class Tick(_Event, kw_only=True, frozen=True, gc=False, tag="tick"):
    """Carries time in an idle partition, and nothing else; never counted as an event."""


class Item(Struct, kw_only=True, frozen=True, tag_field="kind", tag="item", gc=False):
    """The catalogue's record of an item (topic `items`, keyed by item, compacted)."""

    item: Id
    v: Literal[1] = VERSION
    title: Annotated[str, Meta(max_length=10_000)] = ""
    lang: Name = ""
    category: Id | None = None
    price: Price | None = None
    stock: Count | None = None
    seller: Id | None = None
    created: Millis | None = None
    regions: Annotated[list[Region], Meta(max_length=64)] | None = None  # where it is sold; None or none: everywhere


Action: TypeAlias = Click | Cart | Favourite | Watch | Purchase | Refund
Event: TypeAlias = Impression | Action | Forget | Tick
KINDS: dict[type, str] = {kind: str(kind.__struct_config__.tag) for kind in get_args(Event)}


def decode(raw: bytes | None) -> Event:
    """The event in a record's value. Raises Rejected."""
    return _decode(raw, _events, thorough=True)


def decode_item(raw: bytes | None) -> Item:
    """The catalogue record in a record's value. Raises Rejected."""
    return _decode(raw, _items, thorough=True)


def decode_many(values: Sequence[bytes | None]) -> list[Event | Rejected]:
    """What `decode` gives for each of the values, in their order; what it would raise stands in its place."""
    # One by one: `decode_lines` over all of them is no faster, and takes `{"a":` and `1}{}` for two good records.
    # What msgspec does not look at is looked for in all values at once, and in each only if it is found.
    together = b"\n".join([value or b"" for value in values])
    thorough = not _is_utf8(together) or _may_have_large_numbers(together)
    results: list[Event | Rejected] = []
    for value in values:
        try:
            results.append(_decode(value, _events, thorough))
        except Rejected as refused:
            results.append(refused)
    return results


def encode(record: Event | Item) -> bytes:
    """The JSON of a record; fields that are None are left out, and `v` where it is 1."""
    fields = {k: v for k, v in msgspec.structs.asdict(record).items() if v is not None and k != "v"}
    return orjson.dumps({"kind": record.__struct_config__.tag, **fields})


def units(event: Event) -> int:
    """How many events this record counts as: an impression of k items is k, a tick none."""
    match event:
        case Impression():
            return len(event.items)
        case Tick():
            return 0
        case _:
            return 1


# --- decoding -------------------------------------------------------------------------------------------------------

_events: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Event)
_items: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Item)
_KINDS = {
    _events: {class_.__struct_config__.tag for class_ in get_args(Event)},
    _items: {Item.__struct_config__.tag},
}
_MAX_SHALLOW_BYTES = 2 * MAX_DEPTH  # too short to be too deep: each level takes two bytes
_WORDS = range(-(1 << 63), 1 << 64)
_DIGITS_AS_0 = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else 32 for byte in range(256))
_LARGE = b"0" * 20  # no number with fewer digits is past 64 bits
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)


def _decode(raw: bytes | None, decoder: msgspec.json.Decoder[Any], thorough: bool) -> Any:
    """`thorough`: with the checks that a caller may leave out if it knows that the record passes them."""
    if raw is None:
        raise Rejected("not_json", "the record has no value")
    if len(raw) > MAX_EVENT_BYTES:
        raise Rejected("too_large", f"{len(raw):,} bytes; at most {MAX_EVENT_BYTES:,} are taken")
    try:
        record = decoder.decode(raw)
        if thorough:
            if not _is_utf8(raw):  # msgspec does not look at the fields that it leaves out
                raise Rejected("not_utf8", "the bytes of the record are not UTF-8")
            if _may_have_large_numbers(raw):
                _check_numbers(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(raw, decoder, error) from None
    if len(raw) > _MAX_SHALLOW_BYTES and _is_too_deep(raw):
        raise _too_deep()
    return record


def _is_utf8(raw: bytes) -> bool:
    if raw.isascii():
        return True
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _may_have_large_numbers(raw: bytes) -> bool:
    return _LARGE in raw.translate(_DIGITS_AS_0)


def _is_too_deep(raw: bytes) -> bool:
    """Of a record that is JSON."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _BRACKETS.finditer(raw):
        depth += (bracket.start(1) >= 0) - (bracket.start(2) >= 0)
        if depth > MAX_DEPTH:
            return True
    return False


def _too_deep() -> Rejected:
    return Rejected("too_deep", f"objects and lists more than {MAX_DEPTH} deep in one another")


def _check_numbers(record: Any) -> None:
    """Raises ValidationError for an id, or another number without a limit of its own, past 64 bits."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        for one in value if isinstance(value, list) else (value,):
            if type(one) is int and one not in _WORDS:
                raise msgspec.ValidationError(f"Expected `int` of 64 bits - at `$.{name}`")


def _check_context(context: dict[str, Any]) -> None:
    """Raises ValueError where a context is too large."""
    values, chars = 0, 0
    waiting: list[Any] = [context]
    while waiting:
        value = waiting.pop()
        values += 1
        if isinstance(value, dict):
            waiting += value.values()
            chars += sum(map(len, value))
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            chars += len(value)
        elif type(value) is int and value not in _WORDS:
            raise ValueError("Expected `int` of 64 bits in `context`")
        if values + len(waiting) > MAX_CONTEXT_VALUES + 1 or chars > MAX_CONTEXT_CHARS:
            limits = f"{MAX_CONTEXT_VALUES:,} values and {MAX_CONTEXT_CHARS:,} characters"
            raise ValueError(f"Expected `context` of size <= {limits}")


# --- why a record was refused ---------------------------------------------------------------------------------------

# How the messages of msgspec begin, and of ours above, by reason.
_MESSAGES = {
    "missing_field": re.compile(r"Object missing required field"),
    "wrong_type": re.compile(r"Expected `[^`]*`(, got | - at |$)"),
    "out_of_range": re.compile(r"Expected `|Invalid enum value|(Integer value|Number) out of range"),
    "inconsistent": re.compile(r"Invalid value .* - at `\$\.kind`|.*differ in length"),
}


class _Envelope(Struct):
    """What decides how the rest is to be read."""

    kind: msgspec.Raw = msgspec.Raw(b"null")
    v: msgspec.Raw = msgspec.Raw(b"1")


_envelope = msgspec.json.Decoder(_Envelope)


def _refusal(raw: bytes, decoder: msgspec.json.Decoder[Any], error: Exception) -> Rejected:
    """Why `decoder` failed with `error`. What is no JSON comes first, then what this version cannot know."""
    if not _is_utf8(raw):
        return Rejected("not_utf8", "the bytes of the record are not UTF-8")
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
    except RecursionError:
        return _too_deep()
    except msgspec.DecodeError as malformed:
        return Rejected("not_json", str(malformed))
    if _is_too_deep(raw):
        return _too_deep()
    try:
        envelope = _envelope.decode(raw)
    except msgspec.ValidationError:
        return Rejected("wrong_type", str(error)[:MAX_DETAIL_CHARS])  # no object
    version = bytes(envelope.v)
    if re.fullmatch(rb"-?[0-9]+", version) and version != b"%d" % VERSION:
        return Rejected("unknown_version", f"`v` is {version[:20].decode()}; this version reads {VERSION}")
    kind = bytes(envelope.kind)
    if kind.startswith(b'"') and (name := msgspec.json.decode(kind)) not in _KINDS[decoder]:
        return Rejected("unknown_kind", f"there is no kind {name[:100]!r}")
    message = str(error)
    reason = next((reason for reason, pattern in _MESSAGES.items() if pattern.match(message)), "wrong_type")
    return Rejected(reason, message[:MAX_DETAIL_CHARS])  # it may quote the record
