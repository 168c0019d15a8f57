"""Figures of off-policy evaluation: errors and coverage where the true value is known, and on Open Bandit."""

from __future__ import annotations

from typing import Any

import numpy as np

from replay.off_policy import estimators
from tests.figures.common import Bench, Line, Row, at_most, headrace, public, say
from tests.replay.bandit_worlds import World, estimates

RUNS = 500
COVER = (0.92, 0.97)
WORLDS = {
    "often": World(rate=0.3),
    "plain": World(),
    "model wrong": World(cross=1.2),
    "rare": World(rate=0.005, decisions=10_000),
    "users": World(rate=0.1, users=10),
    "far": World(logging=1.0, target=1.0),
    "far, model wrong": World(logging=1.0, target=1.0, cross=1.2),
    "too far": World(logging=1.5, target=1.5),
}
# Worlds in which the direct method is nearer to the truth, and why.
DM_WINS = "the model is right, and weights are what costs"


def _runs(bench: Bench, name: str) -> dict[str, Any]:
    """Errors [RUNS] of each estimator, whether each interval holds the truth, and how many runs could say nothing."""
    return bench.once(("off_policy", name), lambda: _run(name, WORLDS[name]))


def _run(name: str, world: World) -> dict[str, Any]:
    say(f"{name}: {RUNS} logs")
    errors: dict[str, list[float]] = {n: [] for n in estimators.NAMES}
    holds: dict[str, list[bool]] = {n: [] for n in estimators.NAMES if n != "dm"}
    for seed in range(RUNS):
        found, why = estimates(world, world.draw(seed))
        for n, one in found.items():
            errors[n].append(one.value - world.truth)
            if not why and n in holds:
                holds[n].append(one.low <= world.truth <= one.high)
    return {"rmse": {n: float(np.sqrt(np.mean(np.square(e)))) for n, e in errors.items()}, "holds": holds}


def error(bench: Bench) -> list[Row]:
    """Root mean squared error of DR against IPS and the direct method, in parts of the true value: 500 logs a world"""
    rows = []
    for name, world in WORLDS.items():
        rmse = {n: e / world.truth for n, e in _runs(bench, name)["rmse"].items()}
        for other in ("ips", "dm"):
            what = f"{name}: dr over {other} ({rmse['dr']:.4f} / {rmse[other]:.4f}; snips {rmse['snips']:.4f})"
            rows.append(at_most(what, rmse["dr"] / rmse[other], 1.0, short=DM_WINS if other == "dm" else ""))
    return rows


def coverage(bench: Bench) -> list[Row]:
    """95 % intervals hold the true value: share of the logs whose verdict is “estimable”"""
    low, high = COVER
    rows = []
    for name in WORLDS:
        for estimator, holds in _runs(bench, name)["holds"].items():
            said = f"{name}: {estimator}, {len(holds)} of {RUNS} logs estimable"
            if len(holds) < RUNS // 10:
                rows.append(Row(said, "–", "not estimable, or 92 to 97 %", True))
                continue
            share = float(np.mean(holds))
            rows.append(Row(said, f"{share:.1%}", f"{low:.0%} to {high:.0%}", low <= share <= high))
    return rows


def openbandit(bench: Bench) -> list[Row]:
    """Open Bandit: the click rate of the real bandit, from the random log, holds what its own log says"""
    folder = bench.empty("off-policy")
    random, bandit = public("open-bandit/random_men.csv.gz"), public("open-bandit/bts_men.csv.gz")
    truth = headrace(folder, "estimate", "openbandit", bandit, "--policy", "logged")["logged"]["value"]
    found = headrace(folder, "estimate", "openbandit", random, "--policy", "served", "--served", bandit)["estimates"]
    rows = []
    for name, one in found.items():
        if not one["estimable"]:
            rows.append(
                Row(f"{name} {one['value']:.5f}", f"not estimable: {one['why']}", "an interval, or a reason", True)
            )
            continue
        seen = f"{one['value']:.5f} ({one['low']:.5f} to {one['high']:.5f}), ESS {one['ess']:.0f}"
        rows.append(Row(name, seen, f"holds {truth:.5f}", one["low"] <= truth <= one["high"]))
    return rows


LINES: dict[str, Line] = {"error": error, "coverage": coverage, "openbandit": openbandit}
