"""Faults on purpose: the same each time, as many as asked for, and those within the join's promises change nothing."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from queue import SimpleQueue

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from online_model.examples import Counts, Examples
from replay import faults
from replay.faults import COPY_MS, FaultCounts, FaultSettings, Garbage, arrivals, with_faults
from replay.oracle_events import parse
from replay.player import Played, PlaySettings, WallClock, play
from replay.readers.base import Record
from replay.simulator import Simulation, SimulatorSettings
from streams.events import MAX_EVENT_BYTES, Click, Event, Id, Item, Rejected, Tick, decode, encode, units
from streams.joiner import Joiner, JoinSettings
from streams.joiner import Record as LogRecord
from streams.topics import MAX_RECORD_BYTES
from tests.streams.test_joiner import rows_of

L = JoinSettings().disorder_ms
SETTINGS = st.builds(
    FaultSettings,
    seed=st.integers(0, 1 << 31),
    duplicates=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    delay=st.sampled_from([0.0, 0.1, 1.0]),
    delay_ms=st.sampled_from([1, 40, 3_000]),
    shuffle_ms=st.sampled_from([0, 1, 30, 250]),
    drop=st.sampled_from([0.0, 0.2]),
    garbage=st.sampled_from([0.0, 0.2]),
)
UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # a smaller seed is no simpler
GAPS = st.lists(st.sampled_from([0, 0, 1, 5, 20, 400]), max_size=60)


def click(ts: int, number: int) -> Click:
    return Click(event_id=f"e{number}", ts=ts, user=number % 5, item=7)


def clicks(gaps: Iterable[int], start: int = 1_000) -> list[Click]:
    events: list[Click] = []
    for number, gap in enumerate(gaps):
        start += gap
        events.append(click(start, number))
    return events


@lru_cache
def marketplace(seed: int, seconds: float = 10) -> list[Record]:
    world = SimulatorSettings(seed=seed, users=40, items=30, requests_per_s=30.0)
    return list(Simulation(world, seconds=seconds))


def events_of(records: Iterable[Record | Garbage]) -> list[Event]:
    return [record for record in records if not isinstance(record, Item | Garbage)]


@dataclass
class Partitions:
    """A sink of so many partitions by user, each as its records would stand in Kafka."""

    partitions: int = 3
    ticks: bool = True  # False: only the closing one
    logs: list[list[LogRecord]] = field(init=False)
    told: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.logs = [[] for _ in range(self.partitions)]

    def send(self, record: Event | Item) -> None:
        if not isinstance(record, Item | Tick):
            self.send_raw(encode(record), record.user)

    def send_raw(self, value: bytes, user: Id) -> None:
        self._put(zlib.crc32(str(user).encode()) % self.partitions, value)

    def tick(self, ts: int) -> int:
        self.told.append(ts)
        for partition in range(self.partitions) if self.ticks else ():
            self._put(partition, encode(Tick(event_id="t", ts=ts)))
        return self.partitions

    def _put(self, partition: int, value: bytes) -> None:
        log = self.logs[partition]
        log.append(LogRecord(len(log), None, value))

    def flush(self) -> None:
        if not self.ticks:
            self.ticks = True
            self.tick(self.told[-1])

    def close(self) -> None:
        pass


class FastClock:
    """A clock that only waiting moves."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def wait(self, calls: SimpleQueue[bool], seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Outcome:
    rows: Counter
    counts: Counts
    played: Played
    sink: Partitions


def joined(
    records: Iterable[Record], dealt: FaultSettings, speed: float = 0.0, sink: Partitions | None = None
) -> Outcome:
    """What the real joiners make of the records played with faults."""
    sink = sink or Partitions()
    clock = FastClock() if speed else WallClock()
    played = play(records, sink, PlaySettings(speed=speed, faults=dealt), clock=clock)
    total, blocks = Counts(), []
    for partition, log in enumerate(sink.logs):
        joiner = Joiner(JoinSettings(), partition)
        blocks.append(joiner.process(log).block.examples)
        for name, value in vars(joiner.counts).items():
            setattr(total, name, getattr(total, name) + value)
    return Outcome(rows_of(Examples.concat(blocks)), total, played, sink)


