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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedding_store.errors import UsageError
from replay.simulator import reactions as r
from replay.simulator.coins import coins
from replay.simulator.models import MODELS, Look, Seen, UserModel
from replay.simulator.population import Items, Users
from replay.simulator.reactions import PLACES, BotReactions, Reactions
from replay.simulator.sessions import Arrivals, Sessions
from replay.simulator.settings import SimulatorSettings
from replay.simulator.truth import Truth
from streams.events import Cart, Click, Event, Favourite, Impression, Item, Purchase, Refund, Scenario, Watch

CURRENCY = "EUR"
_SHARES = np.cumsum([place.share for place in PLACES.values()])


@dataclass(frozen=True)
class Request:
    """A page to be filled with `k` items. `query`: the category searched for (scenario search), else None.
    `positions`: where on the page the items will stand; None: from the top."""

    number: int
    user: str
    scenario: Scenario
    ts: int  # ms
    k: int
    request_id: str
    query: str | None = None
    positions: tuple[int, ...] | None = None


@dataclass
class Step:
    """What has happened since the last step, each list by time."""

    requests: list[Request] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


class Marketplace:
    """See the module. Not for use from several threads.

    `truth`: what the world knows about each page shown so far, if `keep_truth` was asked for; whoever asked empties it.
    """

    def __init__(self, settings: SimulatorSettings | None = None, *, keep_truth: bool = False) -> None:
        self.settings = settings or SimulatorSettings()
        self.truth: list[Truth] | None = [] if keep_truth else None
        self._users = Users(self.settings)
        self._items: Items
        self._model: UserModel
        self._reactions: Reactions

    def start(self, now_ms: int) -> None:
        """Opens (or opens anew) at `now_ms`."""
        self.start_ms = self.now_ms = now_ms
        self._waiting: deque[Request] = deque()
        self._pieces_drawn = self._requests_drawn = 0
        self._due: list[tuple[int, int, Event, Refund | None]] = []  # time, number, what, and what follows a purchase
        self._scheduled = 0
        self._seen = Seen()
        self._furnish()

    def catalogue(self) -> list[Item]:
        """The records of all items on offer now; what is sold out is not."""
        return self._items.on_offer()

    def advance(self, to_ms: int) -> Step:
        """Lets time pass to `to_ms` and tells what came due. No request and no birth depends on the steps taken."""
        step = Step()
        self.now_ms = max(self.now_ms, to_ms)
        step.items += self._items.advance(self._seconds(self.now_ms))
        while self.start_ms + self._pieces_drawn * self._sessions.piece_s * 1000 <= self.now_ms:
            self._draw_piece()
        while self._waiting and self._waiting[0].ts <= self.now_ms:
            step.requests.append(self._waiting.popleft())
        while self._due and self._due[0][0] <= self.now_ms:
            self._happen(step)
        return step

    def next_ms(self, most_ms: int) -> int:
        """When something happens next, or `most_ms` if that is sooner: in virtual time one can go there at once."""
        while not self._waiting and self.start_ms + self._pieces_drawn * self._sessions.piece_s * 1000 < most_ms:
            self._draw_piece()
        soonest = min(most_ms, self._waiting[0].ts) if self._waiting else most_ms
        return min(soonest, self._due[0][0]) if self._due else soonest

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
        later. Items that are not on offer, or sold out, are never clicked."""
        user = int(request.user[1:])
        flips = coins(self.settings.seed, user, request.number, len(items), r.PURPOSES)
        slots, look = self._look(user, items, ts, request.scenario, request.query, request.positions)
        clicked, playing = np.zeros(len(items), bool), np.zeros(len(items), bool)
        clicked[slots] = self._clicks(look, flips[[r.CLICK, r.GOES_ON]][:, slots])
        playing[slots] = self._how(user).plays(request.scenario, clicked, flips[r.PLAYS])[slots]
        truth = self._tell(request, items, slots, look, ts) if self.truth is not None else None
        for slot, place in zip(slots.tolist(), look.places.tolist(), strict=True):
            if clicked[slot] or playing[slot]:
                self._react(request, items[slot], slot, place, ts, clicked[slot], playing[slot], flips[:, slot], truth)
        self._seen.add(user, self._items.number[look.places])
        positions = list(range(len(items))) if request.positions is None else list(request.positions[: len(items)])
        return Impression(
            event_id=f"{request.request_id}-i", ts=ts, user=request.user, scenario=request.scenario,
            request_id=request.request_id, items=list(items), positions=positions,
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
        """The same for several items, float64 [items]. `positions` None: shown together, in the order given; else each
        by itself at its position, with nothing else there to be clicked."""
        slots, look = self._look(int(user[1:]), items, ts, scenario, query, positions)
        chance = np.zeros(len(items))
        chance[slots] = self._chances(look, together=positions is None)
        return chance

    def page_truth(self, request: Request, items: Sequence[str | int]) -> np.ndarray:
        """The same for the answer to a request, shown together at its time and where it asks for, float64 [items]."""
        user = int(request.user[1:])
        slots, look = self._look(user, items, request.ts, request.scenario, request.query, request.positions)
        chance = np.zeros(len(items))
        chance[slots] = self._chances(look, together=True)
        return chance

    def random_ctr(self, samples: int = 1000) -> float:
        """The click rate of pages of random items now, estimated from `samples` requests as they arrive; no bots."""
        return self._ctr(samples, best=False)

    def best_ctr(self, samples: int = 1000) -> float:
        """The click rate of pages of the items most likely to be clicked, by somebody who knows everything."""
        return self._ctr(samples, best=True)

    def _ctr(self, samples: int, best: bool) -> float:
        rng = np.random.default_rng([self.settings.seed, self.now_ms])
        clicks = shown = 0.0
        every, now = np.arange(len(self._items.records)), self._seconds(self.now_ms)
        for _ in range(samples):
            user = min(int(np.searchsorted(self._users.activity, rng.random())), len(self._users.activity) - 1)
            request = self._wish(0, user, rng.random(), rng.random(), self.now_ms)
            if best:
                look = Look(user, every, np.zeros(len(every), np.int64), now, request.scenario, request.query)
                chosen = np.argsort(-self._model.alone(look), kind="stable")[: request.k]
            else:
                chosen = rng.permutation(every)[: request.k]
            page = Look(user, chosen, np.arange(len(chosen)), now, request.scenario, request.query)
            clicks += float(self._model.page(page).sum())
            shown += len(chosen)
        return clicks / shown

    # How it works.

    def _furnish(self) -> None:
        """The parts of the world at its opening. A world of another kind has others."""
        self._items = Items(self.settings, self._users.centres, self.start_ms)
        self._sessions = Sessions(
            self.settings.seed, self._users.activity, self._users.bot, self.settings.requests_per_s
        )
        self._model = MODELS[self.settings.user_model](self.settings, self._users, self._items, self._seen)
        self._reactions, self._bots = Reactions(self.settings), BotReactions(self.settings)

    def _wish(self, number: int, user: int, scenario_coin: float, query_coin: float, ts: int) -> Request:
        """Which scenario, and what is searched for: a category that the user wants."""
        scenario = list(PLACES)[min(int(np.searchsorted(_SHARES, scenario_coin)), len(PLACES) - 1)]
        query = None
        if scenario == "search":
            weight = np.cumsum(self._model.wants(user, self._seconds(ts)))
            query = f"c{min(int(np.searchsorted(weight, query_coin * weight[-1])), len(weight) - 1)}"
        name = f"sim{self.settings.seed}-{self.start_ms}-{number}"
        return Request(number, f"u{user}", scenario, ts, PLACES[scenario].k, name, query)

    def _seconds(self, ts: int) -> float:
        return (ts - self.start_ms) / 1000

    def _draw_piece(self) -> None:
        arrivals: Arrivals = self._sessions.piece(self._pieces_drawn)
        self._pieces_drawn += 1
        for at, user, flip in zip(arrivals.at.tolist(), arrivals.user.tolist(), arrivals.coin.tolist(), strict=True):
            ts = self.start_ms + int(at * 1000)
            self._waiting.append(self._wish(self._requests_drawn, user, flip[0], flip[1], ts))
            self._requests_drawn += 1

    def _look(
        self, user: int, items: Sequence[str | int], ts: int, scenario: Scenario, query: str | None,
        positions: Sequence[int] | None,
    ) -> tuple[np.ndarray, Look]:  # fmt: skip
        """The items that can be had: their int64 places in `items`, and the user's look at them."""
        if not items:
            raise UsageError("a page needs at least one item: show() was given none")
        found = [(slot, place) for slot, item in enumerate(items) if (place := self._items.available(item)) is not None]
        pairs = np.array(found, np.int64).reshape(-1, 2)
        slots = pairs[:, 0]
        at = slots if positions is None else np.asarray(positions)[slots]
        return slots, Look(user, pairs[:, 1], at, self._seconds(ts), scenario, query)

    def _how(self, user: int) -> Reactions:
        return self._bots if self._users.bot[user] else self._reactions

    def _chances(self, look: Look, together: bool) -> np.ndarray:
        if self._users.bot[look.user]:
            return np.full(len(look.places), BotReactions.CLICKS)
        return self._model.page(look) if together else self._model.alone(look)

    def _clicks(self, look: Look, flips: np.ndarray) -> np.ndarray:
        return flips[0] < BotReactions.CLICKS if self._users.bot[look.user] else self._model.clicks(look, flips)

    def _tell(self, request: Request, items: Sequence[str | int], slots: np.ndarray, look: Look, ts: int) -> Truth:
        """Adds what is true of a page to `truth`; the delays are filled in as they are drawn."""
        n, how = len(items), self._how(look.user)
        click, purchase = np.zeros(n), np.zeros(n)
        click[slots] = self._chances(look, together=True)
        liking = self._model.liking(look.user, look.places, look.seconds)
        purchase[slots] = how.buys(request.scenario, liking, self._items.price[look.places])
        truth = Truth(
            request_id=request.request_id, ts=ts, user=request.user, bot=bool(self._users.bot[look.user]),
            items=list(items), click=click.tolist(), purchase=purchase.tolist(),
            click_ms=[None] * n, purchase_ms=[None] * n, refund_ms=[None] * n,
        )  # fmt: skip
        assert self.truth is not None
        self.truth.append(truth)
        return truth

    def _react(
        self, request: Request, item: str | int, slot: int, place: int, ts: int, clicked: bool, playing: bool,
        flip: np.ndarray, truth: Truth | None,
    ) -> None:  # fmt: skip
        shared: dict[str, Any] = {
            "user": request.user, "scenario": request.scenario, "request_id": request.request_id, "item": item,
        }  # fmt: skip
        name, user = f"{request.request_id}-{slot}", int(request.user[1:])
        how, seconds = self._how(user), self._seconds(ts)
        liking = self._model.liking(user, np.array([place]), seconds)
        delay = 0
        if clicked:
            bot = how is self._bots
            delay = BotReactions.EVERY_MS * (slot + 1) if bot else how.click_ms(flip[r.CLICK_DELAY])
            self._schedule(Click(event_id=f"{name}-c", ts=ts + delay, **shared))
            if truth is not None:
                truth.click_ms[slot] = delay
        then = ts + delay
        if playing:
            length = int(self._items.length_ms[place])
            play = how.play_ms(length, float(liking[0]), clicked, flip[r.PLAY_SHARE])
            ends = max(then + play, ts + 100)
            self._schedule(Watch(event_id=f"{name}-w", ts=ends, play_ms=play, duration_ms=length, **shared))
        if not clicked:
            return
        if flip[r.CART] < how.CART:
            self._schedule(Cart(event_id=f"{name}-b", ts=then + 1500, **shared))
        if flip[r.FAVOURITE] < how.FAVOURITE:
            self._schedule(Favourite(event_id=f"{name}-f", ts=then + 1000, **shared))
        price = self._items.price[[place]]
        if flip[r.BUYS] < how.buys(request.scenario, liking, price)[0]:
            self._buy(how, shared, name, slot, then, float(price[0]), flip, truth)

    def _buy(
        self, how: Reactions, shared: dict[str, Any], name: str, slot: int, clicked_ms: int, price: float,
        flip: np.ndarray, truth: Truth | None,
    ) -> None:  # fmt: skip
        """A purchase to come, at the price that was seen, and perhaps its refund."""
        bought, refund = clicked_ms + how.purchase_ms(flip[r.BUY_DELAY]), None
        quantity = 2 if flip[r.QUANTITY] < how.PAIR else 1
        if flip[r.REFUNDS] < how.REFUND:
            back = bought + how.refund_ms(flip[r.REFUND_DELAY])
            refund = Refund(event_id=f"{name}-r", ts=back, quantity=quantity, **shared)
        if truth is not None:
            truth.purchase_ms[slot] = bought - clicked_ms
            truth.refund_ms[slot] = None if refund is None else refund.ts - bought
        purchase = Purchase(
            event_id=f"{name}-p", ts=bought, quantity=quantity, price=price, currency=CURRENCY, **shared
        )
        self._schedule(purchase, refund)

    def _schedule(self, event: Event, refund: Refund | None = None) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (event.ts, self._scheduled, event, refund))

    def _happen(self, step: Step) -> None:
        """The next event comes due. A purchase takes from the stock, and fails without a word if that is too small."""
        ts, _, event, refund = heapq.heappop(self._due)
        if isinstance(event, Purchase):
            sold = self._items.take(event.item, event.quantity, self._seconds(ts))
            if sold is None:
                return
            step.items.append(sold)
            if refund is not None:
                self._schedule(refund)
        elif isinstance(event, Refund):
            step.items += self._items.give_back(event.item, event.quantity)
        step.events.append(event)
