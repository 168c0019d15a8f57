"""A marketplace in virtual time that any recommender can be driven against, and that knows the truth about itself.

    world = Marketplace(settings); world.start(now_ms); publish(world.catalogue())
    while …:
        step = world.advance(now_ms)
        publish(step.items, step.events)
        for request in step.requests:
            publish(world.show(request, recommend(request), ts=now_ms))

Nobody's coin depends on what was shown before (see coins.py), and users, items and arrivals follow from the seed
alone. What does depend on what was shown: how tired a user is of an item, and the stock.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from embedding_store.errors import UsageError
from replay.simulator.coins import coins
from replay.simulator.population import Items, Requests, Users
from replay.simulator.settings import SimulatorSettings
from streams.events import Cart, Click, Event, Favourite, Impression, Item, Purchase, Refund, Scenario, Watch

TASTE, POSITION, FATIGUE, FADE, MATCH = 3.6, 0.45, 0.12, 0.8, 1.0  # weights in the log odds of a click
MOST_TIRED = 8  # views of an item after which a user is not more tired of it
SEEN_KEPT = 300  # items whose views a user remembers
CURRENCY = "EUR"

# Purposes of the coins of one place on a page.
CLICK, CLICK_DELAY, PLAYS, PLAY_SHARE, CART, FAVOURITE, BUYS, BUY_DELAY, REFUNDS, REFUND_DELAY, QUANTITY = range(11)
PURPOSES = 11


@dataclass(frozen=True)
class Place:
    """How users behave in a scenario. `base`: log odds of a click on an average item at the top."""

    share: float  # of the requests
    k: int  # items on a page
    base: float
    autoplay: bool  # items play by themselves: a watch comes without a click
    buys: float  # log odds of a purchase after a click, on an average item


PLACES: dict[Scenario, Place] = {
    "live": Place(share=0.10, k=3, base=-3.1, autoplay=True, buys=-2.9),
    "video": Place(share=0.30, k=4, base=-2.9, autoplay=True, buys=-3.8),
    "search": Place(share=0.20, k=10, base=-3.2, autoplay=False, buys=-2.4),
    "shelf": Place(share=0.40, k=10, base=-3.2, autoplay=False, buys=-2.8),
}
_SHARES = np.cumsum([place.share for place in PLACES.values()])


@dataclass(frozen=True)
class Request:
    """A page to be filled with `k` items. `query`: the category searched for (scenario search), else None."""

    number: int
    user: str
    scenario: Scenario
    ts: int  # ms
    k: int
    request_id: str
    query: str | None = None


@dataclass
class Step:
    """What has happened since the last step, each list by time."""

    requests: list[Request] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


class Marketplace:
    """See the module. Not for use from several threads."""

    def __init__(self, settings: SimulatorSettings | None = None) -> None:
        self.settings = settings or SimulatorSettings()
        self._users = Users(self.settings)

    def start(self, now_ms: int) -> None:
        """Opens (or opens anew) at `now_ms`."""
        self.start_ms = self.now_ms = now_ms
        self._items = Items(self.settings, self._users.centres, now_ms)
        self._arrivals = Requests(self.settings, self._users)
        self._waiting: deque[Request] = deque()
        self._seconds_drawn = self._requests_drawn = 0
        self._due: list[tuple[int, int, Event]] = []
        self._scheduled = 0
        self._seen: dict[int, dict[int, int]] = {}  # user → item's number → views

    def catalogue(self) -> list[Item]:
        """The records of all items on offer now."""
        return list(self._items.records)

    def advance(self, to_ms: int) -> Step:
        """Lets time pass to `to_ms` and tells what came due. No request and no birth depends on the steps taken."""
        step = Step()
        self.now_ms = max(self.now_ms, to_ms)
        for _, gone, new in self._items.advance(self._seconds(self.now_ms)):
            step.items += (gone, new)
        while self.start_ms + self._seconds_drawn * 1000 <= self.now_ms:
            self._draw_second()
        while self._waiting and self._waiting[0].ts <= self.now_ms:
            step.requests.append(self._waiting.popleft())
        while self._due and self._due[0][0] <= self.now_ms:
            event = heapq.heappop(self._due)[2]
            step.events.append(event)
            if isinstance(event, Purchase):
                step.items += self._sell(event)
        return step

    def show(
        self,
        request: Request,
        items: Sequence[str | int],
        *,
        ts: int,
        propensities: Sequence[float] | None = None,
        model_version: str | None = None,
        feature_hash: int | None = None,
    ) -> Impression:
        """Shows `items` (ids, top first, not empty) at `ts`: the impression to send; the user's reactions come due
        later. Items that are not on offer are never clicked."""
        user = int(request.user[1:])
        flips = coins(self.settings.seed, user, request.number, len(items), PURPOSES)
        slots, places = self._on_offer(items)
        chance = np.zeros(len(items))
        logits = self._logits(user, places, slots, ts, request.scenario, request.query)
        chance[slots] = 1.0 / (1.0 + np.exp(-logits))
        clicked = flips[CLICK] < chance
        reactive = clicked | (PLACES[request.scenario].autoplay & (flips[PLAYS] < np.exp(-0.4 * np.arange(len(items)))))
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            if reactive[slot]:
                self._react(request, items[slot], slot, place, ts, bool(clicked[slot]), flips[:, slot])
        self._remember(user, places)
        return Impression(
            event_id=f"{request.request_id}-i", ts=ts, user=request.user, scenario=request.scenario,
            request_id=request.request_id, items=list(items), positions=list(range(len(items))),
            propensities=None if propensities is None else list(propensities), model_version=model_version,
            feature_hash=feature_hash, context=None if request.query is None else {"query": request.query},
        )  # fmt: skip

    # What only the world knows.

    def click_probability(
        self,
        user: str,
        item: str | int,
        position: int,
        ts: int,
        scenario: Scenario = "shelf",
        query: str | None = None,
    ) -> float:
        """The true probability that `user` clicks `item` at `position` (0: top) at `ts`; 0 if it is not on offer."""
        return float(self.click_probabilities(user, [item], ts, scenario, query, positions=[position])[0])

    def click_probabilities(
        self,
        user: str,
        items: Sequence[str | int],
        ts: int,
        scenario: Scenario = "shelf",
        query: str | None = None,
        positions: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The same for several items, float64 [items]; positions None: in the order given."""
        slots, places = self._on_offer(items)
        at = slots if positions is None else np.asarray(positions)[slots]
        chance = np.zeros(len(items))
        chance[slots] = 1.0 / (1.0 + np.exp(-self._logits(int(user[1:]), places, at, ts, scenario, query)))
        return chance

    def random_ctr(self, samples: int = 1000) -> float:
        """The click rate of pages of random items now, estimated from `samples` requests as they arrive."""
        return self._ctr(samples, best=False)

    def best_ctr(self, samples: int = 1000) -> float:
        """The click rate of pages of the best items, by somebody who knows everything: no recommender does better."""
        return self._ctr(samples, best=True)

    def _ctr(self, samples: int, best: bool) -> float:
        rng = np.random.default_rng([self.settings.seed, self.now_ms])
        clicks = shown = 0.0
        every = np.arange(self.settings.items)
        for _ in range(samples):
            user = min(int(np.searchsorted(self._users.activity, rng.random())), self.settings.users - 1)
            scenario, query = self._wish(user, rng.random(), rng.random(), self.now_ms)
            k = PLACES[scenario].k
            logits = self._logits(user, every, np.zeros(len(every)), self.now_ms, scenario, query)
            page = np.sort(logits)[::-1][:k] if best else rng.permutation(logits)[:k]
            page = page - POSITION * np.log1p(np.arange(len(page)))
            clicks += float((1.0 / (1.0 + np.exp(-page))).sum())
            shown += len(page)
        return clicks / shown

    # How it works.

    def _seconds(self, ts: int) -> float:
        return (ts - self.start_ms) / 1000

    def _draw_second(self) -> None:
        arrivals = self._arrivals.second(self._seconds_drawn)
        self._seconds_drawn += 1
        for at, user, flip in zip(arrivals.at.tolist(), arrivals.user.tolist(), arrivals.coin.tolist(), strict=True):
            number, ts = self._requests_drawn, self.start_ms + int(at * 1000)
            self._requests_drawn += 1
            scenario, query = self._wish(user, flip[0], flip[1], ts)
            name = f"sim{self.settings.seed}-{self.start_ms}-{number}"
            self._waiting.append(Request(number, f"u{user}", scenario, ts, PLACES[scenario].k, name, query))

    def _wish(self, user: int, scenario_coin: float, query_coin: float, ts: int) -> tuple[Scenario, str | None]:
        """Which scenario, and what is searched for: a category by the user's taste."""
        scenario = list(PLACES)[min(int(np.searchsorted(_SHARES, scenario_coin)), len(PLACES) - 1)]
        if scenario != "search":
            return scenario, None
        weight = np.cumsum(np.exp(TASTE * self._users.centres @ self._users.taste(user, self._seconds(ts))))
        category = min(int(np.searchsorted(weight, query_coin * weight[-1])), len(weight) - 1)
        return scenario, f"c{category}"

    def _on_offer(self, items: Sequence[str | int]) -> tuple[np.ndarray, np.ndarray]:
        """int64 places on the page, and on the shelf, of the items that are on offer."""
        if not items:
            raise UsageError("a page needs at least one item: show() was given none")
        found = [(slot, self._items.place[item]) for slot, item in enumerate(items) if item in self._items.place]
        pairs = np.array(found, np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _logits(
        self, user: int, places: np.ndarray, positions: np.ndarray, ts: int, scenario: Scenario, query: str | None
    ) -> np.ndarray:
        """Log odds of a click, float64 [places]."""
        shelf, seconds = self._items, self._seconds(ts)
        logits = PLACES[scenario].base + shelf.quality[places] - POSITION * np.log1p(positions)
        logits += TASTE * (shelf.vector[places] @ self._users.taste(user, seconds))
        logits -= FADE * shelf.fade(places, seconds) ** 2
        if query is not None:
            logits += MATCH * ((shelf.category[places] == int(query[1:])) - 0.25)
        seen = self._seen.get(user)
        if seen:
            views = [seen.get(number, 0) for number in shelf.number[places].tolist()]
            logits -= FATIGUE * np.minimum(views, MOST_TIRED)
        return logits

    def _remember(self, user: int, places: np.ndarray) -> None:
        seen = self._seen.setdefault(user, {})
        for number in self._items.number[places].tolist():
            seen[number] = seen.pop(number, 0) + 1  # the newest last
        while len(seen) > SEEN_KEPT:
            del seen[next(iter(seen))]

    def _react(
        self, request: Request, item: str | int, slot: int, place: int, ts: int, clicked: bool, flip: np.ndarray
    ) -> None:
        shared: dict[str, Any] = {
            "user": request.user, "scenario": request.scenario, "request_id": request.request_id, "item": item,
        }  # fmt: skip
        name, where = f"{request.request_id}-{slot}", PLACES[request.scenario]
        liking = float(self._items.vector[place] @ self._users.taste(int(request.user[1:]), self._seconds(ts)))
        then = ts + (200 + int(1800 * flip[CLICK_DELAY]) if clicked else 0)
        if clicked:
            self._schedule(Click(event_id=f"{name}-c", ts=then, **shared))
        if where.autoplay:
            length = int(self._items.length_ms[place])
            share = flip[PLAY_SHARE] ** (1.0 / (0.5 + 1.5 * max(0.0, liking) + 2.0 * clicked))
            play = max(300, int(length * share))
            self._schedule(
                Watch(event_id=f"{name}-w", ts=then + play, play_ms=play, duration_ms=length, **shared)
            )
        if not clicked:
            return
        if flip[CART] < 0.12:
            self._schedule(Cart(event_id=f"{name}-b", ts=then + 1500, **shared))
        if flip[FAVOURITE] < 0.08:
            self._schedule(Favourite(event_id=f"{name}-f", ts=then + 1000, **shared))
        price = float(self._items.price[place])
        odds = where.buys + 1.5 * liking - 0.3 * math.log(price / 20)
        if flip[BUYS] < 1.0 / (1.0 + math.exp(-odds)):
            bought = then + 2000 + self._delay_ms(20 * 60, flip[BUY_DELAY])
            quantity = 2 if flip[QUANTITY] < 0.1 else 1
            self._schedule(
                Purchase(event_id=f"{name}-p", ts=bought, quantity=quantity, price=price, currency=CURRENCY, **shared)
            )
            if flip[REFUNDS] < 0.06:
                back = bought + self._delay_ms(30 * 60, flip[REFUND_DELAY])
                self._schedule(Refund(event_id=f"{name}-r", ts=back, quantity=quantity, **shared))

    def _delay_ms(self, median_s: float, coin: float) -> int:
        """A log-logistic delay about `median_s` of the shop's time, in ms of event time; a coin in, none flipped."""
        return int(median_s / self.settings.time_scale * 1000 * min((coin / (1 - coin)) ** 0.5, 20.0))

    def _schedule(self, event: Event) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (event.ts, self._scheduled, event))

    def _sell(self, purchase: Purchase) -> list[Item]:
        place = self._items.place.get(purchase.item)
        if place is None:
            return []
        record = self._items.records[place]
        left = (record.stock or 0) - purchase.quantity
        self._items.records[place] = msgspec.structs.replace(record, stock=left if left > 0 else 100)  # restocked
        return [self._items.records[place]]
