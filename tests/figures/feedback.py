"""Delayed feedback on a stream with known delays: predicted over actual purchase rate, for each strategy.

    python -m tests.figures.feedback        # a table in Markdown

Six purchase windows of clicks go through the real trainer (tests/online_model/delays.py); what is measured is the mean
probability at first sight, over the true one, of the clicks in the last third. Also the root mean square error of the
logits, which is not fooled by errors that cancel.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from online_model.evaluation import TaskScores
from online_model.settings import FeatureSettings, Feedback, RankerSettings, TrainerSettings
from online_model.trainer import open_trainer
from tests.online_model.delays import HOUR, START, WINDOW, Clicks, make_clicks, make_rows
from tests.online_model.logs import make_blocks

CLICKS, WINDOWS, LAST = 24_000, 6.0, 1 / 3
WAIT = 12 * HOUR
STRATEGIES: dict[str, tuple[Feedback, int]] = {  # name → (feedback, purchase_wait_ms)
    "none": ("none", 0),
    "calibrated": ("calibrated", 0),
    "weighted": ("weighted", 0),
    "elapsed": ("elapsed", WAIT),
    "wait for the window": ("none", WINDOW),
}


@dataclass
class Result:
    """Of one strategy on one stream, over the last part of the clicks."""

    ratio: float  # predicted over actual rate
    error: float  # root mean square error of the logit


def measure(name: str, seed: int, clicks: int = CLICKS, windows: float = WINDOWS) -> Result:
    """Plays a stream through a trainer with this strategy."""
    torch.set_num_threads(1)
    feedback, wait = STRATEGIES[name]
    stream = make_clicks(clicks, windows, seed)
    settings = TrainerSettings(
        batch_size=128, seed=seed, feedback=feedback, purchase_wait_ms=wait, window=1 << 18,
        features=FeatureSettings(dim=8, users=1000, items=1000, categories=100),
        ranker=RankerSettings(hidden=16, second=8, seed=seed),
    )  # fmt: skip
    rows = make_rows(stream, wait)
    rows = rows.take(rows.closed < stream.ts[-1])  # what is still to come at the end
    with tempfile.TemporaryDirectory() as folder:
        trainer = open_trainer(settings, Path(folder), lambda: START)
        try:
            for number, block in enumerate(make_blocks(rows, 4096, users=False)):
                trainer.offer(block, number)
                while trainer.step():
                    pass
            return _result(stream, trainer._evaluation.tasks["purchase"])
        finally:
            trainer.store.close()


def lines(seeds: tuple[int, ...] = (1, 2, 3)) -> list[str]:
    """A table in Markdown."""
    out = [
        "| strategy | `purchase_wait_ms` | predicted / actual, lowest | highest | error of the logit |",
        "|---|---|---|---|---|",
    ]
    for name, (_, wait) in STRATEGIES.items():
        results = [measure(name, seed) for seed in seeds]
        ratios = [r.ratio for r in results]
        error = np.mean([r.error for r in results])
        out.append(f"| {name} | {wait // HOUR} h | {min(ratios):.3f} | {max(ratios):.3f} | {error:.3f} |")
    return out


def _result(stream: Clicks, scores: TaskScores) -> Result:
    p = scores.state()["p"].astype(np.float64)  # in the order of the clicks
    last = slice(int(len(p) * (1 - LAST)), len(p))
    p, chance = p[last], stream.chance[: len(p)][last]
    error = np.log(p / (1 - p)) - np.log(chance / (1 - chance))
    return Result(float(p.sum() / chance.sum()), float(np.sqrt((error**2).mean())))


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
