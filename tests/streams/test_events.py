"""What is accepted as an event, what is refused and under which word."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.oracle_events import parse
from streams.events import (
    MAX_EVENT_BYTES,
    MAX_TIME_MS,
    REASONS,
    Cart,
    Click,
    Favourite,
    Forget,
    Impression,
    Item,
    Purchase,
    Refund,
    Rejected,
    Tick,
    Watch,
    decode,
    decode_item,
    decode_many,
    encode,
    units,
)
from tests.streams.mutations import mutated, sessions

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
    Forget(event_id="e", ts=1, user="u"),
    Tick(event_id="e", ts=1),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_come_back_as_they_went(event):
    assert decode(encode(event)) == event
    assert b"null" not in encode(event)


def test_items_come_back_as_they_went():
    item = Item(item=7, title="T", category="c", created=5, price=2.5, regions=["north", "süd"])
    assert decode_item(encode(item)) == item


def test_an_items_regions_are_at_most_64_names():
    for regions, reason in (([""], "out_of_range"), (["x" * 65], "out_of_range"), (["r"] * 65, "out_of_range"),
                            ([1], "wrong_type"), ("north", "wrong_type")):  # fmt: skip
        raw = json.dumps({"kind": "item", "item": 7, "regions": regions}).encode()
        with pytest.raises(Rejected) as refused:
            decode_item(raw)
        assert refused.value.reason == reason
    most = ["r" * 64] * 64
    assert decode_item(json.dumps({"kind": "item", "item": 7, "regions": most}).encode()).regions == most


def test_units_count_what_was_shown():
    assert [units(event) for event in EVENTS] == [2, 1, 1, 1, 1, 1, 1, 1, 0]


DEEP = b'{"kind":"tick","event_id":1,"ts":1,"x":%s}'
BY_REASON = [
    (CLICK, {"ts": 1.5}, "wrong_type"),
    (CLICK, {"ts": 1.0}, "wrong_type"),
    (CLICK, {"ts": "1"}, "wrong_type"),
    (CLICK, {"ts": None}, "wrong_type"),
    (CLICK, {"ts": -1}, "out_of_range"),
    (CLICK, {"ts": 1_700_000_000_000_000}, "out_of_range"),  # microseconds
    (CLICK, {"ts": 1 << 70}, "out_of_range"),
    (CLICK, {"kind": "like"}, "unknown_kind"),
    (CLICK, {"kind": "item"}, "unknown_kind"),
    (CLICK, {"kind": None}, "wrong_type"),
    (CLICK, {"kind": ["click"]}, "wrong_type"),
    (CLICK, {"kind": 1}, "wrong_type"),
    (CLICK, {"v": 2}, "unknown_version"),
    (CLICK, {"v": 0, "kind": "like", "ts": None}, "unknown_version"),  # what it means, only that version knows
    (CLICK, {"v": "1"}, "wrong_type"),
    (CLICK, {"v": True}, "wrong_type"),
    (CLICK, {"v": None}, "wrong_type"),
    (CLICK, {"event_id": ""}, "out_of_range"),
    (CLICK, {"event_id": True}, "wrong_type"),
    (CLICK, {"user": "u" * 257}, "out_of_range"),
    (CLICK, {"user": None}, "wrong_type"),
    (CLICK, {"item": 1 << 64}, "out_of_range"),
    (CLICK, {"item": -(1 << 63) - 1}, "out_of_range"),
    (CLICK, {"item": 1.0}, "wrong_type"),
    (CLICK, {"request_id": []}, "wrong_type"),
    (CLICK, {"scenario": "email"}, "out_of_range"),
    (CLICK, {"scenario": None}, "wrong_type"),
    (CLICK, {"kind": "watch"}, "missing_field"),
    (CLICK, {"kind": "watch", "play_ms": -1, "duration_ms": 0}, "out_of_range"),
    (CLICK, {"kind": "watch", "play_ms": 0, "duration_ms": 1 << 41}, "out_of_range"),
    (CLICK, {"kind": "purchase", "quantity": 0}, "out_of_range"),
    (CLICK, {"kind": "purchase", "quantity": 1 << 40}, "out_of_range"),
    (CLICK, {"kind": "purchase", "price": -0.5}, "out_of_range"),
    (CLICK, {"kind": "purchase", "price": 1.1e12}, "out_of_range"),
    (CLICK, {"kind": "purchase", "price": "1"}, "wrong_type"),
    (CLICK, {"kind": "purchase", "currency": "E" * 17}, "out_of_range"),
    (SHOWN, {"items": []}, "out_of_range"),
    (SHOWN, {"items": list(range(1001))}, "out_of_range"),
    (SHOWN, {"items": [1, 1 << 64]}, "out_of_range"),
    (SHOWN, {"items": "i"}, "wrong_type"),
    (SHOWN, {"items": [None]}, "wrong_type"),
    (SHOWN, {"request_id": None}, "wrong_type"),
    (SHOWN, {"positions": [1]}, "inconsistent"),
    (SHOWN, {"positions": [1, 1 << 40]}, "out_of_range"),
    (SHOWN, {"propensities": [0.5, 0]}, "out_of_range"),
    (SHOWN, {"propensities": [0.5, 1.1]}, "out_of_range"),
    (SHOWN, {"propensities": [0.5]}, "inconsistent"),
    (SHOWN, {"feature_hash": "x"}, "wrong_type"),
    (SHOWN, {"feature_hash": 1 << 64}, "out_of_range"),
    (SHOWN, {"model_version": "m" * 257}, "out_of_range"),
    (SHOWN, {"context": []}, "wrong_type"),
    (SHOWN, {"context": {"x": [0] * 1_000}}, "out_of_range"),
    (SHOWN, {"context": {"x": {"y": "z" * 65_535}}}, "out_of_range"),
    (SHOWN, {"context": {"x": 1 << 64}}, "out_of_range"),
    ({}, {}, "missing_field"),
]


@pytest.mark.parametrize(("base", "change", "reason"), BY_REASON)
def test_invalid_events_are_refused_by_a_stable_reason(base, change, reason):
    with pytest.raises(Rejected) as refused:
        decode(json.dumps(base | change).encode())
    assert refused.value.reason == reason
    assert 0 < len(refused.value.detail) <= 500


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (CLICK, {"item": (1 << 64) - 1, "user": -(1 << 63)}),
        (CLICK, {"event_id": "00000000000000000000000000"}),
        (CLICK, {"v": 1}),
        (CLICK, {"more": 1 << 200, "user": "u" * 256}),
        (CLICK, {"kind": "purchase", "price": 0}),
        (CLICK, {"kind": "purchase", "price": 1e12}),
        (SHOWN, {"context": {"x": [0] * 999}}),
        (SHOWN, {"context": {"x": {"y": "z" * 65_534}}}),
        (SHOWN, {"items": list(range(1000))}),
        (SHOWN, {"propensities": [1, 1e-9]}),
    ],
)
def test_what_is_just_within_the_limits_is_accepted(base, change):
    decode(json.dumps(base | change).encode())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "not_json"),
        (b"", "not_json"),
        (b"{", "not_json"),
        (b"\xff", "not_utf8"),
        (DEEP % b'"\xff"', "not_utf8"),  # in a field that is not known
        (DEEP % b'"\xed\xa0\x80"', "not_utf8"),
        (b'{"kind":"tick","event_id":1,"ts":1', "not_json"),
        (b'{"kind":"like","event_id":1,]', "not_json"),
        (b'{"kind":"tick","event_id":1,"ts":1}{}', "not_json"),
        (DEEP % b"NaN", "not_json"),
        (b'{"kind":"tick","event_id":"\\ud800","ts":1}', "not_json"),
        (DEEP % (b"[" * 256 + b"]" * 256), "too_deep"),
        (DEEP % (b"[" * 100_000 + b"]" * 100_000), "too_deep"),
        (DEEP % (b'{"]":' * 256 + b"1" + b"}" * 256), "too_deep"),
        (b'{"kind":"tick","event_id":1,"ts":1}' + b" " * MAX_EVENT_BYTES, "too_large"),
        (b'{"kind":"tick","event_id":1,"ts":1,"kind":"click"}', "inconsistent"),
        (b'{"kind":"purchase","event_id":1,"ts":5,"user":1,"item":1,"price":1e400}', "out_of_range"),
        (b"[]", "wrong_type"),
        (b"null", "wrong_type"),
        (b'"click"', "wrong_type"),
    ],
)
def test_records_that_cannot_be_read_are_refused_by_a_stable_reason(raw, reason):
    with pytest.raises(Rejected) as refused:
        decode(raw)
    assert refused.value.reason == reason
    assert refused.value.detail
    assert reason in REASONS


def test_unknown_fields_may_hold_any_json():
    for more in (b"1e400", b"9" * 5_000, b'"\xc3\xbc"', b"[" * 255 + b"]" * 255, b'"[[[["'):
        decode(DEEP % more)


def alone(raw):
    try:
        return decode(raw)
    except Rejected as refused:
        return refused.reason, refused.detail


def in_a_batch(raws):
    return [(r.reason, r.detail) if isinstance(r, Rejected) else r for r in decode_many(raws)]


def test_many_records_are_decoded_as_each_alone_and_as_the_oracle_reads_them():
    good = [*sessions("m", 500, 1_700_000_000_000), *map(encode, EVENTS)]
    bad = mutated(good, 12_000, seed=2)
    raws = [None, *(raw for pair in zip(bad, good * 50, strict=False) for raw in pair)]
    together = in_a_batch(raws)
    for start in range(0, len(raws), 7):  # small batches too: most without anything to look at twice
        assert in_a_batch(raws[start : start + 7]) == together[start : start + 7]
    for raw, result in zip(raws, together, strict=True):
        assert alone(raw) == result
        assert (parse(raw) is None) == isinstance(result, tuple), raw
    assert Counter(result[0] for result in together if isinstance(result, tuple)).keys() >= REASONS.keys() - {
        "too_large", "from_the_future"
    }  # fmt: skip


def test_records_that_are_one_only_together_are_refused_each():
    whole = encode(EVENTS[1])
    cut = [b'{"kind":', b'"tick","event_id":1,"ts":1}' + whole]
    for raws in (cut, [b"", whole + b"\n" + whole], [whole[:-1], b"}"]):
        assert all(isinstance(result, Rejected) for result in decode_many(raws))
    inside = whole.replace(b",", b",\n")
    assert decode_many([inside, b" " + whole + b"\r\n"]) == [EVENTS[1], EVENTS[1]]


def test_fields_that_are_not_known_are_left_out():
    assert decode(json.dumps(CLICK | {"colour": "red"}).encode()) == decode(json.dumps(CLICK).encode())


JSON = st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)


@given(st.binary(max_size=60) | JSON)
def test_garbage_is_refused_and_nothing_else(raw):
    with pytest.raises(Rejected):
        decode(raw)
