"""The records of the topics `events` and `items`: what is accepted, and why a record is refused.

A record is one JSON object with `kind` in it. Times are int64 milliseconds UTC; ids are strings or integers.
Events are keyed by user in Kafka, so one partition sees all of a user's events.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec
import orjson
from msgspec import Meta, Struct

from embedding_store.errors import HeadraceError

MAX_EVENT_BYTES = 1_000_000
MAX_TIME_MS = 1 << 43  # the year 2248: whatever is past it is a unit error (µs, ns), not a time

Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)] | int
Millis: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TIME_MS)]
Duration: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40)]
Quantity: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 31)]
Price: TypeAlias = Annotated[float, Meta(ge=0)]
Scenario: TypeAlias = Literal["live", "video", "search", "shelf"]
SCENARIOS: tuple[str, ...] = ("live", "video", "search", "shelf")


class Rejected(HeadraceError):
    """A record that is not an event. `reason` is one word for counting, the message says what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class _Event(Struct, kw_only=True, frozen=True, tag_field="kind", gc=False):
    event_id: Id
    ts: Millis


class _UserEvent(_Event, kw_only=True, frozen=True, gc=False):
    user: Id
    scenario: Scenario = "shelf"
    request_id: Id | None = None


class Impression(_UserEvent, kw_only=True, frozen=True, tag="impression"):
    """`items` were shown for one request. `feature_hash`: of the user's state they were scored with."""

    request_id: Id
    items: Annotated[list[Id], Meta(min_length=1, max_length=1000)]
    positions: list[int] | None = None
    propensities: list[Annotated[float, Meta(gt=0, le=1)]] | None = None
    model_version: str | None = None
    feature_hash: int | None = None
    context: dict | None = None

    def __post_init__(self) -> None:
        n = len(self.items)
        if self.positions is not None and len(self.positions) != n:
            raise ValueError("`positions` and `items` differ in length")
        if self.propensities is not None and len(self.propensities) != n:
            raise ValueError("`propensities` and `items` differ in length")


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
    currency: str | None = None


class Refund(_Action, kw_only=True, frozen=True, gc=False, tag="refund"):
    quantity: Quantity = 1


class Tick(_Event, kw_only=True, frozen=True, gc=False, tag="tick"):
    """Carries time in an idle partition, and nothing else; never counted as an event."""


class Item(Struct, kw_only=True, frozen=True, tag_field="kind", tag="item", gc=False):
    """The catalogue's record of an item (topic `items`, keyed by item, compacted)."""

    item: Id
    title: str = ""
    lang: str = ""
    category: Id | None = None
    price: Price | None = None
    stock: int | None = None
    seller: Id | None = None
    created: Millis | None = None


Action: TypeAlias = Click | Cart | Favourite | Watch | Purchase | Refund
Event: TypeAlias = Impression | Action | Tick


def decode(raw: bytes | None) -> Event:
    """The event in a record's value. Raises Rejected: too_large, not_json, invalid."""
    return _convert(raw, _KINDS, Event)


def decode_item(raw: bytes | None) -> Item:
    """The catalogue record in a record's value. Raises Rejected as `decode` does."""
    return _convert(raw, {}, Item)


def encode(record: Event | Item) -> bytes:
    """The JSON of a record; fields that are None are left out."""
    fields = {k: v for k, v in msgspec.structs.asdict(record).items() if v is not None}
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


# msgspec looks a union up anew in every call (10 µs), a class once: so the class is chosen here (1 µs).
_KINDS: dict[object, Any] = {class_.__struct_config__.tag: class_ for class_ in get_args(Event)}


def _convert(raw: bytes | None, kinds: dict[object, Any], otherwise: Any) -> Any:
    if raw is None:
        raise Rejected("not_json", "the record has no value")
    if len(raw) > MAX_EVENT_BYTES:
        raise Rejected("too_large", f"{len(raw):,} bytes; at most {MAX_EVENT_BYTES:,} are taken")
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Rejected("not_json", str(error)) from None
    kind = fields.get("kind") if isinstance(fields, dict) else None
    try:
        return msgspec.convert(fields, kinds.get(kind, otherwise) if isinstance(kind, str) else otherwise)
    except msgspec.ValidationError as error:
        raise Rejected("invalid", str(error)) from None
