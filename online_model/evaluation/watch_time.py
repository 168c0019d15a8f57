"""Figures of predicted watch time: the mean absolute error, and how often the longer of two plays is told.

XAUC is the share of pairs of examples whose plays differ and whose predictions stand in the same order; a tie of the
predictions counts half (Zhan et al., "Deconfounding duration bias in watch-time prediction for video recommendation",
KDD 2022, arXiv 2206.06003, section 5). All pairs of a stream are too many, so it is estimated: each new score is
compared with PAIRS of the last `window` before it, drawn by a hash of its number, so that a replay draws the same. By
scenario those pairs count whose both scores are of it. Over the last `window` scores pairs are drawn within these.
"""

from __future__ import annotations

import numpy as np

from embedding_store.ids import GOLDEN, finalised
from online_model.evaluation.scores import SCENARIOS

PAIRS = 4  # a new score is compared with so many
_ALL = len(SCENARIOS)  # the row of sums for pairs of any scenarios


class WatchTime:
    """The scores since the start, and the last `window` one by one."""

    def __init__(self, window: int) -> None:
        self._predicted = np.zeros(window, np.float32)  # ms
        self._played = np.zeros(window, np.float32)  # ms
        self._scenario = np.zeros(window, np.uint8)
        self._errors = np.zeros(len(SCENARIOS))  # sums of |predicted − played|, ms
        self._scores = np.zeros(len(SCENARIOS), np.int64)
        self._pairs = np.zeros((_ALL + 1, 2), np.int64)  # by scenario, then of all: twice the pairs told right; pairs
        self._count = 0

    def add(self, predicted: np.ndarray, played: np.ndarray, scenario: np.ndarray) -> None:
        """n plays: predicted and actual watch time in ms [n], index of the scenario [n]."""
        if not len(played):
            return
        predicted, played = predicted.astype(np.float32), played.astype(np.float32)  # as they are remembered
        errors = np.abs(predicted.astype(np.float64) - played)
        self._errors += np.bincount(scenario, errors, len(SCENARIOS))
        self._scores += np.bincount(scenario, minlength=len(SCENARIOS))
        # Its window and the batch in one piece: what is in the batch is before some of it.
        before = self._in_order()
        rows = tuple(np.concatenate(both) for both in zip(before, (predicted, played, scenario), strict=True))
        start = len(before[0])
        at = np.arange(start, start + len(played))
        self._pairs += _compared(rows[0], rows[1], rows[2], at, self._count - start, len(self._played))
        for own, row in zip(self._rows().values(), rows, strict=True):
            kept = row[start:][-len(own) :]
            own[(self._count + len(played) - len(kept) + np.arange(len(kept))) % len(own)] = kept
        self._count += len(played)

    def metrics(self) -> dict:
        """JSON-ready: `mae_ms`, `xauc` (None where undefined), `count` since the start; the same of the last scores in
        "recent"; both by the name of each scenario that has any in "scenarios"."""
        predicted, played, scenario = self._in_order()
        errors = np.abs(predicted.astype(np.float64) - played)
        sums = np.bincount(scenario, errors, len(SCENARIOS)), np.bincount(scenario, minlength=len(SCENARIOS))
        first = self._count - len(played)
        pairs = _compared(predicted, played, scenario, np.arange(len(played)), first, len(played))
        total, recent = (self._errors, self._scores, self._pairs), (*sums, pairs)
        scenarios = {
            name: {**_figures(*total, i), "recent": _figures(*recent, i)}
            for i, name in enumerate(SCENARIOS)
            if self._scores[i]
        }
        return {**_figures(*total, _ALL), "recent": _figures(*recent, _ALL), "scenarios": scenarios}

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays (copies)."""
        size = min(self._count, len(self._played))
        return {
            **{name: array[:size].copy() for name, array in self._rows().items()},
            **{name: array.copy() for name, array in self._sums().items()},
            "counts": np.array([self._count, len(self._played)], np.int64),
        }

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave. With another window the scores by themselves are forgotten, the totals are not."""
        count, window = (int(n) for n in state["counts"])
        for name, own in self._sums().items():
            own[:] = state[name]
        if window == len(self._played):
            self._count = count
            for name, own in self._rows().items():
                own[: len(state[name])] = state[name]

    def _in_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is remembered, the oldest first: predicted, played, scenario."""
        window = len(self._played)
        turn = self._count % window if self._count > window else 0
        predicted, played, scenario = (np.roll(a[: self._count], -turn) for a in self._rows().values())
        return predicted, played, scenario

    def _rows(self) -> dict[str, np.ndarray]:
        return {"predicted": self._predicted, "played": self._played, "scenario": self._scenario}

    def _sums(self) -> dict[str, np.ndarray]:
        return {"errors": self._errors, "scores": self._scores, "pairs": self._pairs}


def _compared(
    predicted: np.ndarray, played: np.ndarray, scenario: np.ndarray, at: np.ndarray, first: int, window: int
) -> np.ndarray:
    """(twice the pairs told right, pairs) by scenario, then of all: int64 [S + 1, 2].

    The rows [m] are in order; `first` is the number of the first of them in the stream. Those at `at` [n] are compared
    with PAIRS each of the up to `window` before them.
    """
    at = at[at > 0]
    draw = (first + at).astype(np.uint64)[:, None] * np.uint64(PAIRS) + np.arange(PAIRS, dtype=np.uint64)
    back = 1 + (finalised(draw + GOLDEN) % np.minimum(at, window).astype(np.uint64)[:, None]).astype(np.int64)
    one, other = np.repeat(at, PAIRS), (at[:, None] - back).ravel()
    longer = np.sign(played[one] - played[other])
    right = (1 + longer * np.sign(predicted[one] - predicted[other])).astype(np.int64)  # 2, 1 for a tie, 0
    alike = np.where(scenario[one] == scenario[other], scenario[one], _ALL)
    out = np.zeros((_ALL + 1, 2), np.int64)
    for column, values in enumerate((right, np.ones_like(right))):
        values = values * (longer != 0)
        out[:, column] = np.rint(np.bincount(alike, values, _ALL + 1))
        out[_ALL, column] = values.sum()
    return out


def _figures(errors: np.ndarray, scores: np.ndarray, pairs: np.ndarray, scenario: int) -> dict:
    count, error = (int(scores.sum()), errors.sum()) if scenario == _ALL else (int(scores[scenario]), errors[scenario])
    right, compared = pairs[scenario].tolist()
    return {
        "mae_ms": float(error) / count if count else None,
        "xauc": right / 2 / compared if compared else None,
        "count": count,
    }
