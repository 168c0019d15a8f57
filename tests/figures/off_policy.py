"""Figures of off-policy evaluation: errors and coverage where the true value is known, and on Open Bandit."""

from __future__ import annotations

from typing import Any

import numpy as np

from replay.off_policy import estimators
from replay.simulator.marketplace import Marketplace, Request
from replay.simulator.run import Simulation
from replay.simulator.settings import SimulatorSettings
from streams.events import encode
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
DM_WINS = {"far", "too far"}  # the direct method is nearer to the truth …
WHY = "the model is right, and weights are what costs"  # … and why
# A shop in which nothing comes and goes.
SHOP = SimulatorSettings(
    seed=5, users=1000, items=60, requests_per_s=50.0, item_life_s=1e7, restock_s=0.01, taste_turn_s=1e7
)
EVENTS = 40_000
OTHERWISE = (
    "users and the other places of a page are as the log's policy left them: what was seen before is clicked less"
)


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
            rows.append(
                at_most(what, rmse["dr"] / rmse[other], 1.0, short=WHY if other == "dm" and name in DM_WINS else "")
            )
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


class Even:
    """Any items, each as likely; `k` of them a page (None: as many as asked for).

    `other` is asked too: what it would have earned with one item in the first place, on the very requests, is `would`.
    """

    def __init__(self, k: int | None, other: Even | None = None) -> None:
        self._k, self._other, self._would = k, other, [0.0, 0.0]

    def __call__(self, world: Marketplace, request: Request) -> tuple[list[str | int], list[float] | None]:
        items = [item.item for item in world.catalogue()]
        if self._other is not None:
            place = [0 if request.positions is None else request.positions[0]] * len(items)
            rates = world.click_probabilities(
                request.user, items, request.ts, request.scenario, request.query, positions=place
            )
            self._would[0] += float(np.average(rates, weights=self._other.scores(world, request, items)))
            self._would[1] += 1
        dice, left = np.random.default_rng([9, request.number]), self.scores(world, request, items)
        page: list[str | int] = []
        chances: list[float] = []
        for _ in range(self._k or request.k):
            at = int(dice.choice(len(items), p=left / left.sum()))
            page.append(items[at])
            chances.append(float(left[at] / left.sum()))
            left[at] = 0
        return page, chances

    @property
    def would(self) -> float:
        return self._would[0] / self._would[1]

    def scores(self, world: Marketplace, request: Request, items: list[str | int]) -> np.ndarray:
        """float64 [items]: how likely each is, beside the others."""
        return np.ones(len(items))


class Better(Even):
    """Items by their mean true click rate at the start: in proportion to exp of its standardised logarithm."""

    _scores: dict[str | int, float] | None = None

    def scores(self, world: Marketplace, request: Request, items: list[str | int]) -> np.ndarray:
        if self._scores is None:
            first, users = [0] * len(items), [f"u{user}" for user in range(0, SHOP.users, 20)]
            rates = [world.click_probabilities(user, items, request.ts, positions=first) for user in users]
            logs = np.log(np.mean(rates, axis=0))
            self._scores = dict(zip(items, np.exp((logs - logs.mean()) / logs.std()), strict=True))
        return np.array([self._scores.get(item, 1.0) for item in items])


def simulator(bench: Bench) -> list[Row]:
    """The simulator: DR from one policy's log holds the true click rate of another on the same requests"""
    rows = []
    for k in (1, None):
        say(f"pages of {k or 'as many items as asked for'}")
        folder = bench.empty("off-policy-shop")
        truth, served = {}, {}
        for one, other in ((Even, Better), (Better, Even)):
            policy = one(k, other(k))
            run = Simulation(SHOP, events=EVENTS, policy=policy)
            (folder / one.__name__).write_bytes(b"".join(encode(record) + b"\n" for record in run))
            truth[other], served[one] = policy.would, run.true_ctr
        for one, other in ((Even, Better), (Better, Even)):
            logs = [folder / policy.__name__ for policy in (one, other)]
            found = headrace(folder, "estimate", "events", logs[0], "--policy", "served", "--served", logs[1])
            dr = found["estimates"]["dr"]
            seen = f"{dr['low']:.4f} to {dr['high']:.4f}" if dr["estimable"] else f"not estimable: {dr['why']}"
            what = f"pages of {'one item' if k else 'many items'}: {other.__name__.lower()} from {one.__name__.lower()}"
            wanted = [("had it served itself", served[other], OTHERWISE)]
            if k:
                wanted.insert(0, ("on these requests", truth[other], ""))
            for where, rate, short in wanted:
                holds = not dr["estimable"] or dr["low"] <= rate <= dr["high"]
                rows.append(Row(f"{what}, {where}", seen, f"{rate:.4f}", holds, short))
    return rows


LINES: dict[str, Line] = {"error": error, "coverage": coverage, "openbandit": openbandit, "simulator": simulator}
