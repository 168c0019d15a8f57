"""Figures of predicted probabilities, of one task: since the start and over the last scores, in all and by scenario.

AUC; normalised entropy (log loss over the entropy of the base rate: He et al. 2014, "Practical lessons from predicting
clicks on ads at Facebook", section 3); calibration (mean prediction over mean label); expected calibration error.
Scores are those that would be served: what the learning adds to a logit to make up for sampling is not in them, and a
score weighs as many rows as its row stands for.

AUC comes from a histogram of the logit in BINS classes, by scenario in COARSE ones; ties count half. The calibration
error is sum over bins of n_bin / n · |mean prediction − mean label| (Naeini et al., AAAI 2015, section 3; Guo et al.,
ICML 2017, equation 3), with ECE_BINS bins of equal mass: click rates of a few per cent would all fall into the first
one or two of equal width. A bin is a run of whole COARSE classes, in which predictions differ by up to 6 %, but the
sums of the predictions are kept class by class, so it is exact for the bins as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

SCENARIOS = ("live", "video", "search", "shelf")  # streams.events.SCENARIOS
BINS, COARSE = 4096, 512
ECE_BINS = 15
_FINE = BINS // COARSE  # classes in a coarse one
_LIMIT = 16.0  # logits beyond ± this fall into the outermost classes
_LOW = (1 << 16) - 1
_CLIP = 1e-7  # probabilities are kept this far from 0 and 1


@dataclass
class Figures:
    """Of `count` scores; None where undefined (no scores, or labels of one kind only)."""

    auc: float | None
    ne: float | None
    calibration: float | None
    ece: float | None
    count: int
    positives: int
    predicted: float  # positives: the sum of the predictions
    unmatched: int = 0  # of the positives, those whose score could not be found any more
    loss: float | None = None  # the mean log loss of a score

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass
class _Sums:
    """What the figures are made of. S: scenarios."""

    classes: np.ndarray  # int64 [2, BINS] scores by label and class of the logit
    coarse: np.ndarray  # int64 [S, 2, COARSE] the same by scenario
    predicted: np.ndarray  # float64 [S, COARSE] sums of the predictions
    losses: np.ndarray  # float64 [S, 2] sums of −log(1 − p) of negatives, of −log p of positives

    @staticmethod
    def zeros() -> _Sums:
        s = len(SCENARIOS)
        return _Sums(np.zeros((2, BINS), np.int64), np.zeros((s, 2, COARSE), np.int64), np.zeros((s, COARSE)),
                     np.zeros((s, 2)))  # fmt: skip

    @staticmethod
    def of(p: np.ndarray, label: np.ndarray, weight: np.ndarray, scenario: np.ndarray) -> _Sums:
        """Probability float64 [n] (clipped), label [n], weight uint32 [n], index of the scenario [n]."""
        s, label, scenario = len(SCENARIOS), label.astype(np.int64), scenario.astype(np.int64)
        lost = np.where(label == 1, -np.log(p), -np.log1p(-p))
        cell = _classes(p)
        coarse = scenario * COARSE + cell // _FINE
        return _Sums(
            _counted(cell + BINS * label, weight, 2 * BINS).reshape(2, BINS),
            _counted((scenario * 2 + label) * COARSE + cell // _FINE, weight, s * 2 * COARSE).reshape(s, 2, COARSE),
            np.bincount(coarse, p * weight, s * COARSE).reshape(s, COARSE),
            np.bincount(scenario * 2 + label, lost * weight, s * 2).reshape(s, 2),
        )

    def add(self, other: _Sums, sign: int = 1) -> None:
        """Adds the other's, or with −1 takes them away."""
        for own, more in zip(self.arrays().values(), other.arrays().values(), strict=True):
            own += sign * more

    def arrays(self) -> dict[str, np.ndarray]:
        return {"classes": self.classes, "coarse": self.coarse, "predicted": self.predicted, "losses": self.losses}

    def figures(self) -> Figures:
        """Of all scenarios."""
        return _figures(self.classes, self.coarse.sum(0), self.predicted.sum(0), self.losses.sum(0))

    def of_scenario(self, scenario: int) -> Figures:
        coarse = self.coarse[scenario]
        return _figures(coarse, coarse, self.predicted[scenario], self.losses[scenario])


