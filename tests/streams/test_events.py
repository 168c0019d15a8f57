"""What is accepted as an event, what is refused and under which word."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.events import (
    MAX_EVENT_BYTES,
    MAX_TIME_MS,
    Cart,
    Click,
    Favourite,
    Impression,
    Item,
    Purchase,
    Refund,
    Rejected,
    Tick,
    Watch,
    decode,
    decode_item,
    encode,
    units,
)

CLICK = {"kind": "click", "event_id": "e", "ts": 1, "user": "u", "item": "i"}
SHOWN = {"kind": "impression", "event_id": "e", "ts": 1, "user": "u", "request_id": 7, "items": ["i", 2]}

EVENTS = [
    Impression(
        event_id="e", ts=0, user=1, request_id="r", items=[1, "b"], positions=[1, 2], propensities=[0.5, 1.0],
        model_version="1.2", feature_hash=-5, context={"page": [1]}, scenario="live",
    ),
    Click(event_id=1 << 63, ts=MAX_TIME_MS, user="ü\x00", item=-1, request_id=3),
    Cart(event_id="e", ts=1, user="u", item="i"),
    Favourite(event_id="e", ts=1, user="u", item="i"),
    Watch(event_id="e", ts=1, user="u", item="i", play_ms=5, duration_ms=0),
    Purchase(event_id="e", ts=1, user="u", item="i", quantity=3, price=1.5, currency="EUR"),
    Refund(event_id="e", ts=1, user="u", item="i", quantity=2),
    Tick(event_id="e", ts=1),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_come_back_as_they_went(event):
    assert decode(encode(event)) == event
    assert b"null" not in encode(event)


def test_items_come_back_as_they_went():
    item = Item(item=7, title="T", category="c", created=5)
    assert decode_item(encode(item)) == item


def test_units_count_what_was_shown():
    assert [units(event) for event in EVENTS] == [2, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (CLICK, {"ts": 1.5}),
        (CLICK, {"ts": "1"}),
        (CLICK, {"ts": -1}),
        (CLICK, {"ts": 1_700_000_000_000_000}),  # microseconds
        (CLICK, {"ts": None}),
        (CLICK, {"kind": "like"}),
        (CLICK, {"kind": None}),
        (CLICK, {"kind": ["click"]}),
        (CLICK, {"kind": 1}),
        (CLICK, {"kind": "item"}),
        (CLICK, {"event_id": ""}),
        (CLICK, {"event_id": True}),
        (CLICK, {"user": "u" * 257}),
        (CLICK, {"user": None}),
        (CLICK, {"item": 1 << 64}),
        (CLICK, {"item": 1.0}),
        (CLICK, {"request_id": []}),
        (CLICK, {"scenario": "email"}),
        (CLICK, {"kind": "watch"}),
        (CLICK, {"kind": "watch", "play_ms": -1, "duration_ms": 0}),
        (CLICK, {"kind": "purchase", "quantity": 0}),
        (CLICK, {"kind": "purchase", "price": -0.5}),
        (SHOWN, {"items": []}),
        (SHOWN, {"items": list(range(1001))}),
        (SHOWN, {"items": "i"}),
        (SHOWN, {"request_id": None}),
        (SHOWN, {"positions": [1]}),
        (SHOWN, {"propensities": [0.5, 0]}),
        (SHOWN, {"propensities": [0.5]}),
        (SHOWN, {"feature_hash": "x"}),
    ],
)
def test_invalid_events_are_refused(base, change):
    decode(json.dumps(base).encode())
    with pytest.raises(Rejected, match=r"^invalid: \S"):
        decode(json.dumps(base | change).encode())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "not_json"),
        (b"", "not_json"),
        (b"\xff", "not_json"),
        (b'{"kind":"tick","event_id":1,"ts":1', "not_json"),
        (b'{"kind":"tick","event_id":1,"ts":1}{}', "not_json"),
        (b'{"kind":"tick","event_id":1,"ts":1,"x":NaN}', "not_json"),
        (b'{"kind":"tick","event_id":"\\ud800","ts":1}', "not_json"),
        (b'{"kind":"tick","event_id":1,"ts":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not_json"),
        (b'{"kind":"tick","event_id":1,"ts":1}' + b" " * MAX_EVENT_BYTES, "too_large"),
        (b"[]", "invalid"),
        (b"null", "invalid"),
        (b'"click"', "invalid"),
    ],
)
def test_what_is_no_json_object_is_refused(raw, reason):
    with pytest.raises(Rejected) as refused:
        decode(raw)
    assert refused.value.reason == reason
    assert refused.value.detail


def test_fields_that_are_not_known_are_left_out():
    assert decode(json.dumps(CLICK | {"colour": "red"}).encode()) == decode(json.dumps(CLICK).encode())


JSON = st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)


@given(st.binary(max_size=60) | JSON)
def test_garbage_is_refused_and_nothing_else(raw):
    with pytest.raises(Rejected):
        decode(raw)
