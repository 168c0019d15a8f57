"""A marketplace like the one that a log comes from: population, pages, clicks and watches drawn from a `Fitted`.

What a log does not say is as in the marketplace that is made up: latent tastes (how much they matter is set, the rates
of clicks stay those of the log), prices and stock.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace

from embedding_store.errors import UsageError
from replay.simulator.fit import Fitted, log_odds
from replay.simulator.marketplace import Marketplace, Request
from replay.simulator.models import Look, Seen, Tastes
from replay.simulator.population import DIM, Items, Users, unit
from replay.simulator.reactions import BotReactions, Reactions
from replay.simulator.sessions import Sessions, SessionShape
from replay.simulator.settings import SimulatorSettings
from streams.events import Item, Scenario

LIKING = 1.0  # weight of the latent taste in the log odds of a click: no log of single views says how much it is
MOST_UNSEEN = 30_000  # items on the shelf that were never shown: Chao's estimate, but no more than these
SOONEST_MS = 100  # no reaction comes sooner: a run steps through time so far at once
PIECES = 2000  # of a session's time in which arrivals are drawn, see Sessions
FOREVER_S = 1e12
TASTE_TURN_S = 180 * 86_400.0  # how long a taste takes to turn right round: no log of some days says
TRIES = 50  # draws for each place on a page before it is left shorter
_ITEM, _EFFECTS, _SHOWN = 3, 8, 98  # streams of randomness, see population.py


class FittedUserBase(Users):
    """As many users as the log has, with its sessions and click rates; user n is "u<n>", whoever that was."""

    def __init__(self, settings: SimulatorSettings, fitted: Fitted) -> None:
        super().__init__(settings)
        self.activity = np.cumsum(fitted.users.sessions) / max(1, sum(fitted.users.sessions))
        self.effect = log_odds(np.array(fitted.users.click_rate)) - log_odds(fitted.click_rate)


@dataclass(frozen=True)
class Plan:
    """A shelf to be furnished: the numbers of the fit's items, how many more that were never shown, and the weights of
    an item that was shown once and of one that was not."""

    known: list[int]
    unseen: int
    once_weight: float
    unseen_weight: float

    @property
    def size(self) -> int:
        return len(self.known) + self.unseen


class FittedShelf(Items):
    """The items of the log that are still on offer at its end, under their own ids, those that were never shown, and
    when a life ends a new item that is like one of the log, drawn anew; both are named "new<number>".

    `weight`: float64 [items], how often an item is shown; `effect`: its log odds of a click against the average, drawn
    from what its views leave open (the posterior), so that new items are as different from each other as old ones.
    """

    def __init__(
        self, settings: SimulatorSettings, fitted: Fitted, centres: np.ndarray, start_ms: int, turnover: bool = True
    ) -> None:
        self._fit, self._mean = fitted.items, log_odds(fitted.click_rate)
        shown = np.array(fitted.items.views)
        self._often, self._once = np.flatnonzero(shown > 1), np.flatnonzero(shown == 1)
        self._plan = self.plan(fitted, turnover)
        often = np.array(fitted.items.views_per_s) if turnover else shown
        self._rate = np.where(shown > 1, often, self._plan.once_weight)
        ends = turnover and fitted.items.deaths_per_s > 0
        self._life_s = 1.0 / fitted.items.deaths_per_s if ends else FOREVER_S
        self.weight, self.effect = np.zeros(settings.items), np.zeros(settings.items)
        self._summed: np.ndarray | None = None
        self._prefix = "new"
        while any(str(item).startswith(self._prefix) for item in fitted.items.ids):
            self._prefix += "-new"  # an id of the log stays that item's own
        super().__init__(settings, centres, start_ms)

    @staticmethod
    def plan(fitted: Fitted, turnover: bool = True) -> Plan:
        """What is on the shelf at the start.

        Of H items that were shown more than once in a time T, with a hazard d, H / (1 + d T) are on offer at a time:
        those that were seen last; without turnover all are, for good. What was never shown has the share of the views
        that Good and Turing give it, and so has, each by itself, what was shown once.
        """
        items, span_s = fitted.items, (fitted.to_ms - fitted.from_ms) / 1000
        shown = np.array(items.views)
        often, once, twice = np.flatnonzero(shown > 1), np.flatnonzero(shown == 1), int((shown == 2).sum())
        hazard = items.deaths_per_s if turnover else 0.0
        recent = often[np.argsort(np.array(items.unseen_s)[often], kind="stable")]
        recent = recent[: max(1, round(len(often) / (1 + hazard * span_s)))]
        unseen = min(MOST_UNSEEN, round(items.unseen)) if len(often) else 0
        again = min(1.0, 2 * (twice + 1) / max(1, len(once))) if unseen else 1.0  # views to come of what was shown once
        new = len(once) if unseen else 0  # views to come of what was not
        scale = 1.0
        if len(often):
            of_often = float(np.array(items.views_per_s if turnover else shown)[recent].sum())
            scale = of_often / max(1.0, fitted.views - new - again * len(once))
        return Plan([*recent.tolist(), *once.tolist()], unseen, scale * again, scale * new / max(1, unseen))

    def pick(self, coin: float) -> str | int:
        """An item in stock, by weight; a coin in, none flipped."""
        if self._summed is None:
            self._summed = np.cumsum(np.where(self.stock > 0, self.weight, 0.0))
        place = int(np.searchsorted(self._summed, coin * self._summed[-1], "right"))
        return self.records[min(place, len(self.records) - 1)].item

    def _restock(self, place: int, stock: int) -> Item:
        self._summed = None
        return super()._restock(place, stock)

    def _make(self, place: int, at: float, aged: bool = False) -> Item:
        number, items, known = self._next, self._fit, len(self._plan.known)
        self._next, self._summed = number + 1, None
        rng = np.random.default_rng([self._settings.seed, _ITEM, number])
        rare = place >= known - len(self._once)  # a place keeps its kind
        name: str | int
        if aged and number < known:
            like = self._plan.known[number]
            name = items.ids[like]
        else:
            like = int(rng.choice(self._once if rare and len(self._once) else self._often))
            name = f"{self._prefix}{number}"
        a, b = items.prior
        rate = rng.beta(a + items.clicks[like], b + items.views[like] - items.clicks[like])
        self.effect[place] = log_odds(float(np.clip(rate, 1e-6, 1 - 1e-6))) - self._mean
        self.weight[place] = self._rate[like] if place < known else self._plan.unseen_weight
        category = int(rng.integers(self._settings.categories))
        self.category[place], self.number[place] = category, number
        self.vector[place] = unit(self._centres[category] + rng.normal(size=DIM) * 0.35 / np.sqrt(DIM) * 2)
        self.price[place] = self._full_price[place] = round(float(rng.lognormal(3.0, 0.7)), 2)
        self.length_ms[place] = items.duration_ms[like]
        life = float(rng.exponential(self._life_s))
        self.born[place], self.dies[place] = at, at + life
        heapq.heappush(self._deaths, (at + life, place))
        self.place[name] = place
        self.stock[place], self.back[place] = int(rng.integers(5, 200)), -1.0
        return Item(
            item=name, category=f"c{category}", price=float(self.price[place]), stock=int(self.stock[place]),
            created=max(0, self._start_ms + int(at * 1000)),
        )  # fmt: skip


class FittedTastes(Tastes):
    """Log odds of a click: scenario, position, user and item as fitted, and a latent taste of weight `LIKING`.

    The scenarios' bases are chosen so that the log's click rates come out when items are shown as in the log.
    """

    SAMPLES = 20_000

    def __init__(
        self, settings: SimulatorSettings, fitted: Fitted, users: FittedUserBase, items: FittedShelf, seen: Seen
    ) -> None:
        super().__init__(settings, users, items, seen)
        self._fitted, self._effects, self._shelf = fitted, users.effect, items
        self._odds = {name: np.array(scenario.position_odds) for name, scenario in fitted.scenarios.items()}
        self._base: dict[str, float] = dict.fromkeys(fitted.scenarios, 0.0)
        rng = np.random.default_rng([settings.seed, _EFFECTS])
        for name, scenario in fitted.scenarios.items():
            self._base[name] = self._solve(rng, name, scenario.click_rate)

    def alone(self, look: Look) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-self._logits(look)))

    def _logits(self, look: Look) -> np.ndarray:
        odds = self._odds[look.scenario]
        logits = self._base[look.scenario] + odds[np.minimum(look.positions, len(odds) - 1)]
        logits += self._effects[look.user] + self._shelf.effect[look.places]
        return logits + LIKING * self.liking(look.user, look.places, look.seconds)

    def _solve(self, rng: np.random.Generator, scenario: Scenario, rate: float) -> float:
        """The base with which views as in the log have the mean click probability `rate`."""
        pages = self._fitted.scenarios[scenario].pages
        share = np.array([len(page) * share for page, share in pages])
        positions = np.concatenate([np.asarray(page) for page, _ in pages])
        per_position = np.repeat(share / [len(page) for page, _ in pages], [len(page) for page, _ in pages])
        n = self.SAMPLES
        at = rng.choice(positions, n, p=per_position / per_position.sum())
        place = rng.choice(len(self._shelf.weight), n, p=self._shelf.weight / self._shelf.weight.sum())
        user = np.minimum(np.searchsorted(self._users.activity, rng.random(n)), len(self._effects) - 1)
        seconds = rng.random(n) * (self._fitted.to_ms - self._fitted.from_ms) / 1000
        logits = np.array([
            self._logits(Look(u, place[[k]], at[[k]], seconds[k], scenario))[0] for k, u in enumerate(user.tolist())
        ])  # fmt: skip
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 / (1 + np.exp(-middle - logits))).mean() < rate else (low, middle)
        return (low + high) / 2


class FittedReactions(Reactions):
    """Delays, rates and watch times as fitted. Refunds are as in the world that is made up."""

    def __init__(self, settings: SimulatorSettings, fitted: Fitted) -> None:
        super().__init__(settings)
        self._fit, self._watch = fitted.actions, fitted.watch
        self.CART, self.FAVOURITE = fitted.actions.cart_rate, fitted.actions.favourite_rate

    def click_ms(self, coin: float) -> int:
        return max(SOONEST_MS, round(_at(self._fit.click_ms, coin)))

    def plays(self, scenario: Scenario, clicked: np.ndarray, coins: np.ndarray) -> np.ndarray:
        if self._watch is None:
            return np.zeros(len(clicked), bool)
        return coins < np.where(clicked, self._watch.plays[1], self._watch.plays[0])

    def play_ms(self, length_ms: int, liking: float, clicked: bool, coin: float) -> int:
        watch = self._watch
        assert watch is not None
        bucket = max(1, int(np.searchsorted(watch.edges, length_ms, "right"))) if length_ms else 0
        table = watch.quantiles[int(clicked)][min(bucket, len(watch.edges))]
        return round(_at(table, coin) * (length_ms or 1))

    def buys(self, scenario: Scenario, liking: np.ndarray, price: np.ndarray) -> np.ndarray:
        return np.full(len(liking), self._fit.purchase_rate)

    def purchase_ms(self, coin: float) -> int:
        return max(SOONEST_MS, round(_at(self._fit.purchase_ms, coin)))


class FittedMarketplace(Marketplace):
    """A marketplace driven by a `Fitted`. Of the settings, `seed`, `categories`, `bots`, `promotions`, `restock_s` and
    `time_scale` count; how many users and items there are, and when they come, follows from the fit.

    With `turnover` the world goes on from the end of the log: items end their lives and new ones are born. Without it
    all items of the log are on offer all the time: what it can be compared with is of the time that was fitted."""

    def __init__(
        self, fitted: Fitted, settings: SimulatorSettings | None = None, *, turnover: bool = True,
        keep_truth: bool = False,
    ) -> None:  # fmt: skip
        settings = settings or SimulatorSettings()
        if settings.user_model != "taste":
            raise UsageError('only the model "taste" can be fitted to a log: leave user_model at that')
        self.fitted, self._turnover = fitted, turnover
        own: dict[str, Any] = {
            "users": len(fitted.users.sessions), "items": FittedShelf.plan(fitted, turnover).size,
            "requests_per_s": fitted.requests_per_s, "item_life_s": FOREVER_S, "taste_turn_s": TASTE_TURN_S,
        }  # fmt: skip
        super().__init__(replace(settings, **own), keep_truth=keep_truth)
        self._users: FittedUserBase = FittedUserBase(self.settings, fitted)
        self._pages = {
            name: (np.cumsum([share for _, share in scenario.pages]), [tuple(page) for page, _ in scenario.pages])
            for name, scenario in fitted.scenarios.items()
        }

    def pick(self, coin: float) -> str | int:
        """An item in stock, as often as the log showed it; a coin in, none flipped."""
        return self._shelf.pick(coin)

    def _furnish(self) -> None:
        self._items = self._shelf = FittedShelf(
            self.settings, self.fitted, self._users.centres, self.start_ms, self._turnover
        )
        lengths, gaps = self.fitted.session_lengths, self.fitted.session_gaps_s
        span_s = max(1.0, (self.fitted.to_ms - self.fitted.from_ms) / 1000)
        self._sessions = Sessions(
            self.settings.seed, self._users.activity, self._users.bot, self.fitted.requests_per_s,
            SessionShape(tuple(lengths), tuple(gaps)), piece_s=max(1.0, span_s / PIECES),
        )  # fmt: skip
        self._model = FittedTastes(self.settings, self.fitted, self._users, self._shelf, self._seen)
        self._reactions, self._bots = FittedReactions(self.settings, self.fitted), BotReactions(self.settings)

    def _wish(self, number: int, user: int, scenario_coin: float, query_coin: float, ts: int) -> Request:
        names = list(self.fitted.scenarios)
        shares = np.cumsum([scenario.share for scenario in self.fitted.scenarios.values()])
        scenario = names[min(int(np.searchsorted(shares, scenario_coin * shares[-1])), len(names) - 1)]
        summed, pages = self._pages[scenario]
        page = pages[min(int(np.searchsorted(summed, query_coin * summed[-1])), len(pages) - 1)]
        name = f"sim{self.settings.seed}-{self.start_ms}-{number}"
        return Request(number, f"u{user}", scenario, ts, len(page), name, positions=page)


def as_logged(world: Marketplace, request: Request) -> tuple[list[str | int], list[float] | None]:
    """A policy: items as often as the log showed them, whoever comes, and none twice on a page."""
    if not isinstance(world, FittedMarketplace):
        raise UsageError("the policy as-logged shows what a log showed: name one with --like")
    rng = np.random.default_rng([world.settings.seed, _SHOWN, request.number])
    page: dict[str | int, None] = {}
    for coin in rng.random(TRIES * request.k).tolist():
        page[world.pick(coin)] = None
        if len(page) == request.k:
            break
    return list(page), None


def _at(table: list[float], coin: float) -> float:
    """The quantile at `coin` of a table of equally spaced ones."""
    place = coin * (len(table) - 1)
    low = min(math.floor(place), len(table) - 1)
    high = min(low + 1, len(table) - 1)
    return table[low] + (table[high] - table[low]) * (place - low)
