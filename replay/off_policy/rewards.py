"""The model of rewards that DM and DR lean on: additive effects of what is known of a decision, fitted by Newton steps.

For rewards of 0 and 1 the effects add up in the logit, else in the reward itself. Levels with few decisions are drawn
to 0 (ridge), which is what keeps a rare click from making an item look sure. It is cross-fitted: the model that
speaks of a cluster never saw it (Chernozhukov et al., Double/debiased machine learning, Econometrics Journal 21,
2018, section 3), so its errors do not follow the rewards that it is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FOLDS = 5
ROUNDS = 15  # over all columns; one more changes the sixth digit
RIDGE = 4.0  # binary: a prior sd of 0.5 in the logit; else so many decisions of the mean


@dataclass(frozen=True)
class Levels:
    """One thing that is known of a decision: level int64 [n], each < size."""

    level: np.ndarray
    size: int


class AdditiveModel:
    """q̂: a base and an effect for each level of each column."""

    def __init__(self, columns: Sequence[Levels], reward: np.ndarray, rows: np.ndarray, binary: bool) -> None:
        """Fitted to the decisions at `rows`, bool [n], of columns and reward, float64 [n]."""
        self.binary = binary
        y = reward[rows]
        mean = float(y.mean()) if len(y) else 0.0
        if binary:
            mean = (y.sum() + 0.5) / (len(y) + 1)
        self.base = float(np.log(mean / (1 - mean))) if binary else mean
        self.effects = [np.zeros(column.size) for column in columns]
        levels = [column.level[rows] for column in columns]
        score = np.full(len(y), self.base)
        for _ in range(ROUNDS):
            for effect, level in zip(self.effects, levels, strict=True):
                p = self.of_score(score)
                curve = p * (1 - p) if binary else np.ones(len(y))
                slope = np.bincount(level, y - p, len(effect)) - RIDGE * effect
                step = slope / (np.bincount(level, curve, len(effect)) + RIDGE)
                effect += step
                score += step[level]

    def of_score(self, score: np.ndarray) -> np.ndarray:
        """The expected reward at a sum of effects."""
        return 1 / (1 + np.exp(-score)) if self.binary else score


class CrossFitted:
    """One model for each fold of clusters. The first column is the action: its levels are what a policy chooses
    from."""

    def __init__(self, columns: Sequence[Levels], reward: np.ndarray, cluster: np.ndarray, binary: bool) -> None:
        self._columns = columns
        _, of = np.unique(cluster, return_inverse=True)
        order = np.random.default_rng(0).permutation(of.max(initial=0) + 1)  # clusters are numbered by time or name
        self.fold = order[of] % FOLDS
        self._models = [AdditiveModel(columns, reward, self.fold != k, binary) for k in range(FOLDS)]
        self._base = np.array([model.base for model in self._models])
        self._effects = [
            np.stack(parts) for parts in zip(*(m.effects for m in self._models), strict=True)
        ]  # [folds, size]

    def of_all(self, rows: slice) -> np.ndarray:
        """q̂(x, a) for every action, float64 [m, actions], of the decisions at `rows`."""
        return self._models[0].of_score(self._context(rows)[:, None] + self._effects[0][self.fold[rows]])

    def of_logged(self) -> np.ndarray:
        """q̂(x, a) of the logged actions, float64 [n]."""
        every = slice(None)
        return self._models[0].of_score(self._context(every) + self._effects[0][self.fold, self._columns[0].level])

    def _context(self, rows: slice) -> np.ndarray:
        """All but the action's effect."""
        fold = self.fold[rows]
        score = self._base[fold]
        for column, effect in zip(self._columns[1:], self._effects[1:], strict=True):
            score = score + effect[fold, column.level[rows]]
        return score
