"""Watch time: how long a play is among the plays of videos of a like duration, as a quantile, and the way back.

Long videos are watched longer, so a model that predicts milliseconds learns durations. D2Q (Zhan et al., "Deconfounding
duration bias in watch-time prediction for video recommendation", KDD 2022, section 4) takes the effect out: plays are
grouped by duration, the target is the play's quantile in its group, and a predicted quantile is turned back into a time
by the group's own distribution. Here the groups are fixed, four to a doubling of the duration, and a group's
distribution is kept on the stream: a histogram of logarithmic bins, whose quantiles are off by half a bin at most
(DDSketch, Masson et al., VLDB 2019), 3 % of the time. Older plays count less.

The counts are a float32 [GROUPS, BINS]: part of the dense weights, so that replicas have them too. A sketch of a
library would be no array, or would draw random numbers, and a replay must give the same bits.
"""

from __future__ import annotations

import numpy as np

GROUPS, BINS = 48, 192
_SHORTEST_MS, _PER_DOUBLING = 1_000, 4  # group 1 ends there; 0 is of unknown durations
_FIRST_MS, _GROWTH = 100.0, 1.06  # the first bin's end, and how much longer each next one is
_HALF_LIFE = 50_000  # plays in which a play counts half
_PRIOR = 20.0  # plays that the distribution over all groups counts in one
_EDGES = np.concatenate(([0.0], _FIRST_MS * _GROWTH ** np.arange(BINS)))  # ms; the last bin has all that is longer


def group_of(duration_ms: np.ndarray) -> np.ndarray:
    """Groups int64 [n] of durations in ms, 0 where it is not known."""
    known = np.maximum(duration_ms, 1) / _SHORTEST_MS
    group = 1 + np.ceil(_PER_DOUBLING * np.log2(np.maximum(known, 1.0))).astype(np.int64)
    return np.where(duration_ms > 0, np.minimum(group, GROUPS - 1), 0)


def quantiles(counts: np.ndarray, play_ms: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """Where plays stand in their groups, float32 [n] in (0, 1): half of the like ones count as shorter.

    Before there was any play at all it is a half.
    """
    below = np.cumsum(_shares(counts), axis=1)
    group, at = group_of(duration_ms), _bin_of(play_ms)
    upper = below[group, at]
    lower = np.where(at > 0, below[group, np.maximum(at - 1, 0)], 0.0)
    return ((upper + lower) / 2).astype(np.float32)


def plays_at(counts: np.ndarray, quantile: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """The inverse: plays in ms, float32 [n], at quantiles [n]; nan as long as there was no play at all."""
    if not counts.any():
        return np.full(len(quantile), np.nan, np.float32)
    below = np.cumsum(_shares(counts), axis=1)[group_of(duration_ms)]  # [n, BINS]
    wanted = np.clip(quantile, 0.0, 1.0)[:, None]
    at = np.minimum((below < wanted).sum(1), BINS - 1)
    rows = np.arange(len(at))
    upper, lower = below[rows, at], np.where(at > 0, below[rows, np.maximum(at - 1, 0)], 0.0)
    part = np.clip((wanted[:, 0] - lower) / np.maximum(upper - lower, 1e-12), 0, 1)
    return (_EDGES[at] + part * (_EDGES[at + 1] - _EDGES[at])).astype(np.float32)


def learned(counts: np.ndarray, play_ms: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """The counts with n plays more, float32 [GROUPS, BINS]."""
    cell = group_of(duration_ms) * BINS + _bin_of(play_ms)
    new = np.bincount(cell, minlength=GROUPS * BINS).reshape(GROUPS, BINS)
    return (counts * 0.5 ** (len(play_ms) / _HALF_LIFE) + new).astype(np.float32)


def _bin_of(play_ms: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(_EDGES, np.maximum(play_ms, 0), side="right") - 1, 0, BINS - 1)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Each group's distribution, float64 [GROUPS, BINS], drawn to that over all where it has few plays."""
    own = counts.astype(np.float64)
    every = own.sum(0)
    every = every / every.sum() if every.any() else np.full(BINS, 1 / BINS)
    mixed = own + _PRIOR * every
    return mixed / mixed.sum(1, keepdims=True)
