"""The player: every record once, in order and at its pace; time carried to every partition; pauses and progress."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from copy import copy
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import pytest

from replay.faults import FaultSettings, Garbage
from replay.player import Played, Player, PlaySettings, WallClock, in_window, play
from replay.readers import Record, open_log
from replay.readers.taobao import Taobao
from streams.events import Click, Event, Id, Impression, Item, Tick


class ListSink:
    """What it was given, in order: records, and ticks as their times."""

    def __init__(self, partitions: int = 4) -> None:
        self.partitions = partitions
        self.sent: list[Record | Garbage | int] = []
        self.flushed = 0

    def send(self, record: Event | Item) -> None:
        self.sent.append(record)

    def send_raw(self, value: bytes, user: Id) -> None:
        self.sent.append(Garbage(value, user))

    def tick(self, ts: int) -> int:
        self.sent.append(ts)
        return self.partitions

    def flush(self) -> None:
        self.flushed = len(self.sent)

    def close(self) -> None:
        pass


class FakeClock:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    def wait(self, calls: SimpleQueue[bool], seconds: float) -> bool | None:
        assert seconds > 0
        if calls.empty():
            self.seconds += seconds
            return None
        return calls.get()


def click(ts: int, user: int = 1) -> Click:
    return Click(event_id=f"e{ts}", ts=ts, user=user, item=7)


def times(sent: Iterable[Record | Garbage | int]) -> list[tuple[str, int]]:
    return [("tick", r) if isinstance(r, int) else ("event", r.ts) for r in sent if not isinstance(r, Item | Garbage)]


# --- without Kafka


def test_the_summary_counts_what_was_played(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("1,10,100,pv,5\n1,10,100,look,6\n" + "2,11,100,buy,7\n" * 150)
    sink = ListSink()
    played = play(open_log("taobao", path), sink)
    assert (played.events, played.records, played.items, played.rejected) == (151, 151, 2, {"behaviour": 1})
    assert (played.from_ms, played.to_ms, played.disordered) == (5000, 7000, 0)
    assert sink.flushed == len(sink.sent)
    shown = Impression(event_id=1, ts=5, user=1, request_id=1, items=[1, 2, 3])
    assert play([shown], ListSink()).events == 3, "an impression counts its items"


def test_the_last_tick_is_past_everything_that_is_open() -> None:
    sink = ListSink()
    played = play([click(1000), click(5000)], sink, PlaySettings(closing_ms=60_000))
    assert times(sink.sent) == [("event", 1000), ("event", 5000), ("tick", 65_000)]
    assert played.ticks == 4
    assert play([], ListSink()).ticks == 0, "without events there is no time to tell"


def test_ticks_carry_time_but_never_past_what_is_to_come_and_are_few() -> None:
    records = [click(ts) for ts in range(0, 3_000_000, 700)]
    sink = ListSink()
    played = play(records, sink)
    told = 0
    for what, ts in times(sink.sent)[:-1]:
        assert ts >= told, "no event may come after a tick that is past it"
        if what == "tick":
            assert ts % 1000 == 0
            told = ts
    assert told > records[-1].ts - 100_000
    assert 0.02 * len(records) < played.ticks < 0.05 * len(records)


def test_a_pace_keeps_the_gaps_and_ticks_through_them() -> None:
    clock, sink = FakeClock(), ListSink()
    arrived: list[float] = []
    sink.send = lambda record: (arrived.append(clock.now()), sink.sent.append(record))[0]  # type: ignore[method-assign]
    records = [click(0), click(500), click(10_000), click(10_000)]
    play(records, sink, PlaySettings(speed=2.0), clock=clock)
    assert arrived == pytest.approx([100.0, 100.25, 105.0, 105.0], abs=0.002)
    sent = times(sink.sent)
    assert sent[:2] == [("event", 0), ("event", 500)]
    assert sent[2:11] == [("tick", ts) for ts in range(1000, 10_000, 1000)]
    assert sent[-3:] == [("event", 10_000), ("event", 10_000), ("tick", 10_000 + 35 * 60_000)]


def test_what_is_sent_is_counted_by_kind_and_how_late_it_is_is_told() -> None:
    clock, sink, late = FakeClock(), ListSink(), list[float]()
    shown = Impression(event_id="i", ts=0, user=1, request_id="r", items=[1, 2, 3])
    faults = FaultSettings(garbage=1.0)
    player = Player(sink, PlaySettings(speed=1.0, faults=faults), clock, None)
    send = sink.send

    def slow(record: Event | Item) -> None:
        late.append(player.behind_s)
        clock.seconds += 0.6  # each takes so long
        send(record)

    sink.send = slow  # type: ignore[method-assign]
    played = player.play([shown, *(click(ts) for ts in range(500, 2_000, 500)), click(60_000)])
    assert played.kinds == {Impression: 3, Click: 4, Garbage: 5}
    assert sum(played.kinds.values()) == played.events
    assert late == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.0])
    assert player.behind_s == 0  # it is over


def test_disorder_is_played_as_it_comes_and_counted() -> None:
    sink = ListSink()
    played = play([click(5000), click(4000), click(6000)], sink)
    assert [ts for what, ts in times(sink.sent) if what == "event"] == [5000, 4000, 6000]
    assert (played.disordered, played.from_ms, played.to_ms) == (1, 4000, 6000)


def test_ticks_of_a_recorded_log_are_not_played() -> None:
    sink = ListSink()
    played = play([click(1), Tick(event_id="t", ts=5_000_000), click(2)], sink)
    assert (played.records, played.to_ms) == (2, 2)


def test_progress_is_told_while_it_goes_on() -> None:
    clock, told = FakeClock(), []
    play(
        [click(0), click(1000), click(2000)],
        ListSink(), PlaySettings(speed=1.0), lambda played: told.append((played.records, played.seconds)), clock,
    )  # fmt: skip
    assert told[-1] == (3, pytest.approx(2.0, abs=0.01))
    assert 5 < len(told) < 13


# --- a window of the log


def item(name: str, title: str = "") -> Item:
    return Item(item=name, title=title)


def test_only_the_window_is_played_but_all_of_the_catalogue_that_it_may_name() -> None:
    log: list[Record] = [
        item("a"), click(1000), item("a", "new"), click(1500), click(2000), item("b"), click(2999),
        item("c"), click(3000), item("d"),
    ]  # fmt: skip
    sink = ListSink()
    played = play(log, sink, PlaySettings(from_ms=2000, until_ms=3000, closing_ms=500))
    assert sink.sent == [item("a"), item("a", "new"), click(2000), item("b"), click(2999), 3499]
    assert (played.records, played.items, played.from_ms, played.to_ms) == (2, 3, 2000, 2999)
    for settings, expected in ((PlaySettings(from_ms=2999), [2999, 3000]), (PlaySettings(until_ms=1500), [1000])):
        sink = ListSink()
        play(log, sink, settings)
        assert [ts for what, ts in times(sink.sent) if what == "event"] == expected


def test_out_of_order_events_of_the_window_are_played_too() -> None:
    sink = ListSink()
    play([click(1000), click(3000), item("a"), click(2000), click(900)], sink, PlaySettings(from_ms=950, until_ms=2500))
    assert sink.sent[:3] == [click(1000), item("a"), click(2000)]
    assert len(sink.sent) == 4


def test_of_a_log_nothing_is_read_past_the_window() -> None:
    read: list[int] = []

    def log() -> Iterator[Record]:
        for ts in range(10):
            read.append(ts)
            yield click(ts)

    assert [r.ts for r in in_window(log(), 2, 5) if isinstance(r, Click)] == [2, 3, 4]
    assert read == [0, 1, 2, 3, 4, 5]


def test_a_window_without_time_in_it_is_refused_and_one_without_events_tells_no_time() -> None:
    with pytest.raises(ValueError, match=r"`until_ms` \(5\) must be after `from_ms` \(5\)"):
        PlaySettings(from_ms=5, until_ms=5)
    sink = ListSink()
    played = play([item("a"), click(1000)], sink, PlaySettings(from_ms=2000))
    assert (sink.sent, played.records, played.from_ms) == ([item("a")], 0, None)


# --- pauses


class Paused:
    """A play in a thread of its own that pauses itself before it takes in the record `at`; for `with`."""

    def __init__(self, records: list[Record], at: int, settings: PlaySettings, clock: FakeClock) -> None:
        self.clock, self.sink, self.arrived = clock, ListSink(), list[float]()
        self.stands, self.told = threading.Event(), list[Played]()
        self.player = Player(self.sink, settings, clock, self.progress)

        def pausing() -> Iterator[Record]:
            for number, record in enumerate(records):
                if number == at:
                    self.player.pause()
                yield record

        send = self.sink.send
        self.sink.send = lambda record: (self.arrived.append(clock.now()), send(record))[1]  # type: ignore[method-assign]
        self._thread = threading.Thread(target=lambda: self.player.play(pausing()), daemon=True)

    def progress(self, played: Played) -> None:
        self.told.append(copy(played))
        if played.paused:
            self.stands.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.stands.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.player.resume()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("speed", [0.0, 1.0])
def test_while_it_is_paused_nothing_is_sent_and_afterwards_nothing_rushes(speed: float) -> None:
    records: list[Record] = [click(ts) for ts in range(0, 10_000, 500)]
    clock = FakeClock()
    with Paused(records, 8, PlaySettings(speed=speed), clock) as play:
        before = list(play.sink.sent)
        assert before[-1] == click(3500)
        clock.seconds += 3600.0  # the event time of an hour of ticks
        assert play.sink.sent == before
        play.stands.clear()
    assert play.sink.sent[: len(before)] == before
    events = [r for r in play.sink.sent if isinstance(r, Click)]
    assert events == records
    expected = [100.0 + n * 0.5 * speed + (3600.0 if n >= 8 else 0.0) for n in range(20)]
    assert play.arrived == pytest.approx(expected, abs=0.002)
    ticks = [r for r in play.sink.sent if isinstance(r, int)][:-1]
    assert ticks == ([1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000] if speed else [])
    assert play.player.played.seconds == pytest.approx(9.5 * speed, abs=0.002), "a pause is not time of playing"
    assert [played.paused for played in play.told].count(True) == 1
    assert not play.told[-1].paused


def test_a_pause_may_come_before_the_play_and_twice() -> None:
    stands, sent = threading.Event(), threading.Event()
    sink = ListSink()
    sink.send = lambda record: (sent.set(), sink.sent.append(record))[1]  # type: ignore[method-assign]
    player = Player(sink, PlaySettings(speed=1.0), WallClock(), lambda played: played.paused and stands.set())
    player.pause()
    player.pause()
    thread = threading.Thread(target=player.play, args=[[click(0), click(100), click(150)]], daemon=True)
    thread.start()
    assert stands.wait(20)
    assert not sent.wait(0.2)
    player.resume()
    player.resume()
    thread.join(20)
    assert not thread.is_alive()
    assert [r for r in sink.sent if isinstance(r, Click)] == [click(0), click(100), click(150)]


class WakingClock(FakeClock):
    """Its first wait takes as long as nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def wait(self, calls: SimpleQueue[bool], seconds: float) -> bool | None:
        if self.waits.is_set():
            return super().wait(calls, seconds)
        self.waits.set()
        return calls.get(timeout=20)