# --- what the joiner makes of it


@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
@given(
    st.integers(0, 9), st.integers(0, 1000), st.sampled_from([0.05, 1.0]), st.sampled_from([0, 20, L]),
    st.sampled_from([0.0, 10.0]),
)  # fmt: skip
def test_duplicates_and_disorder_within_l_change_no_example(world, seed, duplicates, shuffle_ms, speed):
    log = marketplace(world)
    clean = joined(log, FaultSettings())
    faulted = joined(log, FaultSettings(seed=seed, duplicates=duplicates, shuffle_ms=shuffle_ms), speed)
    assert faulted.rows == clean.rows
    assert clean.rows.total() > 500
    assert faulted.counts.late == clean.counts.late == 0
    assert faulted.played.faults.duplicates > 0
    assert faulted.counts.duplicates == faulted.played.events - clean.played.events
    assert faulted.counts.events_in == faulted.played.events
    assert len(faulted.sink.told) > 3
    assert shuffle_ms == 0 or faulted.played.faults.shuffled > 20


def test_disorder_past_l_does_change_them():
    log = marketplace(1)
    faulted = joined(log, FaultSettings(shuffle_ms=20 * L))
    assert faulted.counts.late > 100
    assert faulted.rows != joined(log, FaultSettings()).rows


def test_garbage_is_rejected_and_harms_nothing():
    log = marketplace(2)
    clean, faulted = joined(log, FaultSettings()), joined(log, FaultSettings(garbage=0.5))
    assert faulted.rows == clean.rows
    assert faulted.counts.rejected == faulted.played.faults.garbage > 100
    assert faulted.counts.events_in == faulted.played.events == clean.played.events + faulted.counts.rejected


@settings(max_examples=8, deadline=None, phases=UNSHRUNK)
@given(st.integers(0, 9), st.integers(0, 1000), st.sampled_from([0.05, 0.5]))
def test_no_tick_makes_an_event_late_so_the_pace_changes_nothing(world, seed, delay):
    """40 partitions: most of them are idle, so that a tick that is ahead of what is delayed would do harm."""
    log, dealt = marketplace(world), FaultSettings(seed=seed, delay=delay, delay_ms=4_000, shuffle_ms=100)
    slow, fast, none = (
        joined(log, dealt, speed, Partitions(40, ticks))
        for speed, ticks in ((20.0, True), (0.0, True), (0.0, False))
    )
    assert slow.rows == fast.rows == none.rows
    assert slow.counts == fast.counts == none.counts
    assert none.counts.late > 0
    assert len(slow.sink.told) > len(fast.sink.told) > 0


# --- what is dealt


@settings(max_examples=200, deadline=None)
@given(GAPS, SETTINGS)
def test_everything_comes_within_its_bounds(gaps, dealt):
    log = clicks(gaps)
    counts = FaultCounts()
    sent = list(arrivals(log, dealt, counts))
    times = [due for due, _ in sent]
    assert times == sorted(times)
    coming = 1 << 62
    for due, record in reversed(sent):
        if not isinstance(record, Garbage):
            assert due - dealt.lag_ms <= record.ts <= due, "sent before its time, or later than it may"
            coming = min(coming, record.ts)
        assert coming >= due - dealt.lag_ms, "a tick at this place would be past what is still to come"
    count = Counter(event.event_id for event in events_of(record for _, record in sent))
    assert set(count.values()) <= {1, 2}
    assert sum(n == 2 for n in count.values()) == counts.duplicates
    assert len(log) - len(count) == counts.dropped
    assert len(sent) == len(log) - counts.dropped + counts.duplicates + counts.garbage


