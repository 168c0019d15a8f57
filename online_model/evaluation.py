"""Prequential figures: each example is scored once, before it is learned (test-then-train).

Kept per task, since the start and over the last `window` scores: AUC, normalised entropy (log loss over the entropy of
the base rate: He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook", section 3) and calibration
(mean prediction over mean label). Scores are those that would be served: what the learning adds to a logit to make up
for sampling is not in them, and a score weighs as many rows as its row stands for. AUC comes from a histogram of BINS
classes of the logit; ties count half.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

BINS = 4096
_LIMIT = 16.0  # logits beyond ± this fall into the outermost classes
_CLIP = 1e-7  # probabilities are kept this far from 0 and 1


@dataclass
class Figures:
    """Of `count` scores; None where undefined (no scores, or labels of one kind only)."""

    auc: float | None
    ne: float | None
    calibration: float | None
    count: int
    positives: int
    unmatched: int = 0  # of the positives, those whose score could not be found any more

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


class TaskScores:
    """The scores of one task, each made when its example was first seen. `key` is the example's id.

    A label may turn positive later. The score is then moved from the negatives to the positives, if it is among the
    last `window`, which are remembered one by one. If it is not, `unmatched` counts it: AUC and normalised entropy go
    on taking that score for a negative's, by the share unmatched / positives. Calibration is exact all the same: it
    needs the sum of the predictions and the number of positives, and not which score was whose. So what is kept (and
    written at each commit) is bounded, however long the purchase window is. An example that is still open counts as a
    negative.

    All counts are of rows before downsampling: a score weighs 1 / rate. Under downsampling the scores of unclicked
    impressions that were dropped are unmatched too: those kept weigh for them.
    """

    def __init__(self, window: int) -> None:
        self._p = np.zeros(window, np.float32)
        self._label = np.zeros(window, np.uint8)
        self._key = np.zeros(window, np.int64)
        self._weight = np.zeros(window, np.uint32)
        self._classes = np.zeros((2, BINS), np.int64)  # scores by label and class of the logit, since the start
        self._sums = np.zeros(3)  # since the start: predictions, −log p of positives, −log(1 − p) of negatives
        self._count = 0
        self._positives = 0  # labels, whether or not their scores were found
        self._unmatched = 0

    def add(self, key: np.ndarray, p: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> None:
        """n new scores: key int64 [n] (0: never asked for again), probability [n], label 0 or 1 [n], weight [n] (1)."""
        p = np.clip(p, _CLIP, 1 - _CLIP).astype(np.float32).astype(np.float64)  # as it is remembered
        label = label.astype(np.uint8)
        weight = np.ones(len(p), np.uint32) if weight is None else np.rint(weight).astype(np.uint32)
        self._classes += _histogram(p, label, weight)
        self._sums += _sums(p, label, weight)
        self._positives += int(weight[label == 1].sum())
        kept = slice(max(0, len(p) - len(self._p)), None)
        at = (self._count + np.arange(len(p))[kept]) % len(self._p)
        self._p[at], self._label[at], self._key[at] = p[kept], label[kept], key[kept]
        self._weight[at] = weight[kept]
        self._count += len(p)

    def flip(self, keys: np.ndarray) -> int:
        """The examples `keys` turned out positive. Returns how many of them were remembered as negatives."""
        live = self._key[: self._size]
        there = np.isin(keys, live)
        missing = int((~there).sum())
        self._unmatched += missing
        self._positives += missing
        if missing == len(keys):
            return 0
        at = np.flatnonzero((self._label[: self._size] == 0) & np.isin(live, keys))[::-1]
        slots = at[np.unique(live[at], return_index=True)[1]]  # the last of each key
        p, weight = self._p[slots].astype(np.float64), self._weight[slots]
        negative, positive = np.zeros(len(slots), np.uint8), np.ones(len(slots), np.uint8)
        self._classes += _histogram(p, positive, weight) - _histogram(p, negative, weight)
        self._sums += _sums(p, positive, weight) - _sums(p, negative, weight)
        self._label[slots] = 1
        self._positives += len(slots)  # each row that said so stands for itself
        return len(slots)

    def total(self) -> Figures:
        """Since the start."""
        figures = _figures(self._classes, self._sums)
        figures.positives, figures.unmatched = self._positives, self._unmatched
        figures.calibration = float(self._sums[0] / self._positives) if self._positives else None
        return figures

    def recent(self) -> Figures:
        """Of the last `window` scores, with the labels that they have so far."""
        size = self._size
        p, label, weight = self._p[:size].astype(np.float64), self._label[:size], self._weight[:size]
        return _figures(_histogram(p, label, weight), _sums(p, label, weight))

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays (copies)."""
        size = self._size
        counts = [self._count, self._positives, self._unmatched, len(self._p)]
        return {
            "p": self._p[:size].copy(), "label": self._label[:size].copy(), "key": self._key[:size].copy(),
            "weight": self._weight[:size].copy(), "classes": self._classes.copy(), "sums": self._sums.copy(),
            "counts": np.array(counts, np.int64),
        }  # fmt: skip

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave. With another window the scores by themselves are forgotten, the totals are not."""
        count, self._positives, self._unmatched, window = (int(n) for n in state["counts"])
        self._classes[:], self._sums[:] = state["classes"], state["sums"]
        if window != len(self._p):
            self._key[:] = 0
            return
        self._count, size = count, len(state["p"])
        for name, own in (("p", self._p), ("label", self._label), ("key", self._key), ("weight", self._weight)):
            own[:size] = state[name]

    @property
    def _size(self) -> int:
        return min(self._count, len(self._p))


class Evaluation:
    """The tasks by name: click, watch, purchase; click_sampled for positives against drawn negatives."""

    TASKS = ("click", "watch", "purchase", "click_sampled")

    def __init__(self, window: int) -> None:
        self.tasks = {name: TaskScores(window) for name in self.TASKS}

    def metrics(self) -> dict[str, dict]:
        """JSON-ready: task → figures since the start, and "recent" with those of the last scores.

        A sampled task ranks positives against drawn negatives: its rate of positives is made up, so it has no
        normalised entropy and no calibration ("sampled" is true).
        """
        out = {}
        for name, task in self.tasks.items():
            total, recent = task.total().as_dict(), task.recent().as_dict()
            sampled = name.endswith("_sampled")
            if sampled:
                for figures in (total, recent):
                    figures["ne"] = figures["calibration"] = None
            out[name] = {**total, "sampled": sampled, "recent": recent}
        return out

    def state(self) -> dict[str, np.ndarray]:
        return {f"{t}.{name}": a for t, task in self.tasks.items() for name, a in task.state().items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        for t, task in self.tasks.items():
            task.load({name.split(".", 1)[1]: a for name, a in state.items() if name.split(".", 1)[0] == t})


def _classes(p: np.ndarray) -> np.ndarray:
    """The class of each probability's logit, int64 [n]."""
    scaled = (np.log(p / (1 - p)) + _LIMIT) * (BINS / (2 * _LIMIT))
    return np.clip(scaled, 0, BINS - 1).astype(np.int64)


def _histogram(p: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weights by label and class of the logit, int64 [2, BINS]."""
    cell = _classes(p) + BINS * label.astype(np.int64)
    return np.rint(np.bincount(cell, weight, minlength=2 * BINS)).astype(np.int64).reshape(2, BINS)


def _sums(p: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    positive, negative = label == 1, label == 0
    losses = -np.log(p[positive]) @ weight[positive], -np.log1p(-p[negative]) @ weight[negative]
    return np.array([p @ weight, *losses])


def _figures(classes: np.ndarray, sums: np.ndarray) -> Figures:
    negatives, positives = (int(n) for n in classes.sum(1))
    count = negatives + positives
    auc = ne = calibration = None
    if negatives and positives:
        below = np.cumsum(classes[0]) - classes[0]
        auc = float((classes[1] * (below + classes[0] / 2)).sum() / (negatives * positives))
        base = positives / count
        entropy = -base * np.log(base) - (1 - base) * np.log1p(-base)
        ne = float((sums[1] + sums[2]) / count / entropy)
    if positives:
        calibration = float(sums[0] / positives)
    return Figures(auc, ne, calibration, count, positives)
