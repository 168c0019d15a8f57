"""Plays records into a sink at the pace of their own times, faster, or as fast as it goes, and carries event time to
the partitions that have nothing to do.

Ticks: the joiner's time moves with the records of a partition, so a partition without events would hold everything
behind it back. Between two records a tick is written to every partition when event time has passed a multiple of
`tick_ms`, and never with a time that a record still to come is before. At the end one tick with a time past
everything that is open closes it all. The joiner refuses times that are more than `future_ms` ahead of the broker's
clock: where events are of the present, keep `closing_ms` below that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from replay.readers.base import LogReader, Record, in_time_order
from replay.sinks import Sink
from streams.events import Item, Tick, units

TICK_RECORDS = 25  # at full speed a round of ticks waits for so many records a partition: ticks are 4 % at most
TICK_WALL_S = 0.1  # at a pace a round of ticks comes at most so often
PROGRESS_S = 0.2


class PlaySettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How a log is played."""

    speed: Annotated[float, Meta(ge=0)] = 0.0  # times real time; 0: as fast as it goes
    tick_ms: Annotated[int, Meta(ge=1)] = 1000  # of event time
    closing_ms: Annotated[int, Meta(ge=0)] = 35 * 60_000  # the last tick is so much past the last event: past `open_ms`


@dataclass
class Played:
    """What was played so far. `events` counts an impression of k items as k; times are ms of event time."""

    events: int = 0
    records: int = 0  # records of events
    items: int = 0
    ticks: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # rows of the log by reason
    disordered: int = 0  # records with a time before that of an earlier one
    from_ms: int | None = None
    to_ms: int | None = None
    seconds: float = 0.0

    @property
    def events_per_s(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0


class Clock(Protocol):
    """Seconds of a clock that only goes forward, and sleeping by it."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class WallClock:
    now = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


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


class Player:
    """One play of one log; `played` can be read while it goes on."""

    def __init__(
        self, sink: Sink, settings: PlaySettings, clock: Clock, progress: Callable[[Played], None] | None
    ) -> None:
        self.sink, self.settings, self.clock, self.progress = sink, settings, clock, progress
        self.played = Played()
        self._started = self._shown = self._ticked = clock.now()
        self._first = 0  # time of the first event, which is due at `_origin` of the clock
        self._origin = 0.0
        self._since_ticks = 0  # records since the last round of ticks
        self._round = 0  # the last multiple of tick_ms that was told

    def play(self, records: LogReader | Iterable[Record]) -> Played:
        """See `play` above."""
        played = self.played
        if isinstance(records, LogReader):
            played.rejected = records.rejected  # the log's own counter: up to date while it is read
            records = in_time_order(records)
        for record in records:
            if isinstance(record, Tick):
                continue  # a recorded log has its own; time is this player's to tell
            if isinstance(record, Item):
                played.items += 1
            else:
                self._arrive(record.ts)
                played.records += 1
                played.events += units(record)
            self.sink.send(record)
            self._since_ticks += 1
            if self._since_ticks % 256 == 0:
                self._report()
        if played.to_ms is not None:
            played.ticks += self.sink.tick(played.to_ms + self.settings.closing_ms)
        self.sink.flush()
        self._report(last=True)
        return played

    def _arrive(self, ts: int) -> None:
        """Event time comes to `ts`: waits until that is due, and tells the idle partitions."""
        played = self.played
        if played.from_ms is None or played.to_ms is None:
            played.from_ms = played.to_ms = self._first = ts
            self._origin, self._round = self.clock.now(), ts // self.settings.tick_ms
        elif ts < played.to_ms:
            played.disordered += 1
            played.from_ms = min(ts, played.from_ms)
        else:
            if self.settings.speed:
                self._wait(ts)
            elif self._since_ticks >= TICK_RECORDS * self.sink.partitions:
                self._tell(ts)
            played.to_ms = ts

    def _wait(self, ts: int) -> None:
        speed = self.settings.speed
        due = self._origin + (ts - self._first) / 1000 / speed
        while True:
            now = self.clock.now()
            if now - self._ticked >= TICK_WALL_S:
                self._ticked = now
                self._tell(min(ts, self._first + int((now - self._origin) * 1000 * speed)))
            if now >= due:
                return
            self._report()
            self.clock.sleep(min(due - now, TICK_WALL_S))

    def _tell(self, ts: int) -> None:
        """A tick to every partition if a multiple of `tick_ms` lies between the last one told and `ts`."""
        reached = ts // self.settings.tick_ms
        if reached > self._round:
            self._round, self._since_ticks = reached, 0
            self.played.ticks += self.sink.tick(reached * self.settings.tick_ms)

    def _report(self, last: bool = False) -> None:
        now = self.clock.now()
        self.played.seconds = now - self._started
        if self.progress and (last or now - self._shown >= PROGRESS_S):
            self._shown = now
            self.progress(self.played)