@settings(max_examples=200, deadline=None)
@given(GAPS, st.integers(0, 999), st.sampled_from([1, 7, 30, 250]))
def test_no_event_comes_after_one_that_is_more_than_d_later(gaps, seed, shuffle_ms):
    log, newest = clicks(gaps), 0
    counts = FaultCounts()
    sent = events_of(with_faults(log, FaultSettings(seed=seed, shuffle_ms=shuffle_ms), counts))
    assert Counter(sent) == Counter(log)
    disordered = 0
    for event in sent:
        assert event.ts >= newest - shuffle_ms
        disordered += event.ts < newest
        newest = max(newest, event.ts)
    assert counts.shuffled == disordered


def test_shares_are_what_was_asked_for():
    log = clicks([3] * 20_000)
    counts = FaultCounts()
    dealt = FaultSettings(duplicates=0.05, delay=0.02, delay_ms=500, shuffle_ms=40, drop=0.1, garbage=0.01)
    sent = list(with_faults(log, dealt, counts))
    near = {"duplicates": 900, "delayed": 360, "dropped": 2_000, "garbage": 200}  # of 18,000, of 20,000
    for name, expected in near.items():
        assert getattr(counts, name) == pytest.approx(expected, abs=4 * expected**0.5), name
    assert counts.shuffled > 8_000
    assert sum(isinstance(record, Garbage) for record in sent) == counts.garbage


def test_a_duplicate_is_the_very_same_record_at_once_or_soon_and_never_first():
    log = clicks([10] * 2_000)
    place, lags = {event.event_id: n for n, event in enumerate(log)}, []
    newest = 0
    seen = set()
    for event in events_of(with_faults(log, FaultSettings(duplicates=1.0))):
        assert event is log[place[event.event_id]]
        if event.event_id in seen:
            lags.append(newest - event.ts)
        seen.add(event.event_id)
        newest = max(newest, event.ts)
    assert len(lags) == 2_000
    assert sum(lag == 0 for lag in lags) == pytest.approx(1_000, abs=130)
    assert COPY_MS * 0.9 < max(lags) <= COPY_MS
    assert JoinSettings().open_ms > 100 * COPY_MS


def test_the_same_event_has_the_same_faults_in_any_window():
    log = clicks([3] * 5_000)
    dealt = FaultSettings(seed=5, duplicates=0.1, drop=0.1, garbage=0.1, delay=0.1, delay_ms=90, shuffle_ms=30)
    sent = list(with_faults(log, dealt))
    assert list(with_faults(log, dealt)) == sent
    assert list(with_faults(log, msgspec.structs.replace(dealt, seed=6))) != sent
    part = Counter(event.event_id for event in events_of(with_faults(log[1_000:3_000], dealt)))
    whole = Counter(event.event_id for event in events_of(sent))
    assert part == Counter({event.event_id: whole[event.event_id] for event in log[1_000:3_000]})


def test_each_kind_of_garbage_is_refused_by_the_system_and_by_the_oracle():
    log = events_of(marketplace(3, seconds=30))
    found: Counter[str] = Counter()
    pieces = [record for record in with_faults(log, FaultSettings(garbage=1.0)) if isinstance(record, Garbage)]
    assert len(pieces) == len(log)
    for piece in pieces:
        assert b"\n" not in piece.value
        assert b"\r" not in piece.value
        assert len(piece.value) < MAX_RECORD_BYTES - 32_000
        assert parse(piece.value) is None
        with pytest.raises(Rejected) as caught:
            decode(piece.value)
        found[caught.value.reason] += 1
        found["negative"] += ">= 0" in str(caught.value)
        found["huge"] += len(piece.value) > MAX_EVENT_BYTES
        found["not text"] += piece.value.startswith(b"\xff")
        assert (caught.value.reason == "not_utf8") == piece.value.startswith(b"\xff")
        found["cut short"] += piece.value.startswith(b"{") and not piece.value.endswith(b"}")
    assert all(found[kind] for kind in ("wrong_type", "too_large", "negative", "not text", "cut short")), found
    assert found["huge"] == found["too_large"] < 0.03 * len(pieces)
    assert {piece.user for piece in pieces} == {event.user for event in log if not isinstance(event, Tick)}


