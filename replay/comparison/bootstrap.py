"""Intervals of figures and of their differences between two systems: users are drawn again, with replacement.

One user's scores hang together, so it is users that are drawn (the cluster bootstrap), the same for all systems: the
difference is paired. A draw is a row of counts, and all figures of a draw are sums over users weighed by them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from replay.comparison.metrics import log_loss

DRAWS = 500
BINS = 1024  # classes of equal size that scores are put into for the AUC of a draw
MOST = 0.9  # of the draws must have a figure
_CHUNK = 4096  # users at a time


@dataclass
class Drawn:
    """The figures of each draw, float64 [draws], nan where a draw has but one label; None: the system has none."""

    auc: np.ndarray
    ne: np.ndarray | None
    calibration: np.ndarray | None
    ndcg_at_10: np.ndarray | None


class Users:
    """Draws of users: the same ones for every system."""

    def __init__(self, user: np.ndarray, seed: int, draws: int = DRAWS) -> None:
        """user: int64 [n], whose each score is."""
        self.ids, self.of_score = np.unique(user, return_inverse=True)
        n = len(self.ids)
        dice = np.random.default_rng([seed, n])
        every = [np.bincount(dice.integers(n, size=n), minlength=n) for _ in range(draws if n else 0)]
        self.weight = np.array(every, np.float32).reshape(len(every), n)  # how often a draw has each user

    def draw(
        self,
        score: np.ndarray,
        label: np.ndarray,
        probabilistic: bool,
        position_user: np.ndarray,
        ndcg: np.ndarray,
    ) -> Drawn:
        """score, label [n]: as `user`. position_user int64 [m], ndcg [m]: of the ranked positions."""
        found = Drawn(self._auc(score, label), None, None, None)
        if probabilistic:
            positives, n = self._sum(label), self._sum(np.ones(len(label)))
            base = np.where((positives > 0) & (positives < n), positives, np.nan) / n
            entropy = -base * np.log(base) - (1 - base) * np.log1p(-base)
            found.ne = self._sum(log_loss(score, label)) / n / entropy
            found.calibration = _ratio(self._sum(score), positives)
        if len(ndcg):
            of = np.searchsorted(self.ids, position_user)
            total, count = (np.bincount(of, w, len(self.ids)) for w in (ndcg, np.ones(len(ndcg))))
            found.ndcg_at_10 = _ratio(self.weight @ total, self.weight @ count)
        return found

    def calibration(self, score: np.ndarray, label: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Predicted over actual of each draw, of the scores at the mask `at` [n]."""
        return _ratio(self._sum(score * at), self._sum(label * at))

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of values [n] in each draw."""
        return self.weight @ np.bincount(self.of_score, values, len(self.ids))

    def _auc(self, score: np.ndarray, label: np.ndarray) -> np.ndarray:
        """The AUC of each draw, of scores put into BINS classes of equal size; equal scores share one."""
        _, at, count = np.unique(score, return_inverse=True, return_counts=True)
        edge = np.cumsum(count) - count  # the scores below
        bin_of = (edge * BINS // len(score))[at]
        histogram = np.zeros((2, len(self.weight), BINS))
        order = np.argsort(self.of_score, kind="stable")
        ends = np.searchsorted(self.of_score[order], np.arange(0, len(self.ids) + _CHUNK, _CHUNK))
        for number, (start, stop) in enumerate(itertools.pairwise(ends)):
            mine, first = order[start:stop], number * _CHUNK
            users = min(_CHUNK, len(self.ids) - first)
            for kind in (0, 1):
                own = mine[label[mine] == kind]
                cell = (self.of_score[own] - first) * BINS + bin_of[own]
                counts = np.bincount(cell, minlength=users * BINS).reshape(users, BINS).astype(np.float32)
                histogram[kind] += self.weight[:, first : first + users] @ counts
        negative, positive = histogram
        below = np.cumsum(negative, 1) - negative / 2
        return _ratio((positive * below).sum(1), positive.sum(1) * negative.sum(1))


def interval(values: np.ndarray | None) -> tuple[float, float] | None:
    """The middle 95 % of the draws; None where most of them have none."""
    if values is None or not len(values):
        return None
    there = np.isfinite(values)
    if there.mean() < MOST:
        return None
    low, high = np.quantile(values[there], [0.025, 0.975])
    return float(low), float(high)


def difference(one: np.ndarray | None, other: np.ndarray | None) -> tuple[float, float] | None:
    """The interval of `one` − `other` of the same draws; None where either has none."""
    return None if one is None or other is None else interval(one - other)


def _ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """one / other, nan where `other` is 0."""
    return np.divide(one, other, out=np.full(len(one), np.nan), where=other > 0)