class TaskScores:
    """The scores of one task, each made when its example was first seen. `key` is the example's id.

    A label may turn positive later. The score is then moved from the negatives to the positives, if it is among the
    last `window`, which are remembered one by one. If it is not, `unmatched` counts it: AUC, normalised entropy and
    calibration error go on taking that score for a negative's, by the share unmatched / positives. Calibration is exact
    all the same: it needs the sum of the predictions and the number of positives, and not which score was whose. So
    what is kept (and written at each commit) is bounded, however long the purchase window is. An example that is still
    open counts as a negative.

    All counts are of rows before downsampling: a score weighs 1 / rate. Under downsampling the scores of unclicked
    impressions that were dropped are unmatched too: those kept weigh for them.
    """

    def __init__(self, window: int) -> None:
        self._p = np.zeros(window, np.float32)
        self._label = np.zeros(window, np.uint8)
        self._key = np.zeros(window, np.int64)
        self._weight = np.zeros(window, np.uint32)
        self._scenario = np.zeros(window, np.uint8)
        self._sums = _Sums.zeros()  # since the start
        self._marks = np.zeros((len(SCENARIOS), 2), np.int64)  # labels, found or not; those of them not found
        self._count = 0

    def add(
        self,
        key: np.ndarray,
        p: np.ndarray,
        label: np.ndarray,
        weight: np.ndarray | None = None,
        scenario: np.ndarray | None = None,
    ) -> None:
        """n new scores: key int64 [n] (0: never asked for again), probability [n], label 0 or 1 [n], weight [n] (1),
        index of the scenario [n] (0)."""
        if not len(p):
            return
        p = np.clip(p, _CLIP, 1 - _CLIP).astype(np.float32).astype(np.float64)  # as it is remembered
        label = label.astype(np.uint8)
        weight = np.ones(len(p), np.uint32) if weight is None else np.rint(weight).astype(np.uint32)
        scenario = np.zeros(len(p), np.uint8) if scenario is None else scenario
        self._sums.add(_Sums.of(p, label, weight, scenario))
        self._marks[:, 0] += _counted(scenario, weight * label, len(SCENARIOS))
        kept = slice(max(0, len(p) - len(self._p)), None)
        at = (self._count + np.arange(len(p))[kept]) % len(self._p)
        self._p[at], self._label[at], self._key[at] = p[kept], label[kept], key[kept]
        self._weight[at], self._scenario[at] = weight[kept], scenario[kept]
        self._count += len(p)

    def flip(self, keys: np.ndarray, scenario: np.ndarray | None = None) -> int:
        """The examples `keys`, of these scenarios [n] (0), turned out positive. Returns how many of them were
        remembered as negatives."""
        if not len(keys):
            return 0
        live = self._key[: self._size]
        low = np.zeros(_LOW + 1, bool)  # whose low bits nobody wants are left out at once: np.isin would sort all
        low[keys & _LOW] = True
        near = np.flatnonzero(low[live & _LOW])
        found = near[np.isin(live[near], keys)]
        missing = ~np.isin(keys, live[found])
        told = np.zeros(len(keys), np.uint8) if scenario is None else scenario
        self._marks += _counted(told[missing], None, len(SCENARIOS))[:, None]
        at = found[self._label[found] == 0][::-1]
        slots = at[np.unique(live[at], return_index=True)[1]]  # the last of each key
        if not len(slots):
            return 0
        p, weight, own = self._p[slots].astype(np.float64), self._weight[slots], self._scenario[slots]
        self._sums.add(_Sums.of(p, self._label[slots], weight, own), sign=-1)
        self._label[slots] = 1
        self._sums.add(_Sums.of(p, self._label[slots], weight, own))
        self._marks[:, 0] += _counted(own, None, len(SCENARIOS))  # each row that said so stands for itself
        return len(slots)

    def total(self, scenario: int | None = None) -> Figures:
        """Since the start, of all scenarios or of one."""
        figures = self._sums.figures() if scenario is None else self._sums.of_scenario(scenario)
        marks = self._marks.sum(0) if scenario is None else self._marks[scenario]
        figures.positives, figures.unmatched = int(marks[0]), int(marks[1])
        figures.calibration = figures.predicted / figures.positives if figures.positives else None
        return figures

    def recent(self, last: int | None = None) -> Figures:
        """Of the last `window` scores, or of fewer, with the labels that they have so far."""
        return self._recent(last).figures()

    def metrics(self) -> dict:
        """JSON-ready: the figures since the start, in "recent" those of the last `window` scores, and both by the name
        of each scenario that has any in "scenarios"."""
        recent = self._recent(None)
        scenarios = {
            name: {**self.total(i).as_dict(), "recent": recent.of_scenario(i).as_dict()}
            for i, name in enumerate(SCENARIOS)
            if self._sums.coarse[i].any()
        }
        return {**self.total().as_dict(), "recent": recent.figures().as_dict(), "scenarios": scenarios}

    @property
    def scored(self) -> int:
        """How many scores were added since the start, or since the window was changed."""
        return self._count

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays (copies)."""
        size = self._size
        rows = {name: array[:size].copy() for name, array in self._rows().items()}
        counts = np.array([self._count, len(self._p)], np.int64)
        return {**rows, **{n: a.copy() for n, a in self._sums.arrays().items()}, "marks": self._marks.copy(),
                "counts": counts}  # fmt: skip

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave. With another window the scores by themselves are forgotten, the totals are not."""
        count, window = (int(n) for n in state["counts"])
        self._marks[:] = state["marks"]
        for name, own in self._sums.arrays().items():
            own[:] = state[name]
        if window != len(self._p):
            self._key[:] = 0
            return
        self._count, size = count, len(state["p"])
        for name, own in self._rows().items():
            own[:size] = state[name]

    def _recent(self, last: int | None) -> _Sums:
        """Of the last so many scores that are remembered."""
        size = self._size if last is None else min(last, self._size)
        if size == len(self._p) or size == self._count:
            at: slice | np.ndarray = slice(0, size)  # all that there are: their order does not matter
        else:
            at = (self._count - 1 - np.arange(size)) % len(self._p)
        return _Sums.of(self._p[at].astype(np.float64), self._label[at], self._weight[at], self._scenario[at])

    def _rows(self) -> dict[str, np.ndarray]:
        """What is remembered of each score."""
        return {"p": self._p, "label": self._label, "key": self._key, "weight": self._weight,
                "scenario": self._scenario}  # fmt: skip

    @property
    def _size(self) -> int:
        return min(self._count, len(self._p))