# --- in passing


def test_items_stay_before_their_events_and_ticks_are_left_out():
    log: list[Record] = []
    for event in clicks([5] * 500):
        log += [Item(item=f"i{event.event_id}"), event, Tick(event_id="t", ts=event.ts + 9_000_000)]
    told: set[str] = set()
    for record in with_faults(log, FaultSettings(shuffle_ms=100, duplicates=0.3, delay=0.1)):
        if isinstance(record, Item):
            told.add(str(record.item))
        else:
            assert not isinstance(record, Tick | Garbage)
            assert f"i{record.event_id}" in told
    assert len(told) == 500


def test_without_faults_nothing_is_touched_or_held_back():
    log = clicks([5] * 10)
    log[3], log[6] = log[6], log[3]
    read = 0

    def reading() -> Iterator[Record]:
        nonlocal read
        for record in log:
            read += 1
            yield record

    for number, record in enumerate(with_faults(reading(), FaultSettings()), 1):
        assert record is log[number - 1]
        assert read == number


def test_memory_is_flat(monkeypatch):
    """No more is read than what one lag takes, and where that is too much the bound on order still holds."""
    read = 0

    def reading() -> Iterator[Record]:
        nonlocal read
        for number in range(20_000):
            read += 1
            yield click(number, number)

    ahead = [read - n for n, _ in enumerate(with_faults(reading(), FaultSettings(shuffle_ms=100)), 1)]
    assert 50 < max(ahead) <= 101
    monkeypatch.setattr(faults, "MOST_HELD", 500)
    read, newest, ahead = 0, 0, []
    for n, (due, record) in enumerate(arrivals(reading(), FaultSettings(shuffle_ms=2_000), FaultCounts()), 1):
        assert isinstance(record, Click)
        assert newest - 2_000 <= record.ts <= due
        newest = max(newest, record.ts)
        ahead.append(read - n)
    assert max(ahead) == 500
    assert len(ahead) == 20_000


@pytest.mark.parametrize("wrong", [{"drop": 1.1}, {"garbage": -0.1}, {"seed": -1}, {"delay_ms": 0}, {"shuffel_ms": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, FaultSettings)


def test_units_are_counted_as_the_balance_counts_them():
    log = marketplace(4)
    sink = Partitions()
    played = play(log, sink, PlaySettings(faults=FaultSettings(drop=0.5, duplicates=0.2, garbage=0.1)))
    sent = [record for part in sink.logs for record in part]
    decoded = 0
    for record in sent:
        try:
            decoded += units(decode(record.value))
        except Rejected:
            decoded += 1
    assert played.events == decoded
    assert played.faults.dropped > 50


def test_a_log_out_of_order_keeps_its_order_but_for_the_faults():
    log = [click(ts, ts) for ts in (5_000, 4_000, 4_000, 6_000, 1_000, 1_500)]
    sent = list(arrivals(log, FaultSettings(drop=1e-9), FaultCounts()))
    assert [record for _, record in sent] == log
    assert [due for due, _ in sent] == [5_000, 5_000, 5_000, 6_000, 6_000, 6_000]
    dealt = FaultSettings(shuffle_ms=100, duplicates=0.5)
    times = [due for due, _ in arrivals(log, dealt, FaultCounts())]
    assert times == sorted(times)


@pytest.mark.parametrize("speed", [0.0, 1.0])
def test_time_is_never_told_below_zero(speed):
    sink = Partitions(1)
    dealt = FaultSettings(delay=0.1, delay_ms=5_000)
    play(clicks([100] * 200, start=0), sink, PlaySettings(speed=speed, faults=dealt), clock=FastClock())
    assert sink.told[0] == 1_000
