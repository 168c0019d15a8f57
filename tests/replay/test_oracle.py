"""The oracle shares no code with the system, so it must at least agree with it on what an event is."""

import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replay.oracle import Expected, PartitionOracle, Rules, compare
from replay.oracle_events import parse
from streams.events import Rejected, decode

RULES = Rules(
    disorder_ms=250, wait_ms=2_000, click_window_ms=60_000, open_ms=60_000, watch_wait_ms=3_000,
    purchase_window_ms=600_000, purchase_wait_ms=0, unclicked_of=1, future_ms=3_600_000, implicit=False,
)  # fmt: skip
LAST_TICK = {"kind": "tick", "event_id": "end", "ts": 10_000_000}

ids = st.one_of(st.integers(-(1 << 64), 1 << 65), st.text(max_size=4), st.booleans(), st.none(), st.floats())
numbers = st.one_of(st.integers(-5, 5), st.just(1 << 44), st.floats(), st.none(), st.text(max_size=2))
scalars = st.one_of(ids, numbers)
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=2), ids))
SHARED = {"event_id": "e", "ts": 5, "user": "u", "request_id": "r", "scenario": "video"}
GOOD = [
    SHARED | {"kind": "impression", "items": [1, "b"], "positions": [0, 1], "propensities": [0.5, 1], "context": {}},
    *(SHARED | {"kind": kind, "item": 7} for kind in ("click", "cart", "favourite", "refund")),
    SHARED | {"kind": "watch", "item": 7, "play_ms": 3, "duration_ms": 0},
    SHARED | {"kind": "purchase", "item": 7, "quantity": 2, "price": 3, "currency": "EUR"},
    SHARED | {"kind": "forget"},
    {"kind": "forget", "event_id": 4, "ts": 9, "user": "u"},
    {"kind": "tick", "event_id": 3, "ts": 9},
]
NAMES = sorted({name for event in GOOD for name in event} | {"model_version", "feature_hash", "more", "v"})
odd = st.one_of(values, st.lists(values, max_size=2), st.sampled_from(["live", "click", "impression", "tick"]))
changes = st.dictionaries(st.sampled_from(NAMES), odd, max_size=2)
fields = st.builds(lambda good, bad: good | bad, st.sampled_from(GOOD), changes)


def system_takes(raw: bytes) -> bool:
    try:
        decode(raw)
    except Rejected:
        return False
    return True


@given(st.one_of(st.binary(max_size=40), fields.map(lambda f: json.dumps(f).encode())))
@example(b'{"kind":"click","event_id":"\\ud800","ts":5,"user":1,"item":1}')
@example(b'{"kind":"click","event_id":1,"ts":5,"user":1,"item":1,"x":NaN}')
@example(b'{"kind":"click","event_id":1,"event_id":2,"ts":5,"user":1,"item":1}')
@example(b'{"kind":"click","event_id":1,"ts":"x","ts":5,"user":1,"item":1}')
@example(b'{"kind":"click","event_id":1,"ts":5,"user":1,"item":1,"kind":"cart"}')
@example(b'{"kind":"click","event_id":1,"ts":5,"user":1,"item":1,"x":1e400,"y":' + b"9" * 5_000 + b"}")
@example(b'{"kind":"purchase","event_id":1,"ts":5,"user":1,"item":1,"price":1e400}')
@example(b'{"kind":"purchase","event_id":1,"ts":5,"user":1,"item":1,"price":-0.5}')
def test_the_oracle_and_the_system_refuse_the_same_records(raw: bytes) -> None:
    assert (parse(raw) is not None) == system_takes(raw)


@pytest.mark.parametrize("event", GOOD, ids=lambda event: event["kind"])
def test_every_kind_of_event_is_taken_by_both(event: dict) -> None:
    raw = msgspec.json.encode(event)
    assert parse(raw) is not None
    assert system_takes(raw)


def follow(*events: dict, rules: Rules = RULES) -> Expected:
    partition = PartitionOracle(rules)
    for event in (*events, LAST_TICK):
        partition.feed(json.dumps(event).encode(), None)
    return partition.expected


def shown(ts: int, *items: int, request: str = "r", event_id: str = "i") -> dict:
    return {"kind": "impression", "event_id": event_id, "ts": ts, "user": "u", "request_id": request, "items": [*items]}


def act(kind: str, ts: int, item: int, event_id: str, **more: object) -> dict:
    return {"kind": kind, "event_id": event_id, "ts": ts, "user": "u", "item": item, **more}


@pytest.mark.parametrize(
    ("events", "rows"),
    [
        ([shown(0, 1, 2)], 2),
        ([shown(0, 1, 2), act("click", 500, 1, "c")], 2),
        ([shown(0, 1), act("click", 5_000, 1, "c")], 2),  # learned as not clicked, then clicked
        ([shown(0, 1), act("click", 500, 1, "c"), act("click", 600, 1, "d")], 1),
        ([shown(0, 1), act("click", 500, 1, "c"), act("purchase", 9_000, 1, "p"), act("purchase", 9_500, 1, "q")], 2),
        ([shown(0, 1), act("purchase", 9_000, 1, "p")], 1),
        ([shown(0, 1), act("watch", 500, 1, "w", play_ms=5, duration_ms=9)], 2),
        ([shown(0, 1), shown(0, 1)], 1),  # one event twice
        ([shown(0, 1), shown(1, 1, event_id="j")], 1),  # one request twice
        ([act("click", 500, 1, "c")], 0),
    ],
)
def test_rows_of_small_logs_counted_by_hand(events: list[dict], rows: int) -> None:
    expected = follow(*events)
    assert expected.rows == rows
    balance = expected.balance
    assert balance["events_in"] == sum(balance[name] for name in balance if name != "events_in")
    assert balance["open"] == 0


def test_a_late_click_still_corrects_and_counts_as_late() -> None:
    expected = follow(shown(0, 1), {"kind": "tick", "event_id": "t", "ts": 9_000}, act("click", 500, 1, "c"))
    assert (expected.rows, expected.balance["late"], expected.balance["joined"]) == (2, 1, 1)


def test_compare_names_what_is_lost_and_what_is_twice() -> None:
    want = {0: Expected(rows=3, sum=30), 1: Expected(rows=2, sum=20)}
    assert compare(want, {0: (3, 30), 1: (2, 20 + (1 << 64))}).differing == []
    short = compare(want, {0: (2, 20)})
    assert (short.lost, short.duplicated, short.differing) == (3, 0, [0, 1])
    swapped = compare(want, {0: (3, 31), 1: (4, 40)})
    assert (swapped.lost, swapped.duplicated) == (1, 3)
