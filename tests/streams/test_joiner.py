"""The joiner keeps to docs/architecture.md, "Join semantics": a case for each rule, and random logs for all of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.errors import PositionError
from embedding_store.ids import feature_id
from online_model.examples import Block, Examples, Part, example_id, forget_name, implicit_name, request_name, row_id
from online_model.history import HISTORY_BYTES, Kind, UserHistory, history_hash, unpack
from replay.oracle import PartitionOracle, Rules
from replay.oracle_events import parse
from streams import open_impressions
from streams.dead_letters import DeadLetter
from streams.events import REASONS
from streams.join_state import NEVER
from streams.joiner import Joiner, JoinSettings, Record
from tests.streams.logs import SETTINGS, logs
from tests.streams.mutations import MUTATED, bad_between_good
from tests.streams.reference_joiner import ReferenceJoiner

S = JoinSettings(
    disorder_ms=10, wait_ms=100, open_ms=1_000, watch_wait_ms=300, purchase_window_ms=5_000, future_ms=10_000
)


def rows_of(examples: Examples) -> Counter:
    """The rows as a multiset of tuples of all columns."""
    columns = [getattr(examples, f.name).tolist() for f in fields(Examples)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    for row in rows:
        row[10] = None if math.isnan(row[10]) else row[10]
        row[17], row[18] = tuple(row[17]), tuple(row[18])
    return Counter(map(tuple, rows))


def batches(records: list[Record], cuts: list[int]) -> list[list[Record]]:
    edges = sorted({0, len(records), *(cut % (len(records) + 1) for cut in cuts)})
    return [records[a:b] for a, b in pairwise(edges)] or [[]]


def check_chain(blocks: list[Block]) -> None:
    """What holds between the blocks of one partition, whatever is in them."""
    for before, after in pairwise(blocks):
        assert before.to_offset == after.from_offset
        assert before.handled <= after.handled
        assert before.watermark <= after.watermark
        assert (after.examples.closed >= before.watermark).all()
    for b in blocks:
        c = b.counts
        assert c.events_in == c.rejected + c.duplicates + c.late + c.joined + c.history_only + c.open
        assert b.handled <= b.to_offset


@settings(max_examples=300, deadline=None)
@given(SETTINGS, logs(), st.lists(st.integers(0, 1000), max_size=5), st.sampled_from([0, 16]))
def test_joiner_equals_the_reference_however_records_are_batched(join, log, cuts, scanned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_impressions, "SCANNED", scanned)
        _check_against_the_reference(join, log, cuts)


def _check_against_the_reference(join: JoinSettings, log: list[Record], cuts: list[int]) -> None:
    reference = ReferenceJoiner(join)
    for record in log:
        reference.feed(record)
    joiner = Joiner(join, 3)
    joined = [joiner.process(batch) for batch in batches(log, cuts)]
    blocks = [j.block for j in joined]
    check_chain(blocks)
    assert rows_of(Examples.concat([b.examples for b in blocks])) == Counter(reference.rows)
    assert blocks[-1].counts == reference.counts
    assert [(letter.offset, letter.reason) for j in joined for letter in j.dead] == reference.dead
    assert blocks[-1].watermark == (NEVER if reference.watermark == -math.inf else reference.watermark)
    assert blocks[-1].handled == min([h[2] for h in reference.held], default=blocks[-1].to_offset)
    oracle = PartitionOracle(Rules.of(join))
    for record in log:
        oracle.feed(record.value, record.timestamp_ms)
    rows = [row for row, times in rows_of(Examples.concat([b.examples for b in blocks])).items() for _ in range(times)]
    assert (oracle.expected.rows, oracle.expected.sum) == (len(rows), sum(row[0] for row in rows) % 2**64)
    latest: dict[int, list[int]] = {}
    for b in blocks:
        for user in b.examples.user[b.examples.part == Part.FORGET].tolist():
            latest.pop(user, None)
        latest |= {user: h.tolist() for user, h in zip(b.users.tolist(), b.histories, strict=True)}
    assert latest == {feature_id("user", user): reference.history(user) for user in reference.log}


class Log:
    """Writes a log event by event, and joins it."""

    def __init__(self, join: JoinSettings = S) -> None:
        self.joiner, self.offset, self.blocks = Joiner(join, 0), 0, []

    def add(self, kind: str, ts: int, **more) -> Examples:
        """The rows that came of one event more."""
        event = {"kind": kind, "event_id": f"e{self.offset}", "ts": ts, "user": "u"} | more
        return self.raw(json.dumps(event).encode())

    def raw(self, value: bytes | None, stamp: int | None = None) -> Examples:
        joined = self.joiner.process([Record(self.offset, stamp, value)])
        self.offset += 1
        self.blocks.append(joined.block)
        self.dead = joined.dead
        return joined.block.examples

    def to(self, ts: int) -> Examples:
        """Time goes on: all that is before `ts` is handled."""
        return self.add("tick", ts + self.joiner.settings.disorder_ms)

    def shown(self, ts: int, request: str = "r", items=("i",), **more) -> None:
        self.add("impression", ts, request_id=request, items=list(items), **more)
        self.to(ts + 1)

    def rows(self) -> Examples:
        """All rows so far."""
        return Examples.concat([block.examples for block in self.blocks])

    @property
    def counts(self):
        return self.joiner.counts


def row_of(request: str, item: str, part: int) -> int:
    """The row id of a part of an impression's example."""
    return row_id(example_id(request_name(request), feature_id("item", item)), part)


