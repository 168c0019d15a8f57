"""Plays records into a sink at the pace of their own times, faster, or as fast as it goes, and carries event time to
the partitions that have nothing to do.

Ticks: the joiner's time moves with the records of a partition, so a partition without events would hold everything
behind it back. Between two records a tick is written to every partition when event time has passed a multiple of
`tick_ms`, and never with a time that a record still to come is before, be it shuffled or delayed on purpose: so no tick
makes an event late, and the examples are the same at any pace. At the end one tick with a time past everything that is
open closes it all. The joiner refuses times that are more than `future_ms` ahead of the broker's clock: where events
are of the present, keep `closing_ms` below that.

Pauses: while it is paused event time stands still. Nothing is sent, no tick either, and at a pace what follows is
due that much later, so nothing rushes. The same holds at a pace where the process itself stood still for more than
GAP_S (Ctrl-Z, a broker that took nothing): what was missed is not caught up. Shorter delays are, so that the pace
holds on average.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from replay.faults import FaultCounts, FaultSettings, Garbage, arrivals
from replay.readers.base import LogReader, Record
from replay.readers.sorting import in_time_order
from replay.sinks import Sink
from streams.events import Event, Item, Millis, Tick, units

TICK_RECORDS = 25  # at full speed a round of ticks waits for so many records a partition: ticks are 4 % at most
TICK_WALL_S = 0.1  # at a pace a round of ticks comes at most so often
PROGRESS_S = 0.2
PROGRESS_RECORDS = 256  # at full speed the clock is looked at so often
GAP_S = 1.0


class PlaySettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How a log is played. Raises ValueError for a window without time in it."""

    speed: Annotated[float, Meta(ge=0)] = 0.0  # times real time; 0: as fast as it goes
    from_ms: Annotated[Millis | None, Meta(description="only events from this time on")] = None
    until_ms: Annotated[Millis | None, Meta(description="only events before this time")] = None
    faults: FaultSettings = FaultSettings()
    tick_ms: Annotated[int, Meta(ge=1)] = 1000  # of event time
    closing_ms: Annotated[int, Meta(ge=0)] = 35 * 60_000  # the last tick is so much past the last event: past `open_ms`

    def __post_init__(self) -> None:
        if self.from_ms is not None and self.until_ms is not None and self.until_ms <= self.from_ms:
            raise ValueError(f"`until_ms` ({self.until_ms}) must be after `from_ms` ({self.from_ms})")


