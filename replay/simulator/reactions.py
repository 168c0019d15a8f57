"""What users do with what they were shown, besides clicking: how long they watch, whether and when they buy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from replay.simulator.settings import SimulatorSettings
from streams.events import Scenario

# Purposes of the coins of one place on a page.
(CLICK, GOES_ON, CLICK_DELAY, PLAYS, PLAY_SHARE, CART, FAVOURITE, BUYS, BUY_DELAY, REFUNDS, REFUND_DELAY,
 QUANTITY) = range(12)  # fmt: skip
PURPOSES = 12


@dataclass(frozen=True)
class Place:
    """A place in the shop where pages are shown."""

    share: float  # of the requests
    k: int  # items on a page
    autoplay: bool  # items play by themselves: a watch comes without a click
    buys: float  # log odds of a purchase after a click, on an average item


PLACES: Mapping[Scenario, Place] = {
    "live": Place(share=0.10, k=3, autoplay=True, buys=-2.9),
    "video": Place(share=0.30, k=4, autoplay=True, buys=-3.8),
    "search": Place(share=0.20, k=10, autoplay=False, buys=-2.4),
    "shelf": Place(share=0.40, k=10, autoplay=False, buys=-2.8),
}


class Reactions:
    """Everything that follows a view, as functions of coins (uniform in (0, 1)): they flip none themselves."""

    CART, FAVOURITE, REFUND, PAIR = 0.12, 0.08, 0.06, 0.1  # chances after a click; of a refund and of two, if bought
    BOUGHT_S, BACK_S = 20 * 60, 30 * 60  # medians of the delays of purchase and refund, in the shop's time

    def __init__(self, settings: SimulatorSettings) -> None:
        self._scale = settings.time_scale

    def click_ms(self, coin: float) -> int:
        """From view to click: 200 ms to 2 s."""
        return 200 + int(1800 * coin)

    def plays(self, scenario: Scenario, clicked: np.ndarray, coins: np.ndarray) -> np.ndarray:
        """Which items of a page begin to play (`clicked` bool and `coins` [k], top first), bool [k]."""
        if not PLACES[scenario].autoplay:
            return np.zeros(len(clicked), bool)
        return clicked | (coins < np.exp(-0.4 * np.arange(len(clicked))))

    def play_ms(self, length_ms: int, liking: float, clicked: bool, coin: float) -> int:
        """How long it plays: a share of its length, the greater the more it is liked, and nothing under 300 ms."""
        return max(300, int(length_ms * coin ** (1.0 / (0.5 + 1.5 * max(0.0, liking) + 2.0 * clicked))))

    def buys(self, scenario: Scenario, liking: np.ndarray, price: np.ndarray) -> np.ndarray:
        """Probability of a purchase after a click, float64, as `liking` and `price`."""
        return 1.0 / (1.0 + np.exp(-(PLACES[scenario].buys + 1.5 * liking - 0.3 * np.log(price / 20))))

    def purchase_ms(self, coin: float) -> int:
        """From click to purchase."""
        return 2000 + self._delay_ms(self.BOUGHT_S, coin)

    def refund_ms(self, coin: float) -> int:
        """From purchase to refund."""
        return self._delay_ms(self.BACK_S, coin)

    def _delay_ms(self, median_s: float, coin: float) -> int:
        """A log-logistic delay about `median_s` of the shop's time, in ms of event time."""
        return int(median_s / self._scale * 1000 * min(math.sqrt(coin / (1 - coin)), 20.0))


class BotReactions(Reactions):
    """A bot clicks and is gone: no purchase, no more of a play than starts by itself, and its clicks are regular."""

    CART = FAVOURITE = 0.0
    CLICKS = 0.95  # probability, whatever is shown and wherever
    EVERY_MS = 120

    def play_ms(self, length_ms: int, liking: float, clicked: bool, coin: float) -> int:
        return min(300, length_ms)

    def buys(self, scenario: Scenario, liking: np.ndarray, price: np.ndarray) -> np.ndarray:
        return np.zeros(len(liking))
