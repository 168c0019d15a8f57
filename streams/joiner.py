"""The event-time join of one partition: what was shown with what was done, and the user's features of that moment.

docs/architecture.md, "Join semantics", is the specification; the numbers in the comments are its rules.
tests/streams/reference_joiner.py is the same in plain dictionaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from typing import Annotated, NamedTuple

import numpy as np
import orjson
from msgspec import Meta, Struct

from embedding_store.errors import PositionError
from embedding_store.ids import feature_id
from online_model.examples import Block, request_name
from online_model.history import EMPTY, Kind, UserHistory, as_array, history_hash
from streams.dead_letters import DeadLetter
from streams.events import (
    Action,
    Cart,
    Click,
    Favourite,
    Forget,
    Id,
    Impression,
    Purchase,
    Rejected,
    Tick,
    Watch,
    decode_many,
)
from streams.join_rows import (
    LATE_CLICK,
    NOT_BOUGHT,
    PURCHASE,
    SCENARIO,
    SHOWN,
    WATCH,
    Rows,
    query_of,
    window_of_click,
    window_of_impression,
)
from streams.join_state import NEVER, Changes, JoinState, Pair, Shown, Window
from streams.open_impressions import OpenImpressions

_Ms = Annotated[int, Meta(ge=0, le=1 << 40)]
item_id = lru_cache(maxsize=50_000)(partial(feature_id, "item"))  # by far most are hashed again and again
KIND: dict[type, int] = {
    Click: int(Kind.CLICK), Watch: int(Kind.WATCH), Cart: int(Kind.CART), Favourite: int(Kind.FAVOURITE),
    Purchase: int(Kind.PURCHASE),
}  # fmt: skip


class JoinSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Section [join]. Times in ms of event time."""

    disorder_ms: _Ms = 250  # events may come this much out of order and lose nothing
    wait_ms: _Ms = 5_000  # not clicked for so long: learned as not clicked, until a click corrects it
    open_ms: _Ms = 1_800_000  # an impression can be acted on for so long …
    click_window_ms: _Ms = 600_000  # … and clicked for so long
    watch_wait_ms: _Ms = 10_000  # from the first watch of an example to its row
    purchase_window_ms: _Ms = 259_200_000  # from the last click
    purchase_wait_ms: _Ms = 0  # from the first click to the row that says it was not bought; 0: the click's own says so
    unclicked_of: Annotated[int, Meta(ge=1, le=1 << 16)] = 1  # of so many rows without a click one is kept
    implicit: bool = False  # the log has no impressions: a click is an example
    future_ms: _Ms = 60_000  # an event further ahead of Kafka's clock is refused

    @property
    def closing_ms(self) -> int:
        """A tick so much past the last event closes all that is open (but the purchase windows)."""
        return self.open_ms + self.watch_wait_ms + self.disorder_ms + 300_000

    def __post_init__(self) -> None:
        for shorter, longer in (("wait_ms", "open_ms"), ("purchase_wait_ms", "purchase_window_ms")):
            low, high = getattr(self, shorter), getattr(self, longer)
            if low > high:
                raise ValueError(f"`{shorter}` ({low}) must not be longer than `{longer}` ({high})")


class Record(NamedTuple):
    """A record of the partition. `timestamp_ms`: the time Kafka stamped on it, None if it has none."""

    offset: int
    timestamp_ms: int | None
    value: bytes | None