def test_a_pause_is_at_once_also_while_the_next_record_is_far() -> None:
    clock, stands = WakingClock(), threading.Event()
    player = Player(ListSink(), PlaySettings(speed=1.0), clock, lambda played: played.paused and stands.set())
    thread = threading.Thread(target=player.play, args=[[click(0), click(90)]], daemon=True)
    thread.start()
    assert clock.waits.wait(10)
    player.pause()
    assert stands.wait(10)
    player.resume()
    thread.join(20)
    assert not thread.is_alive()
    calls = SimpleQueue[bool]()
    calls.put(True)
    started = time.monotonic()
    assert WallClock().wait(calls, 100.0)
    assert time.monotonic() - started < 50
    assert WallClock().wait(calls, 0.001) is None


def test_signal_handlers_of_the_playing_thread_may_pause_and_resume_it() -> None:
    sink, told = ListSink(), list[int]()

    def progress(played: Played) -> None:
        if played.paused:
            told.append(played.records)
            for number in (signal.SIGUSR1, signal.SIGUSR2):  # once more, which changes nothing
                signal.raise_signal(number)

    player = Player(sink, PlaySettings(), FakeClock(), progress)

    def log() -> Iterator[Record]:
        for ts in range(10):
            if ts in (3, 7):
                signal.raise_signal(signal.SIGUSR1)
            yield click(ts)

    before = [
        signal.signal(signal.SIGUSR1, lambda number, frame: player.pause()),
        signal.signal(signal.SIGUSR2, lambda number, frame: player.resume()),
    ]
    try:
        player.play(log())
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])
    assert told == [3, 7]
    assert [r for r in sink.sent if isinstance(r, Click)] == [click(ts) for ts in range(10)]