def only(rows: Examples, *names: str) -> list:
    """The named columns of the only row."""
    assert len(rows) == 1
    return [getattr(rows, name).tolist()[0] for name in names]


def test_not_clicked_within_the_wait_is_a_row_with_click_0():
    log = Log()
    log.shown(1_000, positions=[4], propensities=[0.25], scenario="search")
    assert log.counts.open == 1
    assert len(log.to(1_100)) == 0
    rows = log.to(1_101)
    assert only(rows, "row_id", "part", "source") == [row_of("r", "i", 0), 0, 0]
    assert only(rows, "ts", "closed", "click", "purchase", "play_ms", "duration_ms") == [1_000, 1_100, 0, -1, -1, -1]
    assert only(rows, "position", "propensity", "scenario", "item_raw") == [4, 0.25, 2, '"i"']
    assert (log.counts.open, log.counts.joined, log.counts.rows) == (0, 1, 1)


def test_a_click_at_the_very_end_of_the_wait_is_within_it():
    log = Log()
    log.shown(1_000)
    log.add("click", 1_100, item="i", request_id="r")
    assert only(log.to(2_500), "part", "click", "purchase", "closed") == [0, 1, 0, 1_100]


def test_a_click_after_the_wait_corrects_the_row():
    log = Log()
    log.shown(1_000)
    log.add("click", 1_101, item="i")
    log.add("click", 1_102, item="i")
    rows = log.to(1_500)
    assert rows.part.tolist() == [0, 1]
    assert rows.click.tolist() == [0, 1]
    assert (log.counts.joined, log.counts.history_only) == (3, 0)


def test_after_the_end_nothing_is_found():
    log = Log()
    log.shown(1_000)
    log.add("click", 2_000, item="i", request_id="r")  # at the end itself it still is
    log.add("click", 2_001, item="i", request_id="r")
    log.to(2_500)
    assert log.rows().part.tolist() == [0, 1]
    assert log.counts.history_only == 1
    impressions = log.joiner.open
    assert not any((impressions._shown, impressions._users))
    assert impressions.examples == 0


