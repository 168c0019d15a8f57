"""Fits a marketplace to one half of a log, simulates, and compares with the other half."""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict

from embedding_store.errors import LogError, UsageError
from replay.simulator.compare import ceiling, compare, evenly
from replay.simulator.fit import fit
from replay.simulator.fitted import FittedMarketplace, as_logged
from replay.simulator.run import Simulation
from replay.simulator.settings import SimulatorSettings
from replay.simulator.views import Views, views_of

SPLITS = ("time", "alternate", "users")
ENOUGH_VIEWS = 20_000  # simulated at least, so that luck of the simulation moves no figure by much


def check(views: Views, split: str = "time", settings: SimulatorSettings | None = None) -> dict[str, Any]:
    """The figures of `Likeness` of a world fitted to the first half of `views` against the second, and what they can
    be compared with: `ceiling` of the rank correlation and what a world of `even` popularity gives.

    `click_rate_z`: true click rate of the world less the held-out one, in standard errors of both halves together: the
    fit knows its half's rate no better than the other half its own.

    `split`: see `Views.halves`. By time, the world goes on where the first half ends; else it is of the same time.
    """
    if split not in SPLITS:
        raise UsageError(f"a log cannot be split by {split!r}; there are {', '.join(SPLITS)}")
    fitted_to, held_out = views.halves(split)
    if not len(fitted_to) or not len(held_out):
        raise LogError("this log is too short to be cut in two: check with a longer one")
    fitted = fit(fitted_to)
    world = FittedMarketplace(fitted, settings, turnover=split == "time")
    seconds = (int(held_out.ts.max()) - int(held_out.ts.min())) / 1000
    seconds *= max(1.0, ENOUGH_VIEWS / len(held_out))
    run = Simulation(world.settings, seconds=seconds, policy=as_logged, start_ms=int(held_out.ts.min()), world=world)
    likeness = compare(views_of(run), held_out, fitted.items.ids)
    return {
        "split": split, **asdict(likeness), "true_ctr": run.true_ctr, "fitted_click_rate": fitted.click_rate,
        "click_rate_z": _z(run.true_ctr, fitted_to, held_out),
        "ceiling": ceiling(fitted_to, held_out), "even": dict(evenly(held_out)),
    }  # fmt: skip


def _z(rate: float, fitted_to: Views, held_out: Views) -> float:
    variance = 0.0
    for views in (fitted_to, held_out):
        share = float(views.clicked.mean())
        variance += share * (1 - share) / len(views)
    return (rate - float(held_out.clicked.mean())) / variance**0.5
