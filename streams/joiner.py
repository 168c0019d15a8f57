"""The event-time join of one partition: what was shown with what was done, and the user's features of that moment.

docs/architecture.md, "Join semantics", is the specification; the numbers in the comments are its rules.
tests/streams/reference_joiner.py is the same in plain dictionaries.
"""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Annotated, Any, NamedTuple

import numpy as np
import orjson
from msgspec import Meta, Struct

from embedding_store.errors import PositionError
from embedding_store.ids import feature_id, hash_text
from online_model.examples import COLUMNS, Block, Examples, Part, Source, example_key, implicit_key, row_id
from online_model.history import EMPTY, UserHistory, as_array, history_hash
from streams.events import (
    SCENARIOS,
    Action,
    Click,
    Id,
    Impression,
    Purchase,
    Refund,
    Rejected,
    Tick,
    Watch,
    decode,
)
from streams.join_state import NEVER, Changes, JoinState, Pair, Shown, Window

DEAD_VALUE_BYTES = 1_000  # of a refused record, kept in its dead letter

_Ms = Annotated[int, Meta(ge=0, le=1 << 40)]
_FOREVER = 1 << 62
SHOWN, LATE_CLICK, WATCH, PURCHASE, NOT_BOUGHT, FORGET = map(int, Part)  # an enum is slow to hash and to pack
IMPRESSION, IMPLICIT = map(int, Source)
_SCENARIO = {name: i for i, name in enumerate(SCENARIOS)}


class JoinSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Section [join]. Times in ms of event time."""

    disorder_ms: _Ms = 250  # events may come this much out of order and lose nothing
    wait_ms: _Ms = 5_000  # not clicked for so long: learned as not clicked, until a click corrects it
    open_ms: _Ms = 1_800_000  # an impression can be acted on for so long
    watch_wait_ms: _Ms = 10_000  # from the first watch of an example to its row
    purchase_window_ms: _Ms = 259_200_000  # from the last click
    implicit: bool = False  # the log has no impressions: a click is an example
    future_ms: _Ms = 60_000  # an event further ahead of Kafka's clock is refused

    @property
    def closing_ms(self) -> int:
        """A tick so much past the last event closes all that is open (but the purchase windows)."""
        return self.open_ms + self.watch_wait_ms + self.disorder_ms + 300_000

    def __post_init__(self) -> None:
        if self.wait_ms > self.open_ms:
            raise ValueError(f"`wait_ms` ({self.wait_ms}) must not be longer than `open_ms` ({self.open_ms})")


class Record(NamedTuple):
    """A record of the partition. `timestamp_ms`: the time Kafka stamped on it, None if it has none."""

    offset: int
    timestamp_ms: int | None
    value: bytes | None


@dataclass
class Joined:
    """What came of one call of `process`."""

    block: Block
    dead: list[bytes]  # records for `events.dead`
    changes: Changes


class Joiner:
    """The join of one partition, continued from `state` at `next_offset`. How its records are batched changes nothing.

    After an error of the state (StoreError) it is to be thrown away, and opened anew from what was committed.
    """

    def __init__(
        self, settings: JoinSettings, partition: int, next_offset: int = 0, state: JoinState | None = None
    ) -> None:
        self.settings = settings
        self.partition = partition
        self.next_offset = next_offset
        state = state or JoinState()
        self.watermark = state.watermark
        self.counts = state.counts
        self.number = state.number  # of the next impression
        self._histories = state.histories
        self._windows = state.windows
        self._seen = state.seen
        self._held = state.held
        heapify(self._held)
        self._open: dict[int, Shown] = {}  # by number
        # One impression mostly, so that is what is there; where it is several: by item, and in order.
        self._requests: dict[tuple[int, str], Shown | dict[int, Shown]] = {}  # by (user, request)
        self._newest: dict[tuple[int, int], Shown | deque[Shown]] = {}  # by (user, item)
        self._waits: deque[Shown] = deque()  # opened in order of ts, so their timers fire in order
        self._ends: deque[Shown] = deque()
        self._plays: list[tuple[int, int, int]] = []  # heap of (due, number, place)
        self._due = _FOREVER  # no timer fires before it
        for shown in state.shown:
            self._restore(shown)
        self._begin()

    def process(self, records: Iterable[Record], to_offset: int | None = None, set_aside: bool = False) -> Joined:
        """Joins the next records of the partition, by ascending offset; those below `next_offset` are left out.

        `set_aside`: they are counted (and refused where they must be) and have no other effect.

        `to_offset`: the offset to go on from, where it is not the last record's + 1 (Kafka leaves holes). Returns the
        block [next_offset before, to_offset). Raises PositionError if `to_offset` lies before the end of the records.
        """
        self._begin()
        start = end = self.next_offset
        for record in records:
            if record.offset >= end:
                end = record.offset + 1
                self._take(record, set_aside)
        if to_offset is None:
            to_offset = end
        elif to_offset < end:
            text = f"partition {self.partition}: a batch that ends at offset {to_offset} holds record {end - 1}"
            raise PositionError(f"{text}: pass the offset to go on from")
        self._release()
        self.next_offset = to_offset
        self._forget()
        users = sorted(self._pushed)
        block = Block(
            partition=self.partition,
            from_offset=start,
            to_offset=to_offset,
            handled=min((held[2] for held in self._held), default=to_offset),
            watermark=self.watermark,
            counts=replace(self.counts),
            examples=_columns(self._rows),
            users=np.array(users, np.int64),
            histories=as_array([self._pushed[user].latest() for user in users]),
            set_aside=set_aside,
        )
        return Joined(block, self._dead, self._changes)

    # --- a record -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._rows: list[tuple] = []
        self._dead: list[bytes] = []
        self._pushed: dict[int, UserHistory] = {}
        self._changes = Changes(self.next_offset, self.number)

    def _take(self, record: Record, set_aside: bool) -> None:
        offset, stamp, raw = record
        counts = self.counts
        try:
            event = decode(raw)
            if stamp is not None and event.ts > stamp + self.settings.future_ms:
                ahead = f"ts is {event.ts - stamp:,} ms ahead of the time Kafka stamped on the record"
                raise Rejected("from_the_future", f"{ahead}; at most {self.settings.future_ms:,} are taken")
        except Rejected as error:  # 1
            counts.events_in += 1
            counts.rejected += 1
            self._dead.append(_dead_letter(error, self.partition, record))
            return
        if set_aside:
            aside = 0 if isinstance(event, Tick) else len(event.items) if isinstance(event, Impression) else 1
            counts.events_in += aside
            counts.set_aside += aside
            return
        ts = event.ts
        watermark = self.watermark
        if not isinstance(event, Tick):
            units = len(event.items) if isinstance(event, Impression) else 1
            counts.events_in += units  # 2
            event_id = str(event.event_id)
            first = self._changes.seen.get(event_id)
            if first is None:
                first = self._seen.first.get(event_id)
            if first is not None and watermark - first <= self.settings.open_ms:  # 3
                counts.duplicates += units
                return
            self._changes.seen[event_id] = ts
            if ts < watermark:  # 4
                counts.late += units
                if not isinstance(event, Impression):
                    self._release()
                    self._act(event, event_id, watermark, late=True)
                return
            counts.open += units
            heappush(self._held, (ts, event_id, offset, event, raw))  # type: ignore[misc]
        if ts - self.settings.disorder_ms > watermark:
            self.watermark = ts - self.settings.disorder_ms

    def _release(self) -> None:
        """5. All that is below the watermark, in order. Once for many records is the same as after each of them:
        what came later and was not late has a larger ts than what an earlier watermark let go."""
        held, watermark, stored_below = self._held, self.watermark, self._changes.from_offset
        while held and held[0][0] < watermark:
            ts, event_id, offset, event, _ = heappop(held)
            if offset < stored_below:
                self._changes.released.append(offset)
            if self._due < ts:
                self._fire(ts)
            if isinstance(event, Impression):
                self._show(event)
            else:
                self._act(event, event_id, ts, late=False)
        if self._due < watermark:
            self._fire(watermark)

    def _forget(self) -> None:
        """What can no longer matter. When that happens changes nothing: it is looked at with the times in it."""
        self._changes.next_number = self.number
        self._changes.held = [held for held in self._held if held[2] >= self._changes.from_offset]
        self._seen.add(self._changes.seen)
        self._changes.chunks_dropped = self._seen.forget(self.watermark - self.settings.open_ms)
        self._windows.forget(self.watermark - self.settings.purchase_window_ms)

    # --- impressions and timers ---------------------------------------------------------------------------------

    def _show(self, event: Impression) -> None:
        """6. Opens the examples of an impression."""
        ts, request = event.ts, str(event.request_id)
        user = feature_id("user", event.user)
        known = self._histories.get(user)
        history = known.as_of(ts) if known else EMPTY
        if event.feature_hash is not None:
            self.counts.skew_checked += 1
            self.counts.skew_differs += event.feature_hash != history_hash(history)
        items, positions, propensities = event.items, event.positions, event.propensities
        ids = [feature_id("item", item) for item in items]
        same = self._requests.get((user, request))
        if same is not None or len(set(ids)) < len(ids):
            new = _distinct(ids, () if same is None else same if isinstance(same, dict) else same.ids)
            self.counts.duplicates += len(ids) - len(new)
            self.counts.open -= len(ids) - len(new)
            if not new:
                return
            items, ids = [items[i] for i in new], [ids[i] for i in new]
            positions = positions and [positions[i] for i in new]
            propensities = propensities and [propensities[i] for i in new]
        shown = Shown(
            self.number, user, request, ts, _SCENARIO[event.scenario], history, tuple(items), tuple(ids),
            None if positions is None else tuple([min(max(place, -1), 32_767) for place in positions]),  # int16
            None if propensities is None else tuple(propensities),
        )  # fmt: skip
        self.number += 1
        self._changes.shown[shown.number] = shown
        self._index(shown)
        self._waits.append(shown)
        self._due = min(self._due, ts + self.settings.wait_ms)

    def _index(self, shown: Shown) -> None:
        self._open[shown.number] = shown
        self._ends.append(shown)
        request = (shown.user, shown.request)
        same = self._requests.setdefault(request, shown)
        if same is not shown:
            if not isinstance(same, dict):
                self._requests[request] = same = dict.fromkeys(same.ids, same)
            same.update(dict.fromkeys(shown.ids, shown))
        newest = self._newest
        for item in shown.ids:
            others = newest.setdefault((shown.user, item), shown)
            if others is not shown:
                if not isinstance(others, deque):
                    newest[shown.user, item] = others = deque([others])
                others.append(shown)

    def _restore(self, shown: Shown) -> None:
        """An open impression again. Of its timers those not below the watermark are still to fire."""
        self._index(shown)
        if shown.ts + self.settings.wait_ms >= self.watermark:
            self._waits.append(shown)
        for place, (_, _, due) in (shown.plays or {}).items():
            if due >= self.watermark:
                heappush(self._plays, (due, shown.number, place))
        self._due = NEVER

    def _fire(self, limit: int) -> None:
        """Fires all timers before `limit`, in order; at the same time waits first, then watches, then ends."""
        waits, plays, ends = self._waits, self._plays, self._ends
        wait_ms, open_ms = self.settings.wait_ms, self.settings.open_ms
        while True:
            wait = waits[0].ts + wait_ms if waits else _FOREVER
            play = plays[0][0] if plays else _FOREVER
            end = ends[0].ts + open_ms if ends else _FOREVER
            self._due = due = min(wait, play, end)
            if due >= limit:
                return
            if wait == due:
                self._end_wait(waits.popleft(), due)
            elif play == due:
                _, number, place = heappop(plays)
                shown = self._open[number]
                play_ms, duration_ms, _ = (shown.plays or {})[place]
                self._emit(shown, place, WATCH, due, play=play_ms, duration=duration_ms)
            else:
                self._close(ends.popleft())

    def _end_wait(self, shown: Shown, due: int) -> None:
        for place in range(len(shown.ids)):
            if not shown.clicked >> place & 1:
                self._emit(shown, place, SHOWN, due, click=0)

    def _close(self, shown: Shown) -> None:
        """Forgets an impression: the oldest there is."""
        del self._open[shown.number]
        request = (shown.user, shown.request)
        same = self._requests[request]
        if isinstance(same, dict) and len(same) > len(shown.ids):
            for item in shown.ids:
                del same[item]
        else:
            del self._requests[request]
        for item in shown.ids:
            others = self._newest[shown.user, item]
            if isinstance(others, deque) and len(others) > 1:
                others.popleft()
            else:
                del self._newest[shown.user, item]
        self._changes.shown.pop(shown.number, None)
        if shown.number < self._changes.first_number:
            self._changes.closed.append(shown.number)

    # --- actions ------------------------------------------------------------------------------------------------

    def _act(self, event: Action, event_id: str, now: int, late: bool) -> None:
        """7 and 8. `now`: ts, or where it is late the watermark; all timers before it have fired."""
        user, item = feature_id("user", event.user), feature_id("item", event.item)
        match event:
            case Click():
                joined = self._click(event, event_id, user, item, now, late)
            case Watch():
                joined = self._watch(event, user, item, now)
            case Purchase():
                joined = self._purchase(event, user, item, now)
            case _:
                joined = False
        if not late:
            self.counts.open -= 1
            self.counts.joined += joined
            self.counts.history_only += not joined
        if not isinstance(event, Refund):
            history = self._histories.get(user) or UserHistory()
            if history.push(item, event.ts):
                self._histories.put(user, history)
                self._pushed[user] = history

    def _find(self, user: int, item: int, request: Id | None, ts: int) -> Shown | None:
        """The impression that an action at `ts` is on. What is open has not ended before now, so not before `ts`."""
        if request is not None:
            same = self._requests.get((user, str(request)))
            shown = same.get(item) if isinstance(same, dict) else same
            if shown is not None and shown.ts <= ts and item in shown.ids:
                return shown
        others = self._newest.get((user, item), ())
        newest_first = (others,) if isinstance(others, Shown) else reversed(others)
        return next((shown for shown in newest_first if shown.ts <= ts), None)

    def _click(self, event: Click, event_id: str, user: int, item: int, now: int, late: bool) -> bool:
        ts = event.ts
        shown = self._find(user, item, event.request_id, ts)
        if shown is not None:
            place = shown.ids.index(item)
            if not shown.clicked >> place & 1:
                shown.clicked |= 1 << place
                self._changes.shown[shown.number] = shown
                waited = shown.ts + self.settings.wait_ms < now
                self._emit(shown, place, LATE_CLICK if waited else SHOWN, now, click=1, purchase=0)
            key = example_key(shown.request, shown.items[place])
            window = Window(
                ts, row_id(key, PURCHASE), hash_text(key), IMPRESSION, shown.ts, shown.scenario,
                shown.positions[place] if shown.positions else -1,
                shown.propensities[place] if shown.propensities else None, shown.history,
            )  # fmt: skip
        elif self.settings.implicit and not late:
            known = self._histories.get(user)
            history = known.as_of(ts) if known else EMPTY
            key = implicit_key(event_id, event.item)
            window = Window(
                ts, row_id(key, PURCHASE), hash_text(key), IMPLICIT, ts, _SCENARIO[event.scenario],
                -1, None, history,
            )  # fmt: skip
            self._emit_window(window, user, event, SHOWN, row_id(key, SHOWN), now, click=1, purchase=0)
        else:
            return False
        self._hold((user, item), window, now)
        return True

    def _window(self, pair: Pair, now: int) -> Window | None:
        """The purchase window of (user, item), unless it has ended."""
        window = self._windows.get(pair)
        return window if window is not None and now <= window.clicked + self.settings.purchase_window_ms else None

    def _hold(self, pair: Pair, window: Window, now: int) -> None:
        """The last click in event time holds the window; a further one on the same example renews it."""
        held = self._window(pair, now)
        if held is not None and held.example_id == window.example_id:
            held.clicked = max(held.clicked, window.clicked)
            self._windows.put(pair, held)
        elif held is None or window.clicked >= held.clicked:
            self._windows.put(pair, window)

    def _watch(self, event: Watch, user: int, item: int, now: int) -> bool:
        shown = self._find(user, item, event.request_id, event.ts)
        if shown is None:
            return False
        place = shown.ids.index(item)
        plays = shown.plays = shown.plays or {}
        if place not in plays:
            due = min(event.ts + self.settings.watch_wait_ms, shown.ts + self.settings.open_ms)
            due = max(due, now)  # of a late watch: the timers before now have fired
            heappush(self._plays, (due, shown.number, place))
            self._due = min(self._due, due)
        else:
            play, _, due = plays[place]
            if due < now or event.play_ms <= play:
                return True  # its row is made, or it is not longer
        plays[place] = event.play_ms, event.duration_ms, due
        self._changes.shown[shown.number] = shown
        return True

    def _purchase(self, event: Purchase, user: int, item: int, now: int) -> bool:
        window = self._window((user, item), now)
        if window is None or event.ts < window.clicked:
            return False
        if not window.bought:
            window.bought = True
            self._windows.put((user, item), window)
            self._emit_window(window, user, event, PURCHASE, window.row_id, now, click=-1, purchase=1)
        return True

    # --- rows ---------------------------------------------------------------------------------------------------

    def _emit(
        self, shown: Shown, place: int, part: int, closed: int,
        click: int = -1, purchase: int = -1, play: int = -1, duration: int = -1,
    ) -> None:  # fmt: skip
        """A row of an impression's example."""
        counts = self.counts
        counts.rows += 1
        if part == SHOWN:
            counts.open -= 1
            counts.joined += 1
        item = shown.items[place]
        key = example_key(shown.request, item)
        self._rows.append((
            row_id(key, part), hash_text(key), part, IMPRESSION, shown.ts, closed, shown.user, shown.ids[place],
            shown.scenario, shown.positions[place] if shown.positions else -1,
            shown.propensities[place] if shown.propensities else math.nan, 1.0,
            click, purchase, play, duration, shown.history, _raw(item),
        ))  # fmt: skip

    def _emit_window(
        self, window: Window, user: int, event: Click | Purchase, part: int, id_: int, closed: int,
        click: int, purchase: int,
    ) -> None:  # fmt: skip
        """A row of an example that is not, or no longer, open."""
        self.counts.rows += 1
        self._rows.append((
            id_, window.example_id, part, window.source, window.ts, closed, user, feature_id("item", event.item),
            window.scenario, window.position, math.nan if window.propensity is None else window.propensity,
            1.0, click, purchase, -1, -1, window.history, _raw(event.item),
        ))  # fmt: skip


def _distinct(ids: list[int], taken: Container[int]) -> list[int]:
    """The places of the ids that are not taken, of each id the first."""
    first: dict[int, int] = {}
    for place, id_ in enumerate(ids):
        if id_ not in taken:
            first.setdefault(id_, place)
    return list(first.values())


def _raw(item: str | int) -> str:
    return orjson.dumps(item).decode()


def _columns(rows: list[tuple]) -> Examples:
    """Rows, each a tuple in the order of COLUMNS, as columns."""
    if not rows:
        return Examples.empty()
    columns: list[Any] = list(zip(*rows, strict=True))
    for i, (name, (dtype, _)) in enumerate(COLUMNS.items()):
        columns[i] = as_array(columns[i]) if name == "history" else np.array(columns[i], dtype)
    return Examples(*columns)


def _dead_letter(error: Rejected, partition: int, record: Record) -> bytes:
    value = record.value
    return orjson.dumps({
        "reason": error.reason, "detail": error.detail, "partition": partition, "offset": record.offset,
        "timestamp_ms": record.timestamp_ms, "length": 0 if value is None else len(value),
        "value": None if value is None else base64.b64encode(value[:DEAD_VALUE_BYTES]).decode(),
    })  # fmt: skip