def test_an_action_without_request_finds_the_newest_impression_before_it():
    log = Log()
    log.shown(1_000, "r1")
    log.shown(1_050, "r2")
    log.shown(1_070, "r3")
    log.add("click", 1_060, item="i")  # late: the watermark is past it
    log.add("click", 1_080, item="i", request_id="r1")
    log.add("click", 1_081, item="i", request_id="unknown")
    log.to(1_090)
    rows = log.rows()
    assert rows.row_id.tolist() == [row_of(r, "i", 0) for r in ("r2", "r1", "r3")]
    assert (log.counts.late, log.counts.open, log.counts.joined) == (1, 0, 5)


def test_ties_go_to_the_largest_event_id():
    log = Log()
    log.add("impression", 1_000, request_id="r2", items=["i"], event_id="b")
    log.add("impression", 1_000, request_id="r1", items=["i"], event_id="a")
    log.add("click", 1_000, item="i", event_id="c")
    assert only(log.to(1_001), "row_id") == [row_of("r2", "i", 0)]


def test_the_longest_watch_makes_one_row():
    log = Log()
    log.shown(1_000)
    log.add("watch", 1_010, item="i", play_ms=5, duration_ms=60)
    log.add("watch", 1_020, item="i", play_ms=50, duration_ms=61)
    log.add("watch", 1_310, item="i", play_ms=7, duration_ms=62)
    log.add("watch", 1_311, item="i", play_ms=99, duration_ms=63)
    log.to(1_400)
    rows = log.rows()
    assert rows.part.tolist() == [0, 2]
    assert [rows.play_ms[1], rows.duration_ms[1], rows.click[1], rows.closed[1]] == [50, 61, -1, 1_310]
    assert log.counts.joined == 5


def test_a_watch_near_the_end_is_told_at_the_end():
    log = Log()
    log.shown(1_000)
    log.to(1_200)
    log.add("watch", 1_900, item="i", play_ms=5, duration_ms=0)
    assert only(log.to(3_000), "part", "closed") == [2, 2_000]


def test_a_purchase_joins_the_last_click_once():
    log = Log()
    log.shown(1_000, "r1", positions=[2])
    log.shown(1_010, "r2")
    log.add("click", 1_020, item="i", request_id="r1")
    log.to(3_000)
    log.add("purchase", 6_020, item="i", request_id="r2")
    log.add("purchase", 6_020, item="i")
    rows = log.to(6_021)
    assert only(rows, "row_id", "part") == [row_of("r1", "i", 3), 3]
    assert only(rows, "ts", "closed", "click", "purchase", "position") == [1_000, 6_020, -1, 1, 2]
    log.add("purchase", 6_021, item="i")
    assert len(log.to(6_030)) == 0
    assert (log.counts.joined, log.counts.history_only) == (5, 1)


def test_what_was_bought_stays_known_when_it_is_clicked_again():
    log = Log()
    log.shown(1_000)
    for ts, kind in ((1_010, "click"), (1_020, "purchase"), (1_030, "click"), (1_040, "purchase")):
        log.add(kind, ts, item="i")
    log.to(1_050)
    assert log.rows().part.tolist() == [0, 3]
    log.shown(1_060, "r2")
    log.add("click", 1_070, item="i")
    log.add("purchase", 1_080, item="i")
    log.to(1_090)
    assert log.rows().part.tolist() == [0, 3, 0, 3]  # of another example


def test_a_late_click_does_not_take_the_window_from_a_later_one():
    log = Log()
    log.shown(1_000, "r1")
    log.shown(1_010, "r2")
    log.add("click", 1_500, item="i", request_id="r1")
    log.to(1_600)
    assert only(log.add("click", 1_400, item="i", request_id="r2"), "part") == [1]
    assert len(log.add("click", 1_450, item="i", request_id="r1")) == 0
    log.add("purchase", 6_500, item="i")  # at the very end of the window that the click at 1500 opened
    assert log.to(6_501).row_id.tolist() == [row_of("r1", "i", 3)]


def test_a_window_that_has_ended_is_not_found_by_a_late_purchase():
    log = Log()
    log.shown(1_000)
    log.add("click", 1_100, item="i")
    log.to(6_101)
    assert len(log.add("purchase", 6_050, item="i")) == 0


