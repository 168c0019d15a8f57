"""When users come: sessions that start, go on for a number of requests with gaps between them, and end."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

_SESSIONS = 4  # what this stream of randomness is for, see population.py
LENGTHS = (1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0, 5.0, 7.0)  # requests of a session, each as likely: 3 on average
GAPS_S = (0.3, 0.7, 1.0, 1.3, 1.7, 2.2, 2.8, 3.6, 4.8, 7.0, 12.0)  # between its requests: quantiles 0, 0.1, … 1
BOT_LENGTH, BOT_GAP_S = 15, 0.5  # a bot goes on for long and as regularly as a clock
MOST_WARM_UP = 500  # pieces of time before the start in which sessions may have begun that still go on


@dataclass(frozen=True)
class SessionShape:
    """How many requests a session has (values as likely as each other) and the gaps between them (quantiles, s)."""

    lengths: tuple[float, ...] = LENGTHS
    gaps_s: tuple[float, ...] = GAPS_S


@dataclass
class Arrivals:
    """Requests of one piece of time: float64 seconds since the start, ascending; user; uniform numbers for the rest."""

    at: np.ndarray  # float64 [n]
    user: np.ndarray  # int64 [n]
    coin: np.ndarray  # float64 [n, 2] which scenario, which query


class Sessions:
    """Sessions start as a Poisson process, users come by their activity. Piece by piece of `piece_s` seconds, each
    with a generator of its own: what comes does not depend on when it is asked for, only on the seed."""

    def __init__(
        self, seed: int, activity: np.ndarray, bot: np.ndarray, requests_per_s: float,
        shape: SessionShape | None = None, piece_s: float = 1.0,
    ) -> None:  # fmt: skip
        """`activity`: float64 [users], the users' shares of the sessions, summed up; `bot`: bool [users]."""
        self.piece_s = piece_s
        self._seed, self._activity, self._bot, self._shape = seed, activity, bot, shape or SessionShape()
        bots = float(np.diff(activity, prepend=0.0)[bot].sum())  # their share of the sessions
        mean = (1 - bots) * float(np.mean(self._shape.lengths)) + bots * BOT_LENGTH
        self._starts = requests_per_s * piece_s / mean  # sessions that start in a piece
        self._going: list[tuple[float, int, int, float, float]] = []  # requests to come: at, number, user, coins
        self._number = 0
        longest = max(max(self._shape.lengths) * float(np.mean(self._shape.gaps_s)), BOT_LENGTH * BOT_GAP_S)
        for piece in range(-min(MOST_WARM_UP, math.ceil(longest / piece_s)), 0):
            self._start(piece)
        self._going = [request for request in self._going if request[0] >= 0]
        heapq.heapify(self._going)

    def piece(self, piece: int) -> Arrivals:
        """The arrivals in [piece, piece + 1) · piece_s. To be asked for in order, from 0 on."""
        self._start(piece)
        end, found = (piece + 1) * self.piece_s, []
        while self._going and self._going[0][0] < end:
            found.append(heapq.heappop(self._going))
        table = np.array(found).reshape(-1, 5)
        return Arrivals(table[:, 0], table[:, 2].astype(np.int64), table[:, 3:])

    def _start(self, piece: int) -> None:
        """The sessions that begin in a piece, with all their requests."""
        rng = np.random.default_rng([self._seed, _SESSIONS, piece + MOST_WARM_UP])
        n = int(rng.poisson(self._starts))
        begin = (piece + rng.random(n)) * self.piece_s
        user = np.minimum(np.searchsorted(self._activity, rng.random(n)), len(self._activity) - 1)
        lengths = np.array(self._shape.lengths)[(rng.random(n) * len(self._shape.lengths)).astype(np.int64)]
        length = np.where(self._bot[user], BOT_LENGTH, lengths).astype(np.int64)
        total = int(length.sum())
        gaps = np.interp(rng.random(total), np.linspace(0, 1, len(self._shape.gaps_s)), self._shape.gaps_s)
        gaps[np.repeat(self._bot[user], length)] = BOT_GAP_S
        first = np.cumsum(length) - length  # where each session begins in `gaps`
        gaps[first] = 0.0
        passed = np.cumsum(gaps)
        at = np.repeat(begin - passed[first], length) + passed if n else passed
        coins = rng.random((total, 2))
        columns = (at.tolist(), np.repeat(user, length).tolist(), coins[:, 0].tolist(), coins[:, 1].tolist())
        for when, who, scenario, query in zip(*columns, strict=True):
            heapq.heappush(self._going, (when, self._number, who, scenario, query))
            self._number += 1