@dataclass
class Joined:
    """What came of one call of `process`."""

    block: Block
    dead: list[DeadLetter]  # for `events.dead`
    changes: Changes
    kinds: Counter[type] = field(default_factory=Counter)  # of the records; `Rejected` too


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
        self.open = OpenImpressions(state.numbers, state.aside)
        self._histories, self._windows, self._seen = state.histories, state.windows, state.seen
        self._plays, self._unbought = state.plays, state.unbought
        self._forgotten = state.forgotten
        self._held = state.held
        heapify(self._held)
        self._begin()

    def process(self, records: Iterable[Record], to_offset: int | None = None, set_aside: bool = False) -> Joined:
        """Joins the next records of the partition, by ascending offset; those below `next_offset` are left out.

        `set_aside`: they are counted (and refused where they must be) and have no other effect, but that users are
        forgotten.

        `to_offset`: the offset to go on from, where it is not the last record's + 1 (Kafka leaves holes). Returns the
        block [next_offset before, to_offset). Raises PositionError if `to_offset` lies before the end of the records.
        """
        self._begin()
        start = end = self.next_offset
        new = [record for record in records if record.offset >= start]
        if new:
            end = new[-1].offset + 1
            self._take_all(new, set_aside)
        if to_offset is None:
            to_offset = end
        elif to_offset < end:
            text = f"partition {self.partition}: a batch that ends at offset {to_offset} holds record {end - 1}"
            raise PositionError(f"{text}: pass the offset to go on from")
        self._release()
        self.next_offset = to_offset
        self._forget_what_ended()
        users = sorted(self._pushed)
        examples = self._rows.columns(self.counts)
        block = Block(
            partition=self.partition,
            from_offset=start,
            to_offset=to_offset,
            handled=min((held[2] for held in self._held), default=to_offset),
            watermark=self.watermark,
            counts=replace(self.counts),
            examples=examples,
            users=np.array(users, np.int64),
            histories=as_array([self._pushed[user].latest() for user in users]),
            set_aside=set_aside,
        )
        return Joined(block, self._dead, self._changes, self._kinds)

    def trim(self, examples: int) -> None:
        """Puts open examples aside until at most so many are in memory: what `process` changed last is in the store."""
        self.open.put_aside(examples)

    # --- records ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._rows = Rows(self.settings.unclicked_of)
        self._dead: list[DeadLetter] = []
        self._kinds: Counter[type] = Counter()
        self._pushed: dict[int, UserHistory] = {}
        self._changes = Changes(self.next_offset, replace(self.open.numbers), self.open.numbers, self._forgotten)

    def _take_all(self, records: list[Record], set_aside: bool) -> None:
        """Rules 1 to 5 for each record."""
        events = decode_many([record.value for record in records])
        self._kinds.update(map(type, events))
        # What the store must be asked for, it is asked for at once.
        named = [event for event in events if not isinstance(event, (Rejected, Tick))]
        found = self._seen.find([str(event.event_id) for event in named], self.watermark)
        users = {event.user for event in named}
        ids = {user: feature_id("user", user) for user in users}
        self._histories.fetch(set(ids.values()))
        self._windows.fetch({(ids[e.user], item_id(e.item)) for e in named if isinstance(e, (Click, Purchase))})
        for record, event in zip(records, events, strict=True):
            stamp = record.timestamp_ms
            if not isinstance(event, Rejected) and stamp is not None and event.ts > stamp + self.settings.future_ms:
                ahead = f"ts is {event.ts - stamp:,} ms ahead of the time Kafka stamped on the record"
                event = Rejected("from_the_future", f"{ahead}; at most {self.settings.future_ms:,} are taken")
            if isinstance(event, Rejected):  # 1
                self.counts.events_in += 1
                self.counts.rejected += 1
                self._dead.append(
                    DeadLetter(event.reason, event.detail, self.partition, record.offset, stamp, record.value)
                )
            elif isinstance(event, Tick):
                if not set_aside:
                    self._rise(event.ts)
            elif set_aside:
                self._set_aside(event, ids[event.user], found)
            else:
                self._take(record, event, str(event.event_id), ids[event.user], found)

    def _set_aside(self, event: Impression | Action | Forget, user: int, found: dict[str, int]) -> None:
        units = len(event.items) if isinstance(event, Impression) else 1
        self.counts.events_in += units
        self.counts.set_aside += units
        event_id = str(event.event_id)
        if isinstance(event, Forget) and not self._is_duplicate(event_id, found):
            self._changes.seen[event_id] = event.ts
            self._release()
            self._erase(event, event_id, user, max(self.watermark, event.ts), late=True)

    def _is_duplicate(self, event_id: str, found: dict[str, int]) -> bool:
        first = self._changes.seen.get(event_id)
        if first is None:
            first = found.get(event_id)
        return first is not None and self.watermark - first <= self.settings.open_ms

    def _take(
        self, record: Record, event: Impression | Action | Forget, event_id: str, user: int, found: dict[str, int]
    ) -> None:
        counts, ts, watermark = self.counts, event.ts, self.watermark
        units = len(event.items) if isinstance(event, Impression) else 1
        counts.events_in += units  # 2
        if self._is_duplicate(event_id, found):  # 3
            counts.duplicates += units
            return
        self._changes.seen[event_id] = ts
        if ts < watermark:  # 4
            counts.late += units
            if not isinstance(event, Impression):
                self._release()
                self._handle(event, event_id, user, watermark, late=True)
            return
        counts.open += units
        heappush(self._held, (ts, event_id, record.offset, event, record.value, user))  # type: ignore[misc]
        self._rise(ts)

    def _rise(self, ts: int) -> None:
        self.watermark = max(self.watermark, ts - self.settings.disorder_ms)

    def _release(self) -> None:
        """5. All that is below the watermark, in order. Once for many records is the same as after each of them:
        what came later and was not late has a larger ts than what an earlier watermark let go.

        Timers fire when all is released, or before what they could change: the rows are put in the order of their
        times in the end.
        """
        held, watermark, stored_below = self._held, self.watermark, self._changes.from_offset
        while held and held[0][0] < watermark:
            ts, event_id, offset, event, _, user = heappop(held)
            if offset < stored_below:
                self._changes.released.append(offset)
            if self._forgotten and ts < self._forgotten.get(user, NEVER) and not isinstance(event, Forget):
                units = len(event.items) if isinstance(event, Impression) else 1  # forgotten in a range set aside
                self.counts.open -= units
                self.counts.history_only += units
            elif isinstance(event, Impression):
                self._show(event, user)
            else:
                self._handle(event, event_id, user, ts, late=False)
        self._fire(watermark)

    def _handle(self, event: Action | Forget, event_id: str, user: int, now: int, late: bool) -> None:
        if isinstance(event, Forget):
            self._erase(event, event_id, user, now, late)
        elif not (late and self._is_forgotten(user, event.ts)):
            self._act(event, event_id, user, now, late)

    def _is_forgotten(self, user: int, ts: int) -> bool:
        """Whether a late action is from before its user was forgotten. (When the entry goes must change nothing.)"""
        at = self._forgotten.get(user)
        return at is not None and ts <= at and self.watermark - at <= self.settings.open_ms

    def _forget_what_ended(self) -> None:
        """What can no longer matter. When that happens changes nothing: it is looked at with the times in it."""
        self._changes.held = [held for held in self._held if held[2] >= self._changes.from_offset]
        before = self.watermark - self.settings.open_ms
        self._seen.add(self._changes.seen)
        self._seen.forget(before)
        self._windows.forget(self.watermark - self.settings.purchase_window_ms)
        for user in [user for user, ts in self._forgotten.items() if ts < before]:
            del self._forgotten[user]

    # --- impressions and timers ---------------------------------------------------------------------------------

    def _show(self, event: Impression, user: int) -> None:
        """6. Opens the examples of an impression."""
        ts, request = event.ts, request_name(event.request_id)
        known = self._histories.get(user)
        history = known.as_of(ts) if known else EMPTY
        if event.feature_hash is not None:
            self.counts.skew_checked += 1
            self.counts.skew_differs += event.feature_hash != history_hash(history)
        items, positions, propensities = event.items, event.positions, event.propensities
        ids = list(map(item_id, items))
        same = self.open.items_of(user, request, ts - self.settings.open_ms)
        if same or len(set(ids)) < len(ids):
            new = _distinct(ids, same)
            self.counts.duplicates += len(ids) - len(new)
            self.counts.open -= len(ids) - len(new)
            if not new:
                return
            items, ids = [items[i] for i in new], [ids[i] for i in new]
            positions = positions and [positions[i] for i in new]
            propensities = propensities and [propensities[i] for i in new]
        shown = Shown(
            self.open.numbers.next, user, request, ts, SCENARIO[event.scenario], history, tuple(items), tuple(ids),
            None if positions is None else tuple([min(max(place, -1), 32_767) for place in positions]),  # int16
            None if propensities is None else tuple(propensities), query_of(event.context),
        )  # fmt: skip
        self.open.add(shown, self._changes)

    def _fire(self, limit: int) -> None:
        """Fires all timers before `limit`. Of one impression its wait ends first, then its watches, then itself."""
        impressions, plays, unbought = self.open, self._plays, self._unbought
        while (due := impressions.next_wait() + self.settings.wait_ms) < limit:
            shown = impressions.end_wait()
            if shown is not None:
                joined = self._rows.unclicked(shown, due)
                self.counts.open -= joined
                self.counts.joined += joined
        while (due := plays.peek(limit)) < limit:
            self._end_play(due)
        while (due := unbought.peek(limit)) < limit:
            (_, user, item, _), as_it_came = unbought.pop()
            window = self._windows.get((user, item))
            assert window is not None, "a window outlives its timer"
            self._say_not_bought(window, (user, item), orjson.loads(as_it_came), due)
            self._windows.put((user, item), window)
        while impressions.next_end() + self.settings.open_ms < limit:
            impressions.close(self._changes)

    def _end_play(self, due: int) -> None:
        (_, user, number, place), request = self._plays.pop()
        shown = self.open.get(number, user, int.from_bytes(request, "little", signed=True))
        if shown is not None:
            play_ms, duration_ms, _ = (shown.plays or {})[place]
            self._rows.example(shown, place, WATCH, due, play=play_ms, duration=duration_ms)

    @property
    def _not_so_far(self) -> int:
        """What a click's row says of the purchase."""
        return -1 if self.settings.purchase_wait_ms else 0

    # --- actions ------------------------------------------------------------------------------------------------

    def _act(self, event: Action, event_id: str, user: int, now: int, late: bool) -> None:
        """7 and 8. `now`: ts, or where it is late the watermark."""
        item = item_id(event.item)
        match event:
            case Click():
                joined = self._click(event, event_id, (user, item), now, late)
            case Watch():
                joined = self._watch(event, user, item, now)
            case Purchase():
                joined = self._purchase(event, (user, item), now)
            case _:
                joined = False
        if not late:
            self.counts.open -= 1
            self.counts.joined += joined
            self.counts.history_only += not joined
        kind = KIND.get(type(event))
        if kind is not None:
            history = self._histories.get(user) or UserHistory()
            history.push(item, event.ts, kind)
            self._histories.put(user, history)
            self._pushed[user] = history

    def _find(self, user: int, item: int, request: Id | None, ts: int, window_ms: int, now: int) -> Shown | None:
        since = max(ts - window_ms, now - self.settings.open_ms)
        return self.open.find(user, item, None if request is None else request_name(request), ts, since)

    def _click(self, event: Click, event_id: str, pair: Pair, now: int, late: bool) -> bool:
        user, item = pair
        ts = event.ts
        shown = self._find(user, item, event.request_id, ts, self.settings.click_window_ms, now)
        first = False  # click on its example
        if shown is not None:
            place = shown.ids.index(item)
            if place not in shown.clicked:
                first = True
                over = shown.ts + self.settings.wait_ms < now
                if over and shown.number >= self.open.numbers.waiting:
                    self._fire(now)
                shown.clicked += (place,)
                self._changes.shown[shown.number] = shown
                if over:
                    self._rows.example(shown, place, LATE_CLICK, now, click=1, purchase=self._not_so_far)
                else:
                    self.counts.open -= 1
                    self.counts.joined += 1
                    self._rows.example(shown, place, SHOWN, now, click=1, purchase=self._not_so_far)
            window = window_of_impression(event, shown, place)
        elif self.settings.implicit and not late:
            first = True
            known = self._histories.get(user)
            window = window_of_click(event, event_id, known.as_of(ts) if known else EMPTY)
            self._rows.window(window, SHOWN, now, user, item, event.item, click=1, purchase=self._not_so_far)
        else:
            return False
        if first and self.settings.purchase_wait_ms:
            window.due = ts + self.settings.purchase_wait_ms
        self._hold(pair, window, event.item, now)
        return True

    def _window(self, pair: Pair, now: int) -> Window | None:
        """The purchase window of (user, item), unless it has ended."""
        window = self._windows.get(pair)
        if window is None:
            return None
        if window.due and window.due < now:
            self._fire(now)
        return window if now <= window.clicked + self.settings.purchase_window_ms else None

    def _hold(self, pair: Pair, window: Window, item: Id, now: int) -> None:
        """The last click in event time holds the window; a further one on the same example renews it. An example that
        loses the window, or does not get it, cannot be bought any more."""
        held = self._window(pair, now)
        if held is not None and held.name == window.name:
            held.clicked = max(held.clicked, window.clicked)
            self._windows.put(pair, held)
            return
        if held is not None and window.clicked < held.clicked:
            self._say_not_bought(window, pair, item, now)
            return
        if held is not None and held.due:
            self._unbought.remove((held.due, *pair, 0))
            self._say_not_bought(held, pair, item, now)
        if window.due < now:
            self._say_not_bought(window, pair, item, now)
        elif window.due:
            self._unbought.put((window.due, *pair, 0), orjson.dumps(item))
        self._windows.put(pair, window)

    def _say_not_bought(self, window: Window, pair: Pair, item: Id, now: int) -> None:
        """The row NOT_BOUGHT, unless that was not waited for, or is said."""
        if window.due:
            window.due = 0
            self._rows.window(window, NOT_BOUGHT, now, *pair, item, purchase=0)

    def _watch(self, event: Watch, user: int, item: int, now: int) -> bool:
        shown = self._find(user, item, event.request_id, event.ts, self.settings.open_ms, now)
        if shown is None:
            return False
        place = shown.ids.index(item)
        plays = shown.plays = shown.plays or {}
        if place not in plays:
            due = min(event.ts + self.settings.watch_wait_ms, shown.ts + self.settings.open_ms)
            due = max(due, now)  # of a late watch: the timers before now have fired
            self._plays.put((due, user, shown.number, place), shown.request.to_bytes(8, "little", signed=True))
        else:
            play, _, due = plays[place]
            if due < now or event.play_ms <= play:
                return True  # its row is made, or it is not longer
        plays[place] = event.play_ms, event.duration_ms, due
        self._changes.shown[shown.number] = shown
        return True

    def _purchase(self, event: Purchase, pair: Pair, now: int) -> bool:
        window = self._window(pair, now)
        if window is None or event.ts < window.clicked:
            return False
        if not window.bought:
            window.bought = True
            if window.due:
                self._unbought.remove((window.due, *pair, 0))
                window.due = 0
            self._windows.put(pair, window)
            delay = event.ts - window.first
            self._rows.window(window, PURCHASE, now, *pair, event.item, purchase=1, delay=delay)
        return True

    def _erase(self, event: Forget, event_id: str, user: int, now: int, late: bool) -> None:
        """9. From here on nothing is known of the user."""
        if not late:
            self._fire(now)
        counts = self.counts
        for shown in self.open.forget(user, self._changes):
            if shown.number >= self.open.numbers.waiting:
                unsaid = len(shown.ids) - len(shown.clicked)
                counts.open -= unsaid
                counts.history_only += unsaid
        for pair, window in self._windows.of_user(user):
            if window.due:
                self._unbought.remove((window.due, *pair, 0))
            self._windows.remove(pair)
        self._histories.remove(user)
        self._pushed.pop(user, None)
        self._forgotten[user] = now
        self._changes.erased = True
        if not late:
            counts.open -= 1
            counts.joined += 1
        self._rows.forget(event, event_id, user, now)


def _distinct(ids: list[int], taken: Container[int]) -> list[int]:
    """The places of the ids that are not taken, of each id the first."""
    first: dict[int, int] = {}
    for place, id_ in enumerate(ids):
        if id_ not in taken:
            first.setdefault(id_, place)
    return list(first.values())
