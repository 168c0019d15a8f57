"""Random logs of one partition: disorder, duplicates, late events, ties, ticks, garbage, repeated ids of all kinds."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from streams.joiner import JoinSettings, Record

SETTINGS = st.builds(
    JoinSettings,
    disorder_ms=st.sampled_from([0, 5]),
    wait_ms=st.sampled_from([0, 4, 10]),
    click_window_ms=st.sampled_from([10, 20]),
    open_ms=st.sampled_from([20, 40]),
    watch_wait_ms=st.sampled_from([0, 6, 60]),
    purchase_window_ms=st.sampled_from([6, 8, 15, 100]),
    purchase_wait_ms=st.sampled_from([0, 0, 3, 6]),
    unclicked_of=st.sampled_from([1, 1, 2, 3]),
    implicit=st.booleans(),
    future_ms=st.sampled_from([30, 200]),
)
_IDS = st.sampled_from(["a", "a", "a", 1, "1", "ü\x00"])
_KINDS = [*["impression", "click", "click", "purchase", "watch"] * 3, "cart", "favourite", "refund", "tick", "forget"]
_GARBAGE = st.sampled_from([
    None, b"", b"[]", b"{}", b"\xff", b'{"kind":"like","event_id":1,"ts":1}', b'{"kind":["click"],"event_id":1,"ts":1}',
    b'{"kind":"click","event_id":1,"ts":1.5,"user":1,"item":1}',
])  # fmt: skip


@st.composite
def _events(draw, now: int, number: int) -> dict:
    kind = draw(st.sampled_from(_KINDS))
    ts = max(0, now + draw(st.sampled_from([0, 0, 0, -1, -3, -5, -6, -9, -20])))
    event_id = draw(st.sampled_from([*[f"e{number:03}", f"z{999 - number}"] * 5, "e000", number % 20]))
    event = {"kind": kind, "event_id": event_id, "ts": ts, "user": draw(st.sampled_from(["u", "u", "u", 1, "1"]))}
    event["scenario"] = draw(st.sampled_from(["live", "search"]))
    if kind == "impression" or draw(st.booleans()):
        event["request_id"] = draw(st.sampled_from(["r", "s", 1, f"r{number // 4}"]))
    if kind == "impression":
        event["items"] = items = draw(st.lists(_IDS, min_size=1, max_size=4))
        if draw(st.booleans()):
            event["positions"] = [draw(st.sampled_from([0, 3, -7, 99_999])) for _ in items]
            event["propensities"] = [draw(st.sampled_from([0.5, 1])) for _ in items]
            event["feature_hash"] = draw(st.sampled_from([0, 123]))
            event["context"] = draw(st.sampled_from([{}, {"query": "Ä b, b c-d e"}, {"query": "!"}, {"query": 7}]))
    elif kind not in ("tick", "forget"):
        event["item"] = draw(_IDS)
    if kind == "watch":
        event |= {"play_ms": draw(st.integers(0, 9)), "duration_ms": draw(st.sampled_from([0, 9]))}
    return event


@st.composite
def logs(draw, max_size: int = 40) -> list[Record]:
    records, now, offset = [], draw(st.sampled_from([0, 3, 100])), draw(st.sampled_from([0, 7]))
    for number in range(draw(st.integers(0, max_size))):
        now += draw(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 11]))
        offset += draw(st.sampled_from([1, 1, 1, 3]))
        garbage = draw(st.integers(0, 24)) == 24
        value = draw(_GARBAGE) if garbage else json.dumps(draw(_events(now, number))).encode()
        stamp = draw(st.sampled_from([None, None, now, now, now, now - 100]))
        records.append(Record(offset, stamp, value))
    return records
