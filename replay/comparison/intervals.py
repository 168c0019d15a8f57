"""How much quality a serving copy loses by being old: the synchronisation interval against AUC.

As in the Monolith paper (Liu et al. 2022, arXiv 2209.07663, section 4 and table 2): the model learns the first part of
the stream; over the rest it goes on learning, and a serving copy that is brought up to date every so often, by the
clock of the events, scores each batch before it is learned. `never` is what a batch system serves until its next
training. Here all of the model is brought up to date at once; there the dense part stays behind for a day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from online_model.settings import TrainerSettings
from replay.comparison import metrics
from replay.comparison.ours import Copy, Leader
from replay.comparison.stream import Stream

HOUR_MS = 3_600_000
INTERVALS: dict[str, int | None] = {
    "never": None, "5 h": 5 * HOUR_MS, "1 h": HOUR_MS, "30 min": HOUR_MS // 2, "1 min": 60_000, "1 s": 1_000,
}  # fmt: skip
FIRST_PART = 0.5  # of the batches
BATCH = 64  # rows: nothing can be fresher than the last batch


class _Served:
    """A copy, when it is due, and what it scored."""

    def __init__(self, copy: Copy, interval_ms: int | None) -> None:
        self.copy, self._interval_ms, self._due_ms = copy, interval_ms, 0
        self.scores: list[np.ndarray] = []

    def begin(self, now_ms: int) -> None:
        self.copy.sync()
        self.copy.syncs = self.copy.rows = 0
        self._next(now_ms)

    def tick(self, now_ms: int) -> None:
        if self._interval_ms is not None and now_ms >= self._due_ms:
            self.copy.sync()
            self._next(now_ms)

    def _next(self, now_ms: int) -> None:
        if self._interval_ms is not None:
            self._due_ms = (now_ms // self._interval_ms + 1) * self._interval_ms


def measure_intervals(
    stream: Stream, model: TrainerSettings, progress: Callable[[float], None] = lambda share: None
) -> dict[str, dict[str, Any]]:
    """INTERVALS by name → auc, ne, calibration, count of the scores of the second part; syncs, rows_copied."""
    leader = Leader(model)
    served = {name: _Served(leader.copy(), interval) for name, interval in INTERVALS.items()}
    first, labels = max(1, round(len(stream.batches) * FIRST_PART)), []
    for done, batch in enumerate(stream.batches, 1):
        leader.catalogue(batch.number, batch.catalogue)
        if done > first:
            labels.append(batch.scored.label)
            for one in served.values():
                one.scores.append(one.copy.score(batch.scored.candidates))
        leader.learn(batch)
        for one in served.values():
            if done == first:
                one.begin(batch.to_ms)
            elif done > first:
                one.tick(batch.to_ms)
        progress(done / len(stream.batches))
    label = np.concatenate(labels) if labels else np.empty(0)
    return {
        name: {
            **asdict(metrics.figures(np.concatenate([np.empty(0), *one.scores]), label, True)),
            "syncs": one.copy.syncs, "rows_copied": one.copy.rows,
        }
        for name, one in served.items()
    }  # fmt: skip