@dataclass
class Played:
    """What was played so far; times are ms of event time.

    `events` is what the joiner's balance will call `events_in`: an impression of k items is k, a duplicate counts, and
    a piece of garbage is 1.
    """

    events: int = 0
    records: int = 0  # records of events, and garbage
    items: int = 0
    ticks: int = 0
    kinds: Counter[type] = field(default_factory=Counter)  # `events` by type
    rejected: Counter[str] = field(default_factory=Counter)  # rows of the log by reason
    faults: FaultCounts = field(default_factory=FaultCounts)  # done on purpose
    disordered: int = 0  # records with a time before that of an earlier one
    from_ms: int | None = None
    to_ms: int | None = None
    seconds: float = 0.0  # pauses left out
    began: float | None = None  # when the first event was sent, by the player's clock
    paused: bool = False
    fraction: float | None = None  # 0 to 1, of the log or its window, if known; at first of the reading before a sort
    eta_s: float | None = None  # seconds to its end, if known

    @property
    def events_per_s(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0


class Clock(Protocol):
    """Seconds of a clock that only goes forward, and waiting by it."""

    def now(self) -> float: ...

    def wait(self, calls: SimpleQueue[bool], seconds: float) -> bool | None:
        """The next of `calls`, as soon as it is there; None when there was none for `seconds`."""


class WallClock:
    now = staticmethod(time.monotonic)

    def wait(self, calls: SimpleQueue[bool], seconds: float) -> bool | None:
        try:
            return calls.get(timeout=seconds)
        except Empty:
            return None


def play(
    records: LogReader | Iterable[Record],
    sink: Sink,
    settings: PlaySettings | None = None,
    progress: Callable[[Played], None] | None = None,
    clock: Clock | None = None,
) -> Played:
    """Sends all records (a log's in time order), ticks between them and one after them; returns when they are kept.

    `progress` is called some five times a second and at the end. Raises LogError (the log) and BrokerError (Kafka).
    """
    return Player(sink, settings or PlaySettings(), clock or WallClock(), progress).play(records)


def in_window(
    records: Iterable[Record], from_ms: int | None, until_ms: int | None, ordered: bool = True
) -> Iterator[Record]:
    """Only the events with from_ms <= ts < until_ms, and the Items before any event that is before `until_ms`: also
    those from before the window, since the events in it are about them.

    `ordered`: nothing is read past the first event from `until_ms` on. Otherwise all is.
    """
    waiting: list[Item] = []  # their event decides
    past = False
    for record in records:
        if isinstance(record, Item):
            waiting.append(record)
            continue
        past = until_ms is not None and record.ts >= until_ms
        if past and ordered:
            return
        if not past:
            yield from waiting
        waiting.clear()
        if not past and (from_ms is None or record.ts >= from_ms):
            yield record
    if not past:
        yield from waiting


class Player:
    """One play of one log; `played` can be read while it goes on."""

    def __init__(
        self,
        sink: Sink,
        settings: PlaySettings,
        clock: Clock,
        progress: Callable[[Played], None] | None,
        directory: Path | None = None,
    ) -> None:
        """`directory`: where a log is sorted that is too long for the memory; else where temporary files go."""
        self._directory = directory
        self.sink, self.settings, self.clock, self.progress = sink, settings, clock, progress
        self.played = Played()
        # True: pause, False: resume. Unlike an Event's or a Condition's, its `put` may interrupt a `get` of its own
        # thread: a signal handler can call it.
        self._calls = SimpleQueue[bool]()
        self._log: LogReader | None = None
        self._passed = 0  # events of the log so far, those outside the window too
        self._over = False
        self._lag = settings.faults.lag_ms
        # All by the clock; where the play stood still they are moved on.
        self._started = self._shown = self._looked = self._ticked = clock.now()
        self._first: int | None = None  # event time of the first record, which is due at `_origin`
        self._reached = 0  # event time of the last one
        self._origin = 0.0
        self._due: float | None = None  # when the record that is sent next is to be sent; None: as soon as may be
        self._behind = 0.0  # fraction of the log that lay before the first record
        self._since_ticks = 0  # records since the last round of ticks
        self._round = 0  # the last multiple of tick_ms that was told

    @property
    def behind_s(self) -> float:
        """How late the record that is sent next is; 0 at full speed. For any thread."""
        due = self._due
        return 0.0 if due is None or self._over or self.played.paused else max(0.0, self.clock.now() - due)

    def pause(self) -> None:
        """Stands still, from the next record on, until `resume`. For any thread and signal handler, also before
        `play`."""
        self._calls.put(True)

    def resume(self) -> None:
        """Goes on where `pause` stopped it. For any thread and signal handler."""
        self._calls.put(False)

    def play(self, records: LogReader | Iterable[Record]) -> Played:
        """See `play` above."""
        played, settings, sink, calls = self.played, self.settings, self.sink, self._calls
        self._started = self._shown = self.clock.now()
        ordered = isinstance(records, LogReader)
        if isinstance(records, LogReader):
            played.rejected = records.rejected  # the log's own counter: up to date while it is read
            self._log = records
            records = in_time_order(records, directory=self._directory, progress=self._report)
        chosen: Iterable[Record] = self._passing(records)
        if settings.from_ms is not None or settings.until_ms is not None:
            chosen = in_window(chosen, settings.from_ms, settings.until_ms, ordered)
        for due, record in arrivals(chosen, settings.faults, played.faults):
            if not calls.empty():
                self._heed(calls.get())
            if isinstance(record, Item):
                played.items += 1
                sink.send(record)
            elif isinstance(record, Garbage):
                self._arrive(due)
                played.records += 1
                played.events += 1
                played.kinds[Garbage] += 1
                sink.send_raw(*record)
            else:
                self._arrive(due)
                self._note(record)
                sink.send(record)
            self._since_ticks += 1
            if (played.records + played.items) % PROGRESS_RECORDS == 0:
                self._report()
        if played.to_ms is not None:
            played.ticks += sink.tick(played.to_ms + settings.closing_ms)
        sink.flush()
        self._over = True
        self._report(at_once=True)
        return played

    def _passing(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records; their events counted, and those that are skipped reported."""
        for record in records:
            if isinstance(record, Tick):
                continue  # a recorded log has its own; time is this player's to tell
            if not isinstance(record, Item):
                self._passed += 1
                if self._passed % PROGRESS_RECORDS == 0 and self._first is None:
                    self._report()
            yield record

    def _note(self, event: Event) -> None:
        """It is sent."""
        played, ts = self.played, event.ts
        played.records += 1
        n = units(event)
        played.events += n
        played.kinds[type(event)] += n
        if played.from_ms is None or played.to_ms is None:
            played.from_ms = played.to_ms = ts
        elif ts < played.to_ms:
            played.disordered += 1
            played.from_ms = min(ts, played.from_ms)
        else:
            played.to_ms = ts

    def _arrive(self, due: int) -> None:
        """Event time comes to `due`: waits until that is so, and tells the idle partitions."""
        if self._first is None:
            self._first = due
            self._origin = self._looked = self.played.began = self.clock.now()
            self._round = max(0, due - self._lag) // self.settings.tick_ms
            self._reached, self._behind = due, self._fraction() or 0.0
        elif self.settings.speed:
            self._wait(due, self._first)
        elif self._since_ticks >= TICK_RECORDS * self.sink.partitions:
            self._tell(due)
        self._reached = due

    def _wait(self, due: int, first: int) -> None:
        speed = self.settings.speed
        while True:
            now = self._look()
            self._reached = min(due, first + int((now - self._origin) * 1000 * speed))
            if now - self._ticked >= TICK_WALL_S:
                self._ticked = now
                self._tell(self._reached)
            self._due = self._origin + (due - first) / 1000 / speed
            left = self._due - now
            if left <= 0:
                return
            self._report()
            self._heed(self.clock.wait(self._calls, min(left, TICK_WALL_S)))

    def _look(self) -> float:
        """The clock, at a pace: what it went on while nobody looked is left out of the play, if that was long."""
        now = self.clock.now()
        if now - self._looked > GAP_S:
            self._leave_out(now - self._looked)
        self._looked = now
        return now

    def _heed(self, pause: bool | None) -> None:
        """A call was heard, or none: after a `pause` returns when `resume` was called."""
        if not pause:
            return
        since = self.clock.now()
        self.played.paused = True
        self._report(at_once=True)
        while self._calls.get():
            pass  # paused already
        self.played.paused = False
        self._looked = self.clock.now()
        self._leave_out(self._looked - since)

    def _leave_out(self, seconds: float) -> None:
        self._origin += seconds
        self._started += seconds

    def _tell(self, due: int) -> None:
        """Event time has come to `due`: a tick to every partition, if what can still come has passed a multiple of
        `tick_ms` since the last one."""
        reached = (due - self._lag) // self.settings.tick_ms
        if reached > self._round:
            self._round, self._since_ticks = reached, 0
            self.played.ticks += self.sink.tick(reached * self.settings.tick_ms)

    def _report(self, at_once: bool = False) -> None:
        now, played = self.clock.now(), self.played
        played.seconds = now - self._started
        if self.progress and (at_once or now - self._shown >= PROGRESS_S):
            self._shown = now
            played.fraction = done = self._fraction()
            played.eta_s = None
            if self._first is not None and done is not None and done > self._behind:
                played.eta_s = (now - self._origin) * (1 - done) / (done - self._behind)
            self.progress(played)

    def _fraction(self) -> float | None:
        """Of the window's time or of the log's events, what is further on: a log may end before its window does."""
        if self._over:
            return 1.0
        known: list[float] = []
        settings, log = self.settings, self._log
        if self._first is not None and settings.until_ms is not None:
            start = self._first if settings.from_ms is None else settings.from_ms
            known.append((self._reached - start) / (settings.until_ms - start))
        if log is not None and (read := log.progress()) is not None:
            # A log is sorted before it is played: much of what was read is still to come out.
            known.append(read * self._passed / max(1, log.events) if self._passed else read)
        return min(1.0, max(known)) if known else None
