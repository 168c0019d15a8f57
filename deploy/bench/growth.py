"""`headrace bench growth`: what an event costs while one thing grows and all else stays.

Each point is a process of its own on one core (growth_store.py, growth_join.py, growth_serve.py say what is timed).
Costs are of processor time of all threads, RocksDB's compaction included, so that who else uses the machine counts
little; the clock is beside it.

An axis says what it should be: flat (an event costs the same whatever `x`: `expected` 0) or in proportion to `x` (1).
Between two neighbours the slope is that of the cost on two logarithmic scales. The knee is the first point where

- the slope is more than TOLERATED above what is expected, and the cost (over x ** expected) NOTED times the smallest
  before it: less is noise; or
- that cost is more than DOUBLE the smallest before it.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bench.common import machine, run_part
from embedding_store.errors import UsageError

TOLERATED, NOTED, DOUBLE = 0.1, 1.2, 2.0
SECONDS_A_THOUSAND = 0.05  # more than usual that a point may take, of each thousand of x


@dataclass(frozen=True)
class Axis:
    """One thing that grows."""

    name: str
    title: str
    x: str  # what is counted
    per: str  # what the cost is of
    module: str
    points: tuple[int, ...]
    expected: int = 0  # the exponent of the cost
    broker: bool = False  # its points need one
    cores: bool = False  # a core for each of x, as far as there are
    series: tuple[str, ...] = ()  # other figures of a point that are worth a line, µs


AXES = {axis.name: axis for axis in (
    Axis("ids", "Ids of a table, 250,000 rows in memory", "ids", "event", "growth_store",
         (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000),
         series=("lookup_us", "commit_us_a_row")),
    Axis("memory", "Room in the trainer's memory", "users and items", "row learned", "growth_serve",
         (10_000, 100_000, 1_000_000, 4_000_000)),
    Axis("users", "Users of a partition", "users", "event", "growth_join",
         (10_000, 100_000, 1_000_000, 10_000_000)),
    Axis("windows", "Open windows of a partition", "examples open", "event", "growth_join",
         (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)),
    Axis("busiest", "Impressions that one user has open", "impressions", "visit", "growth_join",
         (10, 100, 1_000, 10_000), expected=1),
    Axis("history", "What a user has done", "actions", "event", "growth_join", (10, 20, 50, 100, 200),
         series=("train_us_a_row",)),
    Axis("partitions", "Partitions of one join worker", "partitions", "event", "growth_join", (1, 2, 4, 8, 16)),
    Axis("candidates", "Candidates of a request", "candidates", "request", "growth_serve",
         (10, 50, 100, 500, 1_000, 5_000), expected=1),
    Axis("catalogue", "Items to recommend from", "items", "request", "growth_serve",
         (1_000, 10_000, 100_000, 300_000)),
    Axis("replicas", "Readers of `parameters`", "replicas", "version", "growth_serve", (1, 2, 4, 8, 16), expected=1,
         broker=True, series=("broker_us", "reader_us")),
    Axis("ranks", "Ranks of the trainer", "ranks", "row learned", "growth_serve", (1, 2), cores=True,
         series=("rank_0_us",)),
)}  # fmt: skip


def chosen(names: Iterable[str], largest: int) -> list[Axis]:
    """The axes of these names, all where there are none. Raises UsageError for one that is not there."""
    wanted = list(dict.fromkeys(names)) or list(AXES)
    for name in wanted:
        if name not in AXES:
            raise UsageError(f"there is no axis {name!r}: choose among {', '.join(AXES)}")
        if AXES[name].points[0] > largest:
            raise UsageError(f"the axis {name!r} begins with {AXES[name].points[0]:,}: try a larger --largest")
    return [AXES[name] for name in wanted]


def points_of(axis: Axis, largest: int) -> list[int]:
    """Of the axis, none above `largest`."""
    return [x for x in axis.points if x <= largest]


def bench_growth(
    axes: Sequence[Axis], largest: int, folder: Path | None, server: Callable[[], tuple[str, int]],
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of the command. `step` is called after each point and after the constants.

    folder: where the stores of a point are for as long as it runs; None: where temporary files are. `server`: makes
    (address, pid) of a broker.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        points = {}
        for x in points_of(axis, largest):
            points[f"{x}"] = _point(axis, x, folder, server)
            step()
        found[axis.name] = {"expected": axis.expected, "points": points, **judged(points, axis.expected)}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=folder) as own:
        constants = run_part("deploy.bench.growth_serve", "constants", folder=own, x=0)
    step()
    return {"axes": found, "constants": constants, "machine": machine()}


def _point(axis: Axis, x: int, folder: Path | None, server: Callable[[], tuple[str, int]]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if axis.broker:
        more["bootstrap"], more["broker"] = server()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=folder) as own:
        return run_part(
            f"deploy.bench.{axis.module}", axis.name, cores=x if axis.cores else 1, folder=own, x=x,
            seconds=SECONDS_A_THOUSAND * x / 1_000, **more,
        )  # fmt: skip


def judged(points: dict[str, dict[str, Any]], expected: int) -> dict[str, Any]:
    """Slopes between neighbours, of all points together, and the knee of points {x: {"cpu_us": cost, …}}."""
    xs = [int(x) for x in points]
    costs = [point["cpu_us"] for point in points.values()]
    slopes = [slope(*pair) for pair in itertools.pairwise(zip(xs, costs, strict=True))]
    at = knee(xs, costs, slopes, expected)
    return {
        "slopes": slopes,
        "slope": slope((xs[0], costs[0]), (xs[-1], costs[-1])) if len(xs) > 1 else None,
        "knee": at,
    }


def slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Of the line between two points (x, cost) on two logarithmic scales.

    >>> round(slope((10, 5.0), (1000, 50.0)), 3)
    0.5
    """
    return math.log(other[1] / one[1]) / math.log(other[0] / one[0])


def knee(xs: Sequence[int], costs: Sequence[float], slopes: Sequence[float], expected: int) -> int | None:
    """The first x where the cost leaves what is expected of it; None where it does not.

    >>> knee([1, 10, 100], [5.0, 5.1, 11.0], [0.01, 0.33], 0)
    100
    """
    each = [cost / x**expected for x, cost in zip(xs, costs, strict=True)]
    for number in range(1, len(xs)):
        rise = each[number] / min(each[:number])
        if rise > DOUBLE or (rise > NOTED and slopes[number - 1] > expected + TOLERATED):
            return xs[number]
    return None
