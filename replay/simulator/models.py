"""How users choose: two models that share nothing but their interface, so that a result can be tried on both.

`Tastes`: every item is judged by itself; log odds of a latent taste, quality, position, tiredness and age.
`Missions`: a user is after one thing at a time, reads the page from the top, clicks what serves and mostly stops there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from replay.simulator.population import Items, Users
from replay.simulator.settings import SimulatorSettings
from streams.events import Scenario

SEEN_KEPT = 300  # items whose views a user remembers
_NOBODY = -1  # no item has this number


class Seen:
    """How often users have seen items, by the items' numbers; of each user the newest `SEEN_KEPT`.

    A user's memory is as large from the first item on: one that grows with each page leaves the heap full of holes.
    """

    def __init__(self) -> None:
        self._of: dict[int, np.ndarray] = {}  # user → int32 [2, SEEN_KEPT]: items, the newest last, and how often each

    def add(self, user: int, numbers: np.ndarray) -> None:
        """Items that are shown together, each once, the last one as the newest."""
        kept = self._of.get(user)
        if kept is None:
            kept = self._of[user] = np.full((2, SEEN_KEPT), _NOBODY, np.int32)
        now = np.stack((numbers, self.views(user, numbers) + 1))
        others = kept[:, ~np.isin(kept[0], numbers)]
        kept[:] = np.concatenate((others, now), axis=1)[:, -SEEN_KEPT:]

    def views(self, user: int, numbers: np.ndarray) -> np.ndarray:
        """int64, as `numbers`."""
        kept = self._of.get(user)
        if kept is None:
            return np.zeros(len(numbers), np.int64)
        return (kept[0] == numbers[:, None]) @ kept[1].astype(np.int64)

    def clear(self) -> None:
        self._of.clear()


@dataclass(frozen=True)
class Look:
    """A user looks at items: `places` on the shelf and `positions` on the page (int64 [n], 0: top, ascending)."""

    user: int
    places: np.ndarray
    positions: np.ndarray
    seconds: float  # since the start
    scenario: Scenario
    query: str | None = None


class UserModel(Protocol):
    """What a marketplace asks about its users."""

    def alone(self, look: Look) -> np.ndarray:
        """Probability of a click on each item if it were the only one that could be clicked, float64 [n]."""

    def page(self, look: Look) -> np.ndarray:
        """The same for the items shown together, float64 [n]."""

    def clicks(self, look: Look, coins: np.ndarray) -> np.ndarray:
        """Which are clicked, bool [n], by `coins` float64 [2, n]; each with the probability that `page` says."""

    def liking(self, user: int, places: np.ndarray, seconds: float) -> np.ndarray:
        """How much the user likes the items once they have them before them, about -1 to 1, float64 [places]."""

    def wants(self, user: int, seconds: float) -> np.ndarray:
        """Weights of the categories that the user would search for, float64 [categories]."""


class Tastes:
    """A logistic model. See the module; `TASTE` etc. are weights in the log odds of a click."""

    TASTE, POSITION, FATIGUE, FADE, MATCH, REDUCED = 3.6, 0.45, 0.12, 0.8, 1.0, 0.2
    MOST_TIRED = 8  # views of an item after which a user is not more tired of it
    # Of an average item, on top of the page:
    BASE: ClassVar[dict[Scenario, float]] = {"live": -3.1, "video": -2.9, "search": -3.2, "shelf": -3.2}

    def __init__(self, settings: SimulatorSettings, users: Users, items: Items, seen: Seen) -> None:
        self._users, self._items, self._seen = users, items, seen

    def alone(self, look: Look) -> np.ndarray:
        shelf, places = self._items, look.places
        logits = self.BASE[look.scenario] + shelf.quality[places] - self.POSITION * np.log1p(look.positions)
        logits += self.TASTE * self.liking(look.user, places, look.seconds)
        logits += self.REDUCED * shelf.reduced[places] - self.FADE * shelf.fade(places, look.seconds) ** 2
        if look.query is not None:
            logits += self.MATCH * ((shelf.category[places] == int(look.query[1:])) - 0.25)
        logits -= self.FATIGUE * np.minimum(self._seen.views(look.user, shelf.number[places]), self.MOST_TIRED)
        return 1.0 / (1.0 + np.exp(-logits))

    def page(self, look: Look) -> np.ndarray:
        return self.alone(look)

    def clicks(self, look: Look, coins: np.ndarray) -> np.ndarray:
        return coins[0] < self.page(look)

    def liking(self, user: int, places: np.ndarray, seconds: float) -> np.ndarray:
        return self._items.vector[places] @ self._users.taste(user, seconds)

    def wants(self, user: int, seconds: float) -> np.ndarray:
        return np.exp(self.TASTE * self._users.centres @ self._users.taste(user, seconds))


@dataclass
class _Errands:
    """The missions of one user so far: `until` (seconds) and `mission` of each, and the generator of the next."""

    rng: np.random.Generator
    home: int
    until: list[float]
    mission: list[int]


class Missions:
    """Users on missions, reading from the top (the dependent click model: Guo, Liu and Wang 2009).

    A mission is a category, any price or a low one. Missions follow each other as a Markov chain: what goes with the
    last one, the user's own, or anything. An item that serves is clicked as often as not, another hardly ever; the
    reader goes on to the next item with probability `ON`, after a click with `ON` · `MORE`.
    """

    SERVES, OTHER, SEARCHED = 0.5, 0.03, 0.08  # probability of a click by a reader who has come so far
    ON, MORE = 0.93, 0.5
    SEEN_BEFORE = 0.8  # times the probability for each earlier view, down to the power of `MOST_SEEN`
    MOST_SEEN = 4
    LOW_PRICE = 25.0
    FOLLOWS, HOME = 0.4, 0.35  # chances of the next mission; else any
    STREAM = 7  # of randomness, see population.py

    def __init__(self, settings: SimulatorSettings, users: Users, items: Items, seen: Seen) -> None:
        self._settings, self._items, self._seen = settings, items, seen
        rng = np.random.default_rng([settings.seed, self.STREAM])
        self._missions = 2 * settings.categories  # category, and whether the price matters
        self._next = rng.permutation(self._missions)
        share = 1.0 / np.arange(1, self._missions + 1) ** 0.6
        self._share = np.cumsum(share[rng.permutation(self._missions)] / share.sum())
        self._mean_s = settings.taste_turn_s / 10
        self._errands: dict[int, _Errands] = {}

    def mission(self, user: int, seconds: float) -> int:
        """What the user is after at a time: 2 · category + (1 if it must be cheap)."""
        errands = self._errands.get(user)
        if errands is None:
            rng = np.random.default_rng([self._settings.seed, self.STREAM, user])
            home = self._any(rng)
            errands = self._errands[user] = _Errands(rng, home, [float(rng.exponential(self._mean_s))], [home])
        while errands.until[-1] <= seconds:
            which, last = errands.rng.random(), errands.mission[-1]
            anything = self._any(errands.rng)
            follows = int(self._next[last])
            errands.mission.append(
                follows if which < self.FOLLOWS else errands.home if which < self.FOLLOWS + self.HOME else anything
            )
            errands.until.append(errands.until[-1] + float(errands.rng.exponential(self._mean_s)))
        return errands.mission[int(np.searchsorted(errands.until, seconds, "right"))]

    def alone(self, look: Look) -> np.ndarray:
        return self._appeal(look) * self.ON ** look.positions.astype(np.float64)

    def page(self, look: Look) -> np.ndarray:
        appeal, chance, reaches, last = self._appeal(look), np.zeros(len(look.places)), 1.0, 0
        for n, position in enumerate(look.positions.tolist()):
            reaches *= self.ON ** (position - last)
            chance[n], last = reaches * appeal[n], position
            reaches *= 1.0 - appeal[n] + appeal[n] * self.MORE
        return chance

    def clicks(self, look: Look, coins: np.ndarray) -> np.ndarray:
        appeal, clicked, last, goes_on = self._appeal(look), np.zeros(len(look.places), bool), 0, 1.0
        for n, position in enumerate(look.positions.tolist()):
            # The coin for reading on from the item before: with the gap that the positions leave.
            if coins[1, n] >= goes_on * self.ON ** (position - last):
                break
            clicked[n], last = coins[0, n] < appeal[n], position
            goes_on = self.MORE if clicked[n] else 1.0
        return clicked

    def liking(self, user: int, places: np.ndarray, seconds: float) -> np.ndarray:
        return np.where(self._serves(user, places, seconds), 0.8, -0.2)

    def wants(self, user: int, seconds: float) -> np.ndarray:
        wants = np.full(self._settings.categories, 0.01)
        wants[self.mission(user, seconds) // 2] = 1.0
        return wants

    def _any(self, rng: np.random.Generator) -> int:
        return min(int(np.searchsorted(self._share, rng.random())), self._missions - 1)

    def _serves(self, user: int, places: np.ndarray, seconds: float) -> np.ndarray:
        category, cheap = divmod(self.mission(user, seconds), 2)
        shelf = self._items
        return (shelf.category[places] == category) & ((shelf.price[places] <= self.LOW_PRICE) | (not cheap))

    def _appeal(self, look: Look) -> np.ndarray:
        shelf, places = self._items, look.places
        appeal = np.where(self._serves(look.user, places, look.seconds), self.SERVES, self.OTHER)
        if look.query is not None:
            appeal = np.maximum(appeal, np.where(shelf.category[places] == int(look.query[1:]), self.SEARCHED, 0.0))
        seen = np.minimum(self._seen.views(look.user, shelf.number[places]), self.MOST_SEEN)
        return np.minimum(appeal * np.exp(0.4 * shelf.quality[places]), 0.95) * self.SEEN_BEFORE**seen


MODELS: dict[str, type[Tastes] | type[Missions]] = {"taste": Tastes, "mission": Missions}
