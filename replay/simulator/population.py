"""Users and items of the simulated marketplace: all of it follows from the seed and the time alone, but the stock."""

from __future__ import annotations

import heapq

import msgspec
import numpy as np

from replay.simulator.settings import SimulatorSettings
from streams.events import Item

DIM = 8
NOUNS = (
    "teapot", "lamp", "jacket", "bicycle", "headphones", "puzzle", "notebook", "backpack", "plant", "blanket",
    "camera", "sneakers",
)  # fmt: skip
ADJECTIVES = ("red", "blue", "green", "small", "folding", "vintage", "quiet", "light", "warm", "bright", "soft")
REDUCED = 0.8  # of the price, while an item is reduced
PROMOTIONS_A_LIFE = 4  # how often, in an item's life, it is decided anew what is reduced

# What the numbers of a stream of randomness are for: each has a generator of its own (4: sessions.py).
_CENTRES, _USERS, _ITEM, _BOTS, _PROMOTION = 1, 2, 3, 5, 6


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Users:
    """Latent tastes float64 [users, DIM]: near one or two categories' centres, turning slowly and steadily.

    `activity`: float64 [users], shares of the sessions, summed up; `bot`: bool [users].
    """

    def __init__(self, settings: SimulatorSettings) -> None:
        rng = np.random.default_rng([settings.seed, _USERS])
        n = settings.users
        self.centres = unit(np.random.default_rng([settings.seed, _CENTRES]).normal(size=(settings.categories, DIM)))
        share = 1.0 / np.arange(1, settings.categories + 1) ** 0.6  # some categories have more friends than others
        share /= share.sum()
        first, second, third = (rng.choice(settings.categories, n, p=share) for _ in range(3))
        self.mix = rng.uniform(0.0, 0.5, (n, 1))
        noise = rng.normal(size=(2, n, DIM)) * 0.25 / np.sqrt(DIM) * 2
        self._now = unit(self.centres[first] + self.mix * self.centres[second] + noise[0])
        self._then = unit(self.centres[third] + noise[1])
        self._turn = rng.choice([-1.0, 1.0], n) * rng.uniform(0.5, 1.5, n) * 2 * np.pi / settings.taste_turn_s
        activity = rng.lognormal(0.0, 1.0, n)
        self.activity = np.cumsum(activity / activity.sum())
        # The part of `_then` that `_now` has not: so that a turn keeps the length.
        self._then = unit(self._then - (self._then * self._now).sum(1, keepdims=True) * self._now)
        self.bot = np.random.default_rng([settings.seed, _BOTS]).random(n) < settings.bots

    def taste(self, user: int, seconds: float) -> np.ndarray:
        """float64 [DIM], of length 1, `seconds` after the start."""
        angle = self._turn[user] * seconds
        return np.cos(angle) * self._now[user] + np.sin(angle) * self._then[user]