def log_loss(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    """−log of the probability given to what came, float64 [n]; p [n], label 0 or 1 [n]."""
    p = np.clip(p.astype(np.float64), _CLIP, 1 - _CLIP)
    return np.where(label == 1, -np.log(p), -np.log1p(-p))


def _classes(p: np.ndarray) -> np.ndarray:
    """The class of each probability's logit, int64 [n]."""
    scaled = (np.log(p / (1 - p)) + _LIMIT) * (BINS / (2 * _LIMIT))
    return np.clip(scaled, 0, BINS - 1).astype(np.int64)


def _counted(cell: np.ndarray, weight: np.ndarray | None, cells: int) -> np.ndarray:
    """The weights (1) that fall into each cell, int64 [cells]."""
    return np.rint(np.bincount(cell, weight, cells)).astype(np.int64)


def _figures(classes: np.ndarray, coarse: np.ndarray, predicted: np.ndarray, losses: np.ndarray) -> Figures:
    """classes: int64 [2, …], for AUC; coarse: int64 [2, COARSE]; predicted: [COARSE]; losses: [2]."""
    negatives, positives = (int(n) for n in coarse.sum(1))
    count = negatives + positives
    auc = ne = None
    loss = float(losses.sum()) / count if count else None
    if negatives and positives:
        below = np.cumsum(classes[0]) - classes[0]
        auc = float((classes[1] * (below + classes[0] / 2)).sum() / (negatives * positives))
        base = positives / count
        entropy = -base * np.log(base) - (1 - base) * np.log1p(-base)
        ne = float(losses.sum() / count / entropy)
    total = float(predicted.sum())
    calibration = total / positives if positives else None
    return Figures(auc, ne, calibration, _calibration_error(coarse, predicted), count, positives, total,
                   loss=loss)  # fmt: skip


def _calibration_error(coarse: np.ndarray, predicted: np.ndarray) -> float | None:
    """int64 [2, COARSE] counts by label, float64 [COARSE] sums of predictions; None where there are none."""
    mass = coarse.sum(0)
    count = int(mass.sum())
    if not count:
        return None
    middle = np.cumsum(mass) - mass / 2
    bin_of = np.minimum((middle * ECE_BINS / count).astype(np.int64), ECE_BINS - 1)
    difference = np.bincount(bin_of, predicted - coarse[1], ECE_BINS)
    return float(np.abs(difference).sum() / count)