def test_implicit_clicks_are_examples_of_their_own():
    log = Log(JoinSettings(disorder_ms=10, implicit=True))
    log.add("cart", 990, item=8)
    log.add("click", 1_000, item=7)
    log.add("purchase", 1_001, item=7)
    rows = log.to(1_002)
    example = example_id(implicit_name("e1"), feature_id("item", 7))
    assert rows.row_id.tolist() == [row_id(example, 0), row_id(example, 3)]
    assert rows.source.tolist() == [1, 1]
    assert rows.position.tolist() == [-1, -1]
    assert unpack(rows.history)["intent"]["item"][:, :2].tolist() == [[feature_id("item", 8), 0]] * 2
    assert not unpack(rows.history)["recent"]["item"].any()
    assert rows.item_raw.tolist() == ["7", "7"]
    log.add("click", 900, item=9)
    assert len(log.to(1_003)) == 0  # late: no row
    assert (log.counts.joined, log.counts.late, log.counts.history_only) == (2, 1, 1)


def test_features_are_of_events_with_strictly_smaller_time():
    log = Log()
    log.add("click", 1_000, item="a", event_id="a")
    log.add("click", 1_001, item="b", event_id="a2")
    log.add("impression", 1_001, request_id="r", items=["i"], event_id="b", feature_hash=0)
    known = UserHistory()
    known.push(feature_id("item", "a"), 1_000, Kind.CLICK)
    log.add("impression", 1_001, request_id="s", items=["i"], event_id="c", feature_hash=history_hash(known.latest()))
    rows = log.to(1_200)
    assert unpack(rows.history)["recent"]["item"][:, :2].tolist() == [[feature_id("item", "a"), 0]] * 2
    assert (log.counts.skew_checked, log.counts.skew_differs) == (2, 1)


def test_duplicates_have_no_effect_until_they_are_forgotten():
    log = Log()
    log.shown(1_000, event_id=5)
    log.add("impression", 9_999, request_id="r", items=["x", "y"], event_id="5")
    assert (log.counts.duplicates, log.counts.events_in, log.joiner.watermark) == (2, 3, 1_001)
    log.to(2_000)
    log.add("click", 2_000, item="i", event_id=5)
    assert log.counts.duplicates == 3
    log.to(2_001)
    log.add("click", 2_001, item="i", event_id=5)
    assert (log.counts.duplicates, log.counts.late) == (3, 0)
    assert len(log.joiner._seen.first) == 1


def test_an_item_shown_twice_in_a_request_is_a_duplicate():
    log = Log()
    log.shown(1_000, items=["i", "j", "i"], positions=[1, 2, 3])
    log.shown(1_010, items=["k", "j"])
    assert (log.counts.duplicates, log.counts.open) == (2, 3)
    rows = log.to(1_200)
    assert rows.item_raw.tolist() == ['"i"', '"j"', '"k"']
    assert rows.position.tolist() == [1, 2, -1]


def test_a_late_event_corrects_and_is_counted_as_late_only():
    log = Log()
    log.shown(1_000)
    log.to(1_500)
    rows = log.add("click", 1_050, item="i")
    assert only(rows, "part", "closed") == [1, 1_500]
    log.add("impression", 1_400, request_id="q", items=["x", "y"])
    log.add("watch", 1_100, item="i", play_ms=1, duration_ms=1)
    assert only(log.to(1_501), "part", "closed") == [2, 1_500]
    assert (log.counts.late, log.counts.joined, log.counts.open) == (4, 1, 0)
    assert log.blocks[-1].counts.events_in == 5


