"""What is set aside is counted, and has no other effect: in the joiner, in its blocks, and by the oracle's recount."""

from __future__ import annotations

from dataclasses import asdict

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from online_model.examples import Block, Examples, Part
from online_model.history import EMPTY
from online_model.positions import RowQueue
from replay.oracle import PartitionOracle, Rules
from streams.blocks import decode_block, encode_block
from streams.joiner import Joiner, JoinSettings, Record
from tests.streams.joining import one_joiner
from tests.streams.logs import SETTINGS, logs


@settings(max_examples=200, deadline=None)
@given(SETTINGS, logs(), st.lists(st.integers(0, 60), max_size=6, unique=True))
def test_a_joiner_that_sets_aside_is_one_that_never_saw_the_records(join, log, edges):
    edges = sorted(edges)
    ranges = [list(pair) for pair in zip(edges[::2], edges[1::2], strict=False)]
    kept = [record for record in log if not any(start <= record.offset < end for start, end in ranges)]
    joined = one_joiner(Joiner(join, 3), log, ranges)
    never_saw = Joiner(join, 3).process(kept).block
    rows = Examples.concat([j.block.examples for j in joined])
    if not any(b'"forget"' in (record.value or b"") for record in log if record not in kept):
        assert rows.row_id.tolist() == never_saw.examples.row_id.tolist()
        assert rows.history.tolist() == never_saw.examples.history.tolist()

    oracle = PartitionOracle(Rules.of(join))
    for record in log:
        oracle.feed(record.value, record.timestamp_ms, record not in kept)
    counts = asdict(joined[-1].block.counts) if joined else {}
    assert (len(rows), sum(rows.row_id.tolist()) % (1 << 64)) == (oracle.expected.rows, oracle.expected.sum)
    assert all(counts[name] == n for name, n in oracle.expected.balance.items() if joined)
    parts = ("rejected", "duplicates", "late", "joined", "history_only", "open", "set_aside")
    assert counts.get("events_in", 0) == sum(counts.get(part, 0) for part in parts)


def test_a_user_is_forgotten_all_the_same() -> None:
    joiner = Joiner(JoinSettings(disorder_ms=0), 0)
    about = {"user": "u", "scenario": "shelf"}
    click = about | {"kind": "click", "event_id": 1, "ts": 10, "item": "i"}
    later = {"kind": "tick", "event_id": 2, "ts": 20}
    joiner.process([Record(0, None, orjson.dumps(click)), Record(1, None, orjson.dumps(later))])
    forget = about | {"kind": "forget", "event_id": 3, "ts": 30}
    block = joiner.process([Record(2, None, orjson.dumps(forget))], set_aside=True).block
    assert (block.examples.part.tolist(), block.counts.set_aside, block.counts.joined) == ([Part.FORGET], 1, 0)
    shown = about | {"kind": "impression", "event_id": 4, "ts": 40, "request_id": "r", "items": ["j"]}
    rows = [
        *joiner.process([Record(3, None, orjson.dumps(shown))]).block.examples.history,
        *joiner.process([Record(4, None, orjson.dumps(later | {"ts": 9_000}))]).block.examples.history,
    ]
    assert [row.tobytes() for row in rows] == [EMPTY]


def test_what_is_held_from_before_a_forgetting_in_the_range_has_no_effect() -> None:
    joiner, about = Joiner(JoinSettings(disorder_ms=250, implicit=True), 0), {"user": "u", "scenario": "shelf"}
    click = about | {"kind": "click", "event_id": 1, "ts": 1_000, "item": "i"}
    forget = about | {"kind": "forget", "event_id": 2, "ts": 5_000}
    tick = {"kind": "tick", "event_id": 3, "ts": 9_000}
    joiner.process([Record(0, None, orjson.dumps(click))])
    for offset in (1, 2):  # it comes twice
        block = joiner.process([Record(offset, None, orjson.dumps(forget))], set_aside=True).block
        assert len(block.examples) == (offset == 1)
    block = joiner.process([Record(3, None, orjson.dumps(tick))]).block
    assert (len(block.examples), len(block.users), block.counts.history_only, block.counts.open) == (0, 0, 1, 0)


def test_a_block_says_that_its_range_was_set_aside() -> None:
    for aside in (False, True):
        assert decode_block(encode_block(Block(0, 3, 9, 9, 0, set_aside=aside))).set_aside is aside


def test_the_trainer_keeps_the_ranges_and_merges_those_that_touch() -> None:
    queue = RowQueue()
    for number, (start, aside) in enumerate([(0, False), (10, True), (20, True), (30, False), (40, True), (50, True)]):
        queue.offer(Block(0, start, start + 10, start + 10, 0, set_aside=aside), number)
        if number == 4:
            queue.finished()
            state, queue = queue.state(), RowQueue()
            queue.load(state)
    queue.finished()
    assert queue.positions[0].set_aside == [[10, 30], [40, 60]]