@pytest.mark.parametrize("during", ["the sleep", "a send"])
def test_what_a_stopped_process_missed_is_not_caught_up(during: str) -> None:
    """Ctrl-Z for an hour: the clock goes on, the schedule does not. Half a second is caught up."""
    clock, sink = FakeClock(), ListSink()
    arrived: list[float] = []
    stop, naps, wait = {"short": 0.5, "long": 3600.0}, iter(range(1_000)), clock.wait

    def send(record: Event | Item) -> None:
        arrived.append(clock.now())
        if during == "a send" and len(arrived) in (5, 10):
            clock.seconds += stop["short" if len(arrived) == 5 else "long"]
        sink.sent.append(record)

    def napping(calls: SimpleQueue[bool], seconds: float) -> None:
        wait(calls, seconds)
        if during == "the sleep" and (nap := next(naps)) in (40, 90):
            clock.seconds += stop["short" if nap == 40 else "long"]

    sink.send, clock.wait = send, napping  # type: ignore[method-assign]
    played = play([click(ts) for ts in range(0, 20_000, 1000)], sink, PlaySettings(speed=1.0), clock=clock)
    gaps = [b - a for a, b in pairwise(arrived)]
    assert max(gaps) == pytest.approx(3601.0, abs=0.2)
    after = gaps[gaps.index(max(gaps)) + 1 :]
    assert after == pytest.approx([1.0] * len(after), abs=0.2)
    assert len(after) > 5
    assert arrived[-1] == pytest.approx(100.0 + 19.0 + 3600.0, abs=0.2), "the half second was caught up"
    ticks = [r for r in sink.sent if isinstance(r, int)][:-1]
    assert max(b - a for a, b in pairwise(ticks)) <= 2000
    assert played.seconds == pytest.approx(19.0, abs=0.2)