def test_bad_records_are_refused_and_kept_whole_with_their_place():
    log = Log()
    log.raw(b"x" * 5_000, stamp=77)
    (letter,) = log.dead
    assert letter == DeadLetter("not_json", letter.detail, 0, 0, 77, b"x" * 5_000)
    assert letter.detail
    log.raw(None)
    assert (log.dead[0].value, log.dead[0].offset) == (None, 1)
    ahead = b'{"kind":"tick","event_id":1,"ts":10001}'
    log.raw(ahead, stamp=0)
    assert (log.dead[0].reason, log.dead[0].value) == ("from_the_future", ahead)
    log.raw(b'{"kind":"tick","event_id":1,"ts":10000}', stamp=0)
    assert log.dead == []
    assert (log.counts.events_in, log.counts.rejected, log.joiner.watermark) == (3, 3, 9_990)


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_mutated_records_harm_no_other_record(count: int) -> None:
    """Judged by the oracle's reading; those that it refuses might as well not be there, and no good one is touched."""
    log = bad_between_good(count)
    records = [Record(offset, stamp, value) for offset, (_, stamp, value) in enumerate(log)]
    events = [(record, parse(record.value)) for record in records]
    accepted = [r for r, event in events if event is not None and event["ts"] <= r.timestamp_ms + MUTATED.future_ms]
    taken = {record.offset for record in accepted}

    joiner, blocks, dead = Joiner(MUTATED, 0), [], []
    for start in range(0, len(records), 2_000):
        joined = joiner.process(records[start : start + 2_000])
        blocks.append(joined.block)
        dead += joined.dead
    check_chain(blocks)
    refused = [(r.offset, r.timestamp_ms, r.value) for r in records if r.offset not in taken]
    assert [(letter.offset, letter.timestamp_ms, letter.value) for letter in dead] == refused
    assert {letter.reason for letter in dead} == REASONS.keys() - {"too_large"}
    assert len(dead) > 0.7 * count

    without = Joiner(MUTATED, 0).process(accepted).block
    rows = rows_of(Examples.concat([block.examples for block in blocks]))
    assert rows == rows_of(without.examples)
    assert blocks[-1].counts == replace(
        without.counts, events_in=without.counts.events_in + len(dead), rejected=len(dead)
    )
    good = Joiner(MUTATED, 0).process([record for record, (good, _, _) in zip(records, log, strict=True) if good]).block
    assert rows_of(good.examples) <= rows
    assert (good.counts.joined, good.counts.history_only) == (7 * count // 20, count // 20)


def test_a_click_before_its_impression_is_history_only_whatever_order_they_come_in():
    log = Log()
    log.add("click", 1_005, item="i", request_id="r")
    log.add("impression", 1_000, request_id="r", items=["i"])  # later in the log, earlier in time
    log.add("click", 999, item="i", request_id="r")
    log.to(1_200)
    assert (log.rows().part.tolist(), log.rows().click.tolist()) == ([0], [1])
    assert (log.counts.joined, log.counts.history_only) == (2, 1)


def test_at_the_end_of_a_log_what_is_held_or_open_stays_so():
    log = Log()
    log.shown(1_000)
    log.add("click", 1_050, item="i")
    assert (log.counts.open, len(log.rows())) == (2, 0)
    log.to(1_000 + S.closing_ms)
    assert (log.counts.open, log.rows().part.tolist()) == (0, [0])


def test_nothing_is_known_of_a_forgotten_user():
    log = Log(JoinSettings(disorder_ms=10, wait_ms=100, purchase_wait_ms=500))
    log.shown(1_000, "r1", items=["i", "j"])
    log.shown(1_001, "other", user="v")
    log.add("click", 1_010, item="i")
    log.add("watch", 1_020, item="i", play_ms=3, duration_ms=9)
    log.add("forget", 1_050, event_id="f")
    log.to(1_051)
    rows = log.rows()
    assert rows.part.tolist() == [0, 5], "the click; then the word that the user is forgotten"
    assert rows.row_id[1] == row_id(example_id(forget_name("f"), feature_id("user", "u")), 5)
    assert (rows.user[1], rows.item[1], rows.closed[1]) == (feature_id("user", "u"), 0, 1_050)
    assert log.blocks[-1].users.tolist() == []
    log.add("cart", 1_045, item="k")  # late, from before
    log.add("click", 1_060, item="i")
    log.add("purchase", 1_070, item="i")
    log.to(9_000)
    assert log.rows().part.tolist() == [0, 5, 0], "of the other user"
    assert (log.counts.history_only, log.counts.late, log.counts.open) == (3, 1, 0), "j, the click, the purchase"
    log.shown(9_100, "r2")
    later = log.to(9_300)
    known = unpack(later.history)["recent"]["item"][0, :2].tolist()
    assert known == [feature_id("item", "i"), 0], "what came after it"


def test_a_late_forget_erases_at_once():
    log = Log()
    log.shown(1_000)
    log.add("click", 1_010, item="i")
    log.to(1_200)
    assert only(log.add("forget", 900), "part", "closed", "ts") == [5, 1_200, 900]
    log.add("purchase", 1_150, item="i")  # late
    assert log.to(1_300).part.tolist() == []
    assert (log.counts.late, log.counts.joined) == (2, 2)


def test_an_impression_can_be_clicked_for_a_shorter_time_than_it_can_be_watched():
    log = Log(JoinSettings(disorder_ms=10, wait_ms=100, click_window_ms=300, open_ms=1_000, watch_wait_ms=0))
    log.shown(1_000)
    log.add("click", 1_300, item="i", request_id="r")
    log.add("click", 1_301, item="i", request_id="r", user="v")
    log.shown(2_000, "s")
    log.add("click", 2_301, item="i", request_id="s")
    log.add("watch", 2_302, item="i", request_id="s", play_ms=1, duration_ms=2)
    log.to(4_000)
    assert log.rows().part.tolist() == [0, 1, 0, 2]
    assert log.counts.history_only == 2


def test_not_bought_is_said_after_the_purchase_wait():
    log = Log(JoinSettings(disorder_ms=10, wait_ms=100, purchase_wait_ms=500, purchase_window_ms=5_000))
    log.shown(1_000)
    log.add("click", 1_050, item="i")
    assert only(log.to(1_060), "part", "click", "purchase") == [0, 1, -1]
    log.add("click", 1_300, item="i")
    assert len(log.to(1_550)) == 0
    rows = log.to(1_551)
    assert only(rows, "row_id", "part", "closed") == [row_of("r", "i", 4), 4, 1_550]
    assert only(rows, "click", "purchase", "delay_ms", "item_raw") == [-1, 0, -1, '"i"']
    log.add("purchase", 6_000, item="i")
    assert only(log.to(6_001), "part", "purchase", "delay_ms") == [3, 1, 4_950]


def test_bought_within_the_purchase_wait_is_said_at_once_and_alone():
    log = Log(JoinSettings(disorder_ms=10, wait_ms=100, purchase_wait_ms=500, purchase_window_ms=5_000))
    log.shown(1_000)
    log.add("click", 1_050, item="i")
    log.add("purchase", 1_550, item="i")
    log.to(7_000)
    assert log.rows().part.tolist() == [0, 3]


def test_an_example_that_loses_the_window_is_not_bought():
    log = Log(JoinSettings(disorder_ms=10, wait_ms=100, purchase_wait_ms=500, purchase_window_ms=5_000))
    log.shown(1_000, "r1")
    log.shown(1_001, "r2")
    log.shown(1_002, "r3")
    log.add("click", 1_050, item="i", request_id="r1")
    log.add("click", 1_060, item="i", request_id="r2")
    log.to(1_065)
    rows = log.rows()
    assert rows.part.tolist() == [0, 0, 4]
    assert rows.row_id[2] == row_of("r1", "i", 4)
    rows = log.add("click", 1_055, item="i", request_id="r3")  # late: the click at 1060 holds the window
    assert rows.part.tolist() == [0, 4]
    assert rows.closed.tolist() == [1_065, 1_065]
    log.add("purchase", 1_070, item="i")
    assert log.to(9_000).row_id.tolist() == [row_of("r2", "i", 3)]


def test_one_in_so_many_unclicked_rows_is_kept_and_says_so():
    log = Log(JoinSettings(disorder_ms=10, wait_ms=100, unclicked_of=4))
    for n in range(400):
        log.add("impression", 1_000 + n, request_id=f"r{n}", items=["a", "b"])
    log.add("click", 1_400, item="a", request_id="r399")
    log.to(3_000)
    rows = log.rows()
    unclicked = rows.take(rows.click == 0)
    assert 150 < len(unclicked) < 250, "799 in four"
    assert set(unclicked.rate.tolist()) == {0.25}
    assert (unclicked.row_id.view(np.uint64) % np.uint64(4) == 0).all()
    assert rows.rate[rows.click == 1].tolist() == [1.0]
    assert (log.counts.joined, log.counts.rows) == (801, len(rows)), "what is not kept is joined all the same"


def test_blocks_follow_one_another_over_holes_in_the_log():
    joiner = Joiner(S, 0, next_offset=5)
    tick = b'{"kind":"tick","event_id":1,"ts":100}'
    assert joiner.process([]).block.to_offset == 5
    block = joiner.process([Record(3, None, b"seen before"), Record(6, None, tick)], to_offset=9).block
    assert (block.from_offset, block.to_offset, block.handled, block.watermark) == (5, 9, 9, 90)
    assert block.counts.rejected == 0
    with pytest.raises(PositionError, match="ends at offset 12 holds record 12"):
        joiner.process([Record(12, None, tick)], to_offset=12)


def test_handled_stays_below_what_is_held():
    log = Log()
    log.add("click", 1_000, item="i")
    log.add("click", 1_005, item="i")
    assert [b.handled for b in log.blocks] == [0, 0]
    log.to(1_001)
    assert log.blocks[-1].handled == 1
    log.to(1_006)
    assert log.blocks[-1].handled == log.blocks[-1].to_offset == 4


def test_every_action_but_a_refund_changes_what_is_known_of_a_user():
    log = Log()
    for n, kind in enumerate(("click", "click", "watch", "cart", "favourite", "purchase", "refund")):
        more = {"play_ms": 1, "duration_ms": 2} if kind == "watch" else {}
        log.add(kind, 1_000 + n, item="i", **more)
        log.to(1_001 + n)
        assert log.blocks[-1].users.tolist() == ([] if kind == "refund" else [feature_id("user", "u")])
    (state,) = unpack(log.blocks[-3].histories)
    assert state["recent"]["kind"][:3].tolist() == [Kind.WATCH, Kind.CLICK, 0]
    assert state["intent"]["kind"][:4].tolist() == [Kind.PURCHASE, Kind.FAVOURITE, Kind.CART, 0]
    assert state["counts"].sum(1).tolist() == [[2, 1, 2, 1]] * 3


def test_memory_is_bounded_by_the_windows():
    log = Log()
    for n in range(3_000):
        log.add("impression", n * 10, request_id=f"r{n}", items=["i", f"i{n}"])
        log.add("click", n * 10, item="i", user=n)
        log.add("click", n * 10 + 1, item="i")
    joiner = log.joiner
    assert len(joiner._seen.first) < 500
    assert joiner.open.numbers.next - joiner.open.numbers.first == len(joiner.open._shown) < 120
    assert sum(len(mine.shown) for mine in joiner.open._users.values()) == len(joiner.open._shown)
    assert all(mine._items is None or len(mine._items) < 121 for mine in joiner.open._users.values())
    assert len(joiner.open._pages) == 1
    assert len(joiner._windows) < 600


def test_wait_must_not_be_longer_than_open():
    with pytest.raises(ValueError, match="must not be longer"):
        JoinSettings(wait_ms=2, open_ms=1)


def test_an_empty_block_has_all_columns():
    block = Joiner(S, 0).process([]).block
    assert block.watermark == NEVER
    assert block.histories.shape == (0, HISTORY_BYTES)
    assert block.examples.history.dtype == np.uint8
