"""Users, items and arrivals of the simulated marketplace: all of it follows from the seed and the time alone."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from replay.simulator.settings import SimulatorSettings
from streams.events import Item

DIM = 8
NOUNS = (
    "teapot", "lamp", "jacket", "bicycle", "headphones", "puzzle", "notebook", "backpack", "plant", "blanket",
    "camera", "sneakers",
)  # fmt: skip
ADJECTIVES = ("red", "blue", "green", "small", "folding", "vintage", "quiet", "light", "warm", "bright", "soft")

# What the numbers of a stream of randomness are for: each has a generator of its own.
_CENTRES, _USERS, _ITEM, _SECOND = 1, 2, 3, 4


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Users:
    """Latent tastes float64 [users, DIM]: near one or two categories' centres, turning slowly and steadily."""

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

    def taste(self, user: int, seconds: float) -> np.ndarray:
        """float64 [DIM], of length 1, `seconds` after the start."""
        angle = self._turn[user] * seconds
        return np.cos(angle) * self._now[user] + np.sin(angle) * self._then[user]


class Items:
    """The shelf: a fixed number of places; when an item's life ends, a new one takes its place.

    Arrays are by place: `vector` [items, DIM], `category`, `quality`, `price`, `length_ms` (of its video), `born` and
    `dies` (seconds since the start; born may be negative), `number` (of the item: its id is "i<number>").
    """

    def __init__(self, settings: SimulatorSettings, centres: np.ndarray, start_ms: int) -> None:
        n = settings.items
        self._settings, self._centres, self._start_ms = settings, centres, start_ms
        self.vector = np.zeros((n, DIM))
        self.category = np.zeros(n, np.int64)
        self.quality, self.price, self.born, self.dies, self.length_ms = (np.zeros(n) for _ in range(5))
        self.number = np.zeros(n, np.int64)
        self.records: list[Item] = []
        self.place: dict[str | int, int] = {}
        self._next = 0
        self._deaths: list[tuple[float, int]] = []
        for place in range(n):
            self.records.append(self._make(place, 0.0, aged=True))

    def advance(self, seconds: float) -> list[tuple[int, Item, Item]]:
        """Ends the lives that are over at `seconds`: (place, the old item with stock 0, the new one) each, by time."""
        changes = []
        while self._deaths[0][0] <= seconds:
            at, place = heapq.heappop(self._deaths)
            gone = self.records[place]
            del self.place[gone.item]
            sold_out = Item(item=gone.item, title=gone.title, lang=gone.lang, category=gone.category, price=gone.price,
                            stock=0, seller=gone.seller, created=gone.created)  # fmt: skip
            self.records[place] = self._make(place, at)
            changes.append((place, sold_out, self.records[place]))
        return changes

    def fade(self, places: np.ndarray, seconds: float) -> np.ndarray:
        """How far items are through their lives, 0 to 1 (float64, as `places`)."""
        return np.clip((seconds - self.born[places]) / (self.dies[places] - self.born[places]), 0.0, 1.0)

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
        self.price[place] = round(float(rng.lognormal(3.0, 0.7)), 2)
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
        return item


@dataclass
class Arrivals:
    """Requests of one second: float64 seconds since the start, ascending; user; uniform numbers for the rest."""

    at: np.ndarray  # float64 [n]
    user: np.ndarray  # int64 [n]
    coin: np.ndarray  # float64 [n, 2] which scenario, which query


class Requests:
    """Poisson arrivals; most come from somebody who was here in the last seconds (a session), the rest by activity."""

    STAYS = 0.75  # chance that a request belongs to a session that is going on
    MEMORY = 4  # seconds in which a session goes on

    def __init__(self, settings: SimulatorSettings, users: Users) -> None:
        self._settings, self._users = settings, users
        self._recent: list[np.ndarray] = []

    def second(self, second: int) -> Arrivals:
        """The arrivals in [second, second + 1). To be asked for in order, from 0 on."""
        rng = np.random.default_rng([self._settings.seed, _SECOND, second])
        n = int(rng.poisson(self._settings.requests_per_s))
        at = second + np.sort(rng.random(n))
        user = np.minimum(np.searchsorted(self._users.activity, rng.random(n)), self._settings.users - 1)
        stays, which = rng.random(n) < self.STAYS, rng.random(n)
        recent = np.concatenate(self._recent) if self._recent else user[:0]
        if len(recent):
            user = np.where(stays, recent[(which * len(recent)).astype(np.int64)], user)
        self._recent = [*self._recent[1 - self.MEMORY :], user]
        return Arrivals(at, user, rng.random((n, 2)))
