"""Whom an estimate is of: target policies, each fixed before the decisions that it is judged on.

| name | shows | is fixed by |
|---|---|---|
| logged | what was shown | nothing: the estimate is the log's own mean |
| uniform | any item of the log, alike | nothing |
| popular | by smoothed rates of reward | the first part of the log |
| served | what another log's policy showed, by place | that other log |
| headrace | by the model's probability of a click (ours.py) | the first part of the log |

A policy gives every item a score ≥ 0. With a temperature it shows item i with probability ∝ score_i^(1/temperature),
with an epsilon the best one but for a share ε that goes to all alike: as a replica does, place by place, among what
is not in a place before (online_model/serving/explore.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from replay.off_policy.decisions import Decisions
from replay.off_policy.rewards import CrossFitted

PRIOR = 20.0  # decisions at the mean rate that each item's own stand beside
CELLS = 4_000_000  # of a matrix decisions × items, at a time
TINY = 1e-300


@dataclass(frozen=True)
class Choice:
    """From scores to probabilities: an epsilon, or else a temperature."""

    temperature: float = 1.0
    epsilon: float | None = None

    def probabilities(self, scores: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """scores: float64 [m, A] ≥ 0; taken: bool [m, A], may not come. Returns float64 [m, A], rows sum to 1.

        For epsilon the best is the first of the highest. A row where nothing may come is all 0.
        """
        if self.epsilon is not None:
            free = ~taken
            p = free * (self.epsilon / np.maximum(free.sum(1, keepdims=True), 1))
            best = np.where(taken, -np.inf, scores).argmax(1)
            p[np.arange(len(p)), best] += (1 - self.epsilon) * free.any(1)
            return p
        logits = np.log(np.maximum(scores, TINY)) / self.temperature
        logits = np.where(taken, -np.inf, logits)
        top = logits.max(1, keepdims=True)
        p = np.exp(logits - np.where(np.isfinite(top), top, 0))
        p[(scores <= 0) & (scores.max(1, keepdims=True) > 0)] = 0
        return p / np.maximum(p.sum(1, keepdims=True), TINY)


@dataclass(frozen=True)
class Targeted:
    """A policy on n decisions."""

    chosen: np.ndarray  # float64 [n] π(a | x) of the logged action
    expected: np.ndarray  # float64 [n] Σ_a π(a | x) q̂(x, a)
    unseen: float  # share of π's mass on items that the decisions never show


class Target(Protocol):
    """A policy, fixed."""

    def on(self, judged: Decisions, model: CrossFitted, progress: Callable[[float], None]) -> Targeted:
        """What it would do at each of the decisions."""
        ...


class Logged:
    """The log's own policy. The logged action is a draw of it, so V̂(x) is estimated by q̂ of that action, and DR is
    the plain mean."""

    def on(self, judged: Decisions, model: CrossFitted, progress: Callable[[float], None]) -> Targeted:
        return Targeted(judged.propensity, model.of_logged(), 0.0)


class Scoring:
    """A policy that scores all items of the log: `scores` gives float64 [m, A] of the decisions at a slice."""

    def __init__(self, scores: Callable[[slice], np.ndarray], choice: Choice) -> None:
        self._scores, self._choice = scores, choice

    def on(self, judged: Decisions, model: CrossFitted, progress: Callable[[float], None]) -> Targeted:
        n, actions = len(judged), len(judged.items)
        never = np.bincount(judged.item, minlength=actions) == 0
        chosen, expected, unseen = np.empty(n), np.empty(n), 0.0
        step = max(1, CELLS // actions)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            p = self._choice.probabilities(self._scores(rows), judged.before(rows))
            chosen[rows] = p[np.arange(len(p)), judged.item[rows]]
            expected[rows] = (p * model.of_all(rows)).sum(1)
            unseen += float(p[:, never].sum())
            progress(rows.stop / n)
        return Targeted(chosen, expected, unseen / n)


def uniform(judged: Decisions) -> Scoring:
    """Any item of the log, alike."""
    return Scoring(lambda rows: np.ones((rows.stop - rows.start, len(judged.items))), Choice())


def popular(first: Decisions, choice: Choice) -> Scoring:
    """By the items' mean rewards in the first part of the log, each beside PRIOR decisions at the mean of all."""
    mean = first.reward.mean() if len(first) else 0.0
    shown = np.bincount(first.item, minlength=len(first.items))
    earned = np.bincount(first.item, first.reward, len(first.items))
    rates = (earned + PRIOR * mean) / (shown + PRIOR)
    return Scoring(lambda rows: np.broadcast_to(rates, (rows.stop - rows.start, len(rates))), choice)


def served(other: Decisions, judged: Decisions, choice: Choice) -> Scoring:
    """The policy of another log, as if it looked at nothing but the place: shares of the items in each place.

    Shares and not the mean of the logged propensities: where these change, an item is logged the more often the
    higher its own is, so that their mean over what was logged is too high. `judged` must know the other log's items.
    A place that is not in the other log is shown as its whole.
    """
    to = {item: index for index, item in enumerate(judged.items)}
    item = np.array([to[name] for name in other.items], np.int64)[other.item]
    places, actions = int(max(other.place.max(), judged.place.max())) + 1, len(judged.items)
    table = (
        np.bincount(other.place * actions + item, minlength=places * actions)
        .reshape(places, actions)
        .astype(np.float64)
    )
    table[table.sum(1) == 0] = table.sum(0)
    return Scoring(lambda rows: table[judged.place[rows]], choice)