# --- progress


def test_a_window_of_known_length_has_a_fraction_and_an_end() -> None:
    clock, told = FakeClock(), list[Played]()
    settings = PlaySettings(speed=2.0, from_ms=0, until_ms=20_000)
    play((click(ts) for ts in range(0, 30_000, 100)), ListSink(), settings, lambda p: told.append(copy(p)), clock)
    for played in told[:-1]:
        assert played.fraction == pytest.approx(played.seconds / 10, abs=0.02)
        assert played.eta_s is None or played.eta_s == pytest.approx(10 - played.seconds, abs=0.3)
    assert sum(played.eta_s is not None for played in told) > 40
    assert (told[-1].fraction, told[-1].eta_s) == (1.0, 0.0)
    clock, told = FakeClock(), []
    play([click(0), click(5000)], ListSink(), PlaySettings(speed=1.0), lambda p: told.append(copy(p)), clock)
    assert len(told) > 5
    assert {(p.fraction, p.eta_s) for p in told[:-1]} == {(None, None)}, "of no known length: no promises"


class MeasuredLog(Taobao):
    """A log that says how far it is read; each row takes a clock so long, to be read and to be sent."""

    def progress(self) -> float | None:
        return self.rows / 1000


def test_a_log_that_is_measured_has_a_fraction_of_its_reading_then_of_its_playing(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("".join(f"1,{n % 9},100,pv,{n // 2}\n" for n in range(1000)))
    clock, sink, told = FakeClock(), ListSink(), list[Played]()

    def send(record: Event | Item) -> None:
        sink.sent.append(record)
        clock.seconds += 0.01

    sink.send = send  # type: ignore[method-assign]
    play(MeasuredLog.open(path), sink, PlaySettings(from_ms=100_000), lambda p: told.append(copy(p)), clock)
    assert len(told) > 2
    for played in told[:-1]:
        assert played.fraction == pytest.approx((200 + played.records) / 1000, abs=0.01)
        assert played.eta_s == pytest.approx((800 - played.records) * 0.01, rel=0.1, abs=0.2)
    assert (told[-1].fraction, told[-1].eta_s) == (1.0, 0.0)


def test_progress_is_told_whatever_the_number_of_partitions() -> None:
    clock, told = FakeClock(), []
    sink = ListSink(partitions=1)
    sink.send = lambda record: setattr(clock, "seconds", clock.seconds + 0.01)  # type: ignore[method-assign]
    play([click(ts * 500) for ts in range(3000)], sink, PlaySettings(), lambda p: told.append(p.records), clock)
    assert len(told) == 3000 // 256 + 1


def test_played_rates() -> None:
    assert Played().events_per_s == 0.0
    assert Played(events=10, seconds=2.0).events_per_s == 5.0
