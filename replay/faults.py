"""Faults on purpose: what a real stream does wrong, dealt out by a seed, so that a run can be repeated fault by fault.

What happens to an event hangs on the seed and its event id alone: it is the same at any pace, in any window of the
log, and whether the play was paused. Memory is flat: the events that are held are those of the last `lag_ms` of event
time, and never more than MOST_HELD.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Annotated, NamedTuple

import orjson
import xxhash
from msgspec import Meta, Struct

from replay.readers.base import Record
from streams.events import MAX_EVENT_BYTES, Action, Forget, Id, Impression, Item, Tick, encode

MOST_HELD = 200_000  # records, some 60 MB; past that the one that is due next goes out early
COPY_MS = 1_000  # a duplicate comes at most so much later: far inside the join's `open_ms`, so it is recognised
HUGE_EVERY = 100  # of so many pieces of garbage one is huge: each is a megabyte

_DROP, _DUPLICATE, _DELAY, _SHUFFLE, _GARBAGE, _KIND = range(6)  # what an event's numbers are for: each has its own


class FaultSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which faults, and how many. Shares are of the log's events; times are ms of event time. As it is: none."""

    seed: Annotated[int, Meta(ge=0, lt=1 << 32, description="same log, same seed: same faults")] = 0
    duplicates: Annotated[float, Meta(ge=0, le=1, description="share sent twice, at once or a little later")] = 0.0
    delay: Annotated[float, Meta(ge=0, le=1, description="share sent too late, by up to `delay_ms`")] = 0.0
    delay_ms: Annotated[int, Meta(ge=1, le=86_400_000, description="longest; past join.disorder_ms: late")] = 5_000
    shuffle_ms: Annotated[
        int, Meta(ge=0, le=3_600_000, description="events change places within so much; up to join.disorder_ms: exact")
    ] = 0
    drop: Annotated[float, Meta(ge=0, le=1, description="share never sent")] = 0.0
    garbage: Annotated[float, Meta(ge=0, le=1, description="share with a record before it that is no event")] = 0.0

    @property
    def lag_ms(self) -> int:
        """No record comes later than so much of event time after its place."""
        return self.shuffle_ms + (self.delay_ms if self.delay else 0) + (COPY_MS if self.duplicates else 0)


@dataclass
class FaultCounts:
    """What was done so far, in records (an impression of k items is one)."""

    duplicates: int = 0
    delayed: int = 0
    shuffled: int = 0  # of the others, those that came after one with a later time
    dropped: int = 0
    garbage: int = 0


class Garbage(NamedTuple):
    """A record that is no event, for the partition of `user`: `streams.events.decode` refuses it. It has no newline."""

    value: bytes
    user: Id


class _Held(NamedTuple):
    due: int  # event time at which it is sent
    number: int  # ties go by it; no two have the same
    record: Impression | Action | Forget | Garbage
    copy: bool = False
    delayed: bool = False


def with_faults(
    records: Iterable[Record], settings: FaultSettings, counts: FaultCounts | None = None
) -> Iterator[Record | Garbage]:
    """The records with faults in them; `counts` is kept up to date meanwhile.

    - *shuffle*: no event comes after one whose time is more than `shuffle_ms` later (but for the delayed ones and the
      second copies), so what is within the join's `disorder_ms` changes no example.
    - *duplicates*: the very same record again, half of them at once, the others up to COPY_MS later.
    - *delay*: 1 to `delay_ms` later than its place. - *drop*: left out, with its duplicate.
    - *garbage*: a record more, before the event: bytes that are not JSON, JSON cut short, wrong types, a negative time,
      and one in HUGE_EVERY too large.

    Items pass as they are, so each stays before its event. Ticks are left out: they would no longer be true.
    Records should come by time; where one does not, it counts as one of the largest time before it.
    """
    return (record for _, record in arrivals(records, settings, FaultCounts() if counts is None else counts))


