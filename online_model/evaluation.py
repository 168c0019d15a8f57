"""Prequential figures: each example is scored once, before it is learned (test-then-train).

Kept per task, since the start and over the last `window` scores: AUC, normalised entropy (log loss over the entropy of
the base rate: He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook", section 3) and calibration
(mean prediction over mean label). AUC comes from a histogram of BINS classes of the logit; ties count half.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def as_dict(self) -> dict[str, float | int | None]:
        return {"auc": self.auc, "ne": self.ne, "calibration": self.calibration,
                "count": self.count, "positives": self.positives}  # fmt: skip


class TaskScores:
    """The scores of one task. `key` is the example's id; a label that changes later changes the figures.

    Bounded: the last `window` scores are remembered one by one, and a label can change only among them.
    """

    def __init__(self, window: int) -> None:
        self._p = np.zeros(window, np.float32)
        self._label = np.zeros(window, np.uint8)
        self._key = np.zeros(window, np.int64)
        self._classes = np.zeros((2, BINS), np.int64)  # scores by label and class of the logit, since the start
        self._sums = np.zeros(3)  # since the start: predictions, −log p of positives, −log(1 − p) of negatives
        self._count = 0
        self._flipped = 0

    def add(self, key: np.ndarray, p: np.ndarray, label: np.ndarray) -> None:
        """n new scores: key int64 [n] (0: never asked for again), probability [n], label 0 or 1 [n]."""
        p = np.clip(p, _CLIP, 1 - _CLIP).astype(np.float32).astype(np.float64)  # as it is remembered
        label = label.astype(np.uint8)
        for kind in (0, 1):
            self._classes[kind] += np.bincount(_classes(p[label == kind]), minlength=BINS)
        self._sums += _sums(p, label)
        kept = slice(max(0, len(p) - len(self._p)), None)
        at = (self._count + np.arange(len(p))[kept]) % len(self._p)
        self._p[at], self._label[at], self._key[at] = p[kept], label[kept], key[kept]
        self._count += len(p)

    def flip(self, keys: np.ndarray) -> int:
        """The examples `keys` turned out positive. Returns how many of them were remembered as negatives."""
        live = self._key[: self._size]
        found = 0
        for key in keys[np.isin(keys, live)]:
            at = np.flatnonzero((live == key) & (self._label[: self._size] == 0))
            if not len(at):
                continue
            slot = at[-1:]
            p = self._p[slot].astype(np.float64)
            klass = _classes(p)
            self._classes[0, klass] -= 1
            self._classes[1, klass] += 1
            self._sums += _sums(p, np.ones(1, np.uint8)) - _sums(p, np.zeros(1, np.uint8))
            self._label[slot] = 1
            found += 1
        self._flipped += found
        return found

    def total(self) -> Figures:
        """Since the start."""
        return _figures(self._classes, self._sums)

    def recent(self) -> Figures:
        """Of the last `window` scores."""
        p, label = self._p[: self._size].astype(np.float64), self._label[: self._size]
        classes = np.stack([np.bincount(_classes(p[label == kind]), minlength=BINS) for kind in (0, 1)])
        return _figures(classes, _sums(p, label))

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays (copies)."""
        size = self._size
        return {
            "p": self._p[:size].copy(), "label": self._label[:size].copy(), "key": self._key[:size].copy(),
            "classes": self._classes.astype(np.int64), "sums": self._sums.copy(),
            "counts": np.array([self._count, self._flipped, len(self._p)], np.int64),
        }  # fmt: skip

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave. With another window the scores by themselves are forgotten, the totals are not."""
        count, flipped, window = (int(n) for n in state["counts"])
        self._classes[:], self._sums[:], self._flipped = state["classes"], state["sums"], flipped
        if window != len(self._p):
            self._key[:] = 0
            return
        self._count, size = count, len(state["p"])
        self._p[:size], self._label[:size], self._key[:size] = state["p"], state["label"], state["key"]

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


def _sums(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    return np.array([p.sum(), -np.log(p[label == 1]).sum(), -np.log1p(-p[label == 0]).sum()])


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
