"""Which items are shown, and with which probability: place by place, a draw among the candidates that may come.

| policy | the next place goes to | propensity, given the places before |
|---|---|---|
| epsilon | with probability ε any of those who may come, alike; else the best of them | ε/m + (1 − ε)·[the best] |
| softmax | i with probability ∝ score_i^(1/temperature) (Plackett and Luce's model, without replacement) | the same |
| thompson | the largest of one draw of each score | the integral of it, see `Thompson` |

Who may come is said by `Rules` (rerank.py); of those m, of the places before, and of nothing else the draw depends, so
over all who may come the propensities of a place sum to 1, and inverse propensity weights are unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from online_model.serving.rerank import Rules

POINTS, SPREAD, TOP = 192, 4.0, 2  # of Thompson's grid; standard deviations; × the places: candidates it is fitted to
_TINY = 1e-300


@dataclass(slots=True)
class Page:
    """Who takes which place, from the first on."""

    shown: list[int]  # candidates
    propensities: list[float]  # of each in its place, given those before
    surprises: list[bool]  # whether it was not the best of those who could come


class Draw(Protocol):
    """Who of those who may come takes the next place."""

    def __call__(self, may: np.ndarray, u: float, v: float) -> tuple[int, float]:
        """may: int64 [m] ascending, candidates from the best to the worst; u, v: uniform in [0, 1), not used before.

        Returns the place in `may` that is drawn, and its propensity.
        """
        ...


def fill(k: int, n: int, rules: Rules, draw: Draw, rng: np.random.Generator) -> Page:
    """Fill min(k, n) places from candidates 0 … n − 1, the best first."""
    page = Page([], [], [])
    for u, v in rng.random((min(k, n), 2)).tolist():
        may = rules.may_come()
        at, propensity = draw(may, u, v)
        candidate = int(may[at])
        page.shown.append(candidate)
        page.propensities.append(propensity)
        page.surprises.append(at > 0)
        rules.placed(candidate)
    return page


class Epsilon:
    """The best, with a little chance for each other."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon

    def __call__(self, may: np.ndarray, u: float, v: float) -> tuple[int, float]:
        at = int(v * len(may)) if u < self._epsilon else 0
        return at, self.propensity(at, len(may))

    def propensity(self, at: int, m: int) -> float:
        """That of the candidate at `at` of the m who may come (0: the best)."""
        return min(1.0, self._epsilon / m + (1.0 - self._epsilon if at == 0 else 0.0))


class Softmax:
    """In proportion to score^(1/temperature); scores float [n], ≥ 0."""

    def __init__(self, scores: np.ndarray, temperature: float) -> None:
        self._logits = np.log(np.maximum(scores, _TINY, dtype=np.float64)) / temperature

    def __call__(self, may: np.ndarray, u: float, v: float) -> tuple[int, float]:
        logits = self._logits[may]
        return drawn(np.exp(logits - logits.max()), u)


class Thompson:
    """The largest of a draw from each score's own normal distribution, mean and sd float [n].

    P(i is the largest) = ∫ φ_i Π_{j≠i} Φ_j. Over a cell of a grid, ln of the product of all Φ rises by the sum of what
    each ln Φ_j rises, and what the product rises is shared out in these parts: exact but for how the parts change
    within a cell, and the shares of all sum to the whole. It is those probabilities that are drawn from, so they are
    the sampler's own, however coarse the grid. A place costs two products of a matrix [n, POINTS] and a vector.
    """

    def __init__(self, mean: np.ndarray, sd: np.ndarray, k: int) -> None:
        grid = _grid(mean, sd, k)
        z = torch.from_numpy((grid - mean[:, None]) / sd[:, None])
        self._log = torch.special.ndtr(z).clamp_(min=_TINY).log_().numpy()  # ln Φ, [n, points]
        self._rise = np.diff(self._log, axis=1)

    def __call__(self, may: np.ndarray, u: float, v: float) -> tuple[int, float]:
        return drawn(self.probabilities(may), u)

    def probabilities(self, may: np.ndarray) -> np.ndarray:
        """float64 [m] of those who may come, summing to about 1: less what lies off the grid."""
        there = np.zeros(len(self._log))
        there[may] = 1
        total = there @ self._log
        rise = np.diff(total)
        share = np.divide(np.diff(np.exp(total)), rise, out=np.zeros_like(rise), where=rise > 0)
        return (self._rise @ share)[may]


def drawn(weights: np.ndarray, u: float) -> tuple[int, float]:
    """One of m by its weight, float64 [m], not all 0, with u uniform in [0, 1): (which, its probability)."""
    upto = np.cumsum(weights)
    at = int(np.searchsorted(upto, u * upto[-1], side="right"))
    if at == len(weights):  # by rounding
        at = int(np.flatnonzero(weights)[-1])
    return at, float(weights[at] / upto[-1])


def _grid(mean: np.ndarray, sd: np.ndarray, k: int) -> np.ndarray:
    """Points, ascending, float64 [POINTS]: most where the scores of those lie that may win a place."""
    best = np.argsort(-(mean + 2 * sd), kind="stable")[: max(TOP * k, 32)]
    near = mean[best, None] + sd[best, None] * np.linspace(-SPREAD, SPREAD, 17)
    most = POINTS * 3 // 4
    near = np.sort(near, axis=None)
    near = near[np.linspace(0, near.size - 1, most).astype(np.int64)]
    ends = (mean - SPREAD * sd).min(), (mean + SPREAD * sd).max()
    return np.sort(np.concatenate((near, np.linspace(*ends, POINTS - most))))