class Items:
    """The shelf: a fixed number of places; when an item's life ends, a new one takes its place.

    Arrays are by place: `vector` [items, DIM], `category`, `quality`, `price` (what is asked now), `reduced`, `stock`,
    `length_ms` (of its video), `born` and `dies` (seconds since the start; born may be negative), `back` (when what is
    sold out comes back, else -1), `number` (of the item: its id is "i<number>").
    """

    def __init__(self, settings: SimulatorSettings, centres: np.ndarray, start_ms: int) -> None:
        n = settings.items
        self._settings, self._centres, self._start_ms = settings, centres, start_ms
        self.vector = np.zeros((n, DIM))
        self.category, self.number, self.stock = (np.zeros(n, np.int64) for _ in range(3))
        self.quality, self.price, self.born, self.dies, self.length_ms = (np.zeros(n) for _ in range(5))
        self.reduced, self.back = np.zeros(n, bool), np.full(n, -1.0)
        self.records: list[Item] = []
        self.place: dict[str | int, int] = {}
        self._full_price = np.zeros(n)
        self._next = self._window = 0
        self._deaths: list[tuple[float, int]] = []
        self._returns: list[tuple[float, int, str | int]] = []
        for place in range(n):
            self.records.append(self._make(place, 0.0, aged=True))
        self._promote(0)

    def on_offer(self) -> list[Item]:
        """The records of what can be had now."""
        if self._returns:
            return [record for record in self.records if record.stock]
        return list(self.records)

    def available(self, item: str | int) -> int | None:
        """The place of an item that is on offer and in stock, else None."""
        place = self.place.get(item)
        return place if place is not None and self.stock[place] > 0 else None

    def advance(self, seconds: float) -> list[Item]:
        """Ends the lives that are over at `seconds`, brings back what was sold out, reduces and restores prices:
        the records that have changed, by time; of a life that ended the old item with stock 0 and the new one."""
        changes: list[Item] = []
        length = self._settings.item_life_s / PROMOTIONS_A_LIFE
        while True:
            death, back = self._deaths[0][0], self._returns[0][0] if self._returns else np.inf
            window = (self._window + 1) * length
            if min(death, back, window) > seconds:
                return changes
            if death <= min(back, window):
                at, place = heapq.heappop(self._deaths)
                gone = self.records[place]
                del self.place[gone.item]
                self.records[place] = self._make(place, at)
                self._price(place)
                changes += (msgspec.structs.replace(gone, stock=0), self.records[place])
            elif back <= window:
                _, place, item = heapq.heappop(self._returns)
                if self.place.get(item) == place:  # it has not ended its life meanwhile
                    self.back[place] = -1.0
                    changes.append(self._restock(place, 100))
            else:
                changes += self._promote(self._window + 1)

    def take(self, item: str | int, quantity: int, seconds: float) -> Item | None:
        """Sells `quantity` of an item: its record after that, or None if there are not so many or it is gone."""
        place = self.place.get(item)
        if place is None or self.stock[place] < quantity:
            return None
        left = int(self.stock[place]) - quantity
        if not left:
            self.back[place] = seconds + self._settings.restock_s
            heapq.heappush(self._returns, (float(self.back[place]), place, item))
        return self._restock(place, left)

    def give_back(self, item: str | int, quantity: int) -> list[Item]:
        """What was refunded is in stock again, unless the item is gone or waits to be restocked: what has changed."""
        place = self.place.get(item)
        if place is None or not self.stock[place]:
            return []
        return [self._restock(place, int(self.stock[place]) + quantity)]

    def fade(self, places: np.ndarray, seconds: float) -> np.ndarray:
        """How far items are through their lives, 0 to 1 (float64, as `places`)."""
        return np.clip((seconds - self.born[places]) / (self.dies[places] - self.born[places]), 0.0, 1.0)

    def _restock(self, place: int, stock: int) -> Item:
        self.stock[place] = stock
        self.records[place] = msgspec.structs.replace(self.records[place], stock=stock)
        return self.records[place]

    def _promote(self, window: int) -> list[Item]:
        """Decides what is reduced in a window of time: the records whose price has changed."""
        self._window = window
        rng = np.random.default_rng([self._settings.seed, _PROMOTION, window])
        before, self.reduced = self.reduced, rng.random(len(self.reduced)) < self._settings.promotions
        return [self._price(place) for place in np.flatnonzero(before != self.reduced).tolist()]

    def _price(self, place: int) -> Item:
        self.price[place] = round(float(self._full_price[place]) * (REDUCED if self.reduced[place] else 1.0), 2)
        if self.records[place].price != self.price[place]:
            self.records[place] = msgspec.structs.replace(self.records[place], price=float(self.price[place]))
        return self.records[place]

    def _make(self, place: int, at: float, aged: bool = False) -> Item:
        number = self._next
        self._next += 1
        rng = np.random.default_rng([self._settings.seed, _ITEM, number])
        life = self._settings.item_life_s * rng.uniform(0.5, 1.5)
        born = at - life * rng.uniform(0.0, 0.95) if aged else at
        category = int(rng.integers(self._settings.categories))
        self.category[place], self.number[place] = category, number
        self.vector[place] = unit(self._centres[category] + rng.normal(size=DIM) * 0.35 / np.sqrt(DIM) * 2)
        self.quality[place] = rng.normal() * 0.7
        self.price[place] = self._full_price[place] = round(float(rng.lognormal(3.0, 0.7)), 2)
        self.length_ms[place] = round(float(np.clip(rng.lognormal(9.1, 0.6), 3000, 60_000)))
        self.born[place], self.dies[place] = born, born + life
        heapq.heappush(self._deaths, (born + life, place))
        noun = NOUNS[category] if category < len(NOUNS) else f"thing {category}"
        item = Item(
            item=f"i{number}", title=f"{ADJECTIVES[rng.integers(len(ADJECTIVES))].capitalize()} {noun} {number}",
            lang="en", category=f"c{category}", price=float(self.price[place]), stock=int(rng.integers(5, 200)),
            seller=f"s{rng.integers(max(2, self._settings.items // 12))}",
            created=max(0, self._start_ms + int(born * 1000)),
        )  # fmt: skip
        self.place[item.item] = place
        self.stock[place], self.back[place] = item.stock or 0, -1.0
        return item