def arrivals(
    records: Iterable[Record], settings: FaultSettings, counts: FaultCounts
) -> Iterator[tuple[int, Record | Garbage]]:
    """As `with_faults`, each with the event time (ms) at which it is sent; that never goes back. What comes after has
    times no smaller than that less `settings.lag_ms` (if the records come by time)."""
    now = newest = 0  # largest time read, and sent
    held: list[_Held] = []
    faulty = any((settings.shuffle_ms, settings.delay, settings.duplicates, settings.drop, settings.garbage))
    numbers = iter(range(1 << 62))
    for record in records:
        if isinstance(record, Item):
            yield now, record
            continue
        if isinstance(record, Tick):
            continue
        now = max(now, record.ts)
        if not faulty:
            yield now, record
            continue
        for due, what, copy, delayed in _dealt(record, now, settings, counts):
            heappush(held, _Held(due, next(numbers), what, copy, delayed))
        while held and (held[0].due <= now or len(held) > MOST_HELD):
            out = heappop(held)
            newest = _count(out, newest, counts)
            yield min(out.due, now), out.record
    while held:
        out = heappop(held)
        newest = _count(out, newest, counts)
        yield out.due, out.record


def _dealt(
    event: Impression | Action | Forget, now: int, settings: FaultSettings, counts: FaultCounts
) -> Iterator[tuple[int, Impression | Action | Forget | Garbage, bool, bool]]:
    """What is sent for an event: (due, record, whether it is a second copy, whether it is delayed)."""
    numbers = _Numbers(settings.seed, event)
    due = now + int(numbers.uniform(_SHUFFLE) * (settings.shuffle_ms + 1)) if settings.shuffle_ms else now
    delay = numbers.hit(_DELAY, settings.delay)
    if delay is not None:
        due += 1 + int(delay * settings.delay_ms)
    if numbers.hit(_GARBAGE, settings.garbage) is not None:
        yield due, _garbage(event, numbers.bits(_KIND)), False, False
    if numbers.hit(_DROP, settings.drop) is not None:
        counts.dropped += 1
        return
    yield due, event, False, delay is not None
    copy = numbers.hit(_DUPLICATE, settings.duplicates)
    if copy is not None:
        yield due + max(0, int((2 * copy - 1) * COPY_MS)), event, True, False


def _count(sent: _Held, newest: int, counts: FaultCounts) -> int:
    """Counts what is sent; returns the largest event time sent so far."""
    if isinstance(sent.record, Garbage):
        counts.garbage += 1
        return newest
    if sent.copy:
        counts.duplicates += 1
    elif sent.delayed:
        counts.delayed += 1
    elif sent.record.ts < newest:
        counts.shuffled += 1
    return max(newest, sent.record.ts)


class _Numbers:
    """The random numbers of one event: by the seed, its id and what they are for."""

    def __init__(self, seed: int, event: Impression | Action | Forget) -> None:
        self._seed, self._id = seed << 3, str(event.event_id).encode("utf-8", "surrogatepass")

    def bits(self, purpose: int) -> int:
        """64 random bits."""
        return xxhash.xxh3_64_intdigest(self._id, self._seed | purpose)

    def uniform(self, purpose: int) -> float:
        """In [0, 1)."""
        return (self.bits(purpose) >> 11) * 2.0**-53

    def hit(self, purpose: int, share: float) -> float | None:
        """For `share` of the events a number, uniform in [0, 1); else None."""
        if not share:
            return None
        number = self.uniform(purpose)
        return number / share if number < share else None


def _garbage(event: Impression | Action | Forget, bits: int) -> Garbage:
    """A record that would be the event, were it not spoilt."""
    raw = encode(event)
    kind, much = bits % HUGE_EVERY, bits // HUGE_EVERY
    if kind == 0:
        said = {"kind": "click", "event_id": event.event_id, "ts": event.ts, "user": event.user}
        return Garbage(orjson.dumps({**said, "padding": "x" * MAX_EVENT_BYTES}), event.user)
    wrong: dict[str, object]
    match kind % 4:
        case 0:
            return Garbage(b"\xff" + raw[: much % len(raw)], event.user)  # not UTF-8, so not JSON
        case 1:
            return Garbage(raw[: 1 + much % (len(raw) - 1)], event.user)
        case 2:
            name, value = (("ts", str(event.ts)), ("event_id", None), ("user", [1]), ("kind", 7))[much % 4]
            wrong = {name: value}
        case _:
            wrong = {"ts": -1 - event.ts}
    return Garbage(orjson.dumps({**orjson.loads(raw), **wrong}), event.user)
