"""How like a log a simulated one is: figures, each with what it can be compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from msgspec import Struct

from replay.simulator.views import Views

DEALS = 20  # for what chance alone gives


class Likeness(Struct, kw_only=True, frozen=True):
    """A simulated log against one that was held out. None: the log has nothing of it.

    `click_rate_interval`: Wilson's (1927), 95 %, of the held-out rate. `watch_ks`: of watch times, ms;
    `watch_share_ks`: of play / duration. `rank_correlation`: Spearman's, of how often items were shown.
    `popularity_curve`: Spearman's of the views of the most shown item, the second, …, whichever they are;
    `popularity_ks`: of the numbers of views of an item.
    """

    views: int
    held_out_views: int
    click_rate: float
    held_out_click_rate: float
    click_rate_interval: tuple[float, float]
    click_rate_ratio: float
    watch_ks: float | None
    watch_share_ks: float | None
    rank_correlation: float | None
    popularity_curve: float | None
    popularity_ks: float


def compare(simulated: Views, held_out: Views, known: Collection[str | int] | None = None) -> Likeness:
    """See `Likeness`. `known`: the items that the ranks are compared over; None: all that either has."""
    rate, real = float(simulated.clicked.mean()), float(held_out.clicked.mean())
    mine, other = (per_item(side) for side in (simulated.where(slice(len(held_out))), held_out))  # as many views
    shared = mine.keys() | other.keys() if known is None else known
    curve = [np.sort(np.array(list(views.values())))[::-1] for views in (mine, other)]
    most = min(len(curve[0]), len(curve[1]))
    return Likeness(
        views=len(simulated), held_out_views=len(held_out), click_rate=rate, held_out_click_rate=real,
        click_rate_interval=wilson(int(held_out.clicked.sum()), len(held_out)), click_rate_ratio=rate / real,
        watch_ks=_watch_ks(simulated, held_out, share=False), watch_share_ks=_watch_ks(simulated, held_out, share=True),
        rank_correlation=spearman(*(np.array([views.get(item, 0) for item in shared]) for views in (mine, other))),
        popularity_curve=spearman(curve[0][:most], curve[1][:most]), popularity_ks=ks(curve[0], curve[1]),
    )  # fmt: skip


def per_item(views: Views) -> dict[str | int, int]:
    """How often each item was shown."""
    counts = np.bincount(views.item, minlength=len(views.items))
    return {views.items[n]: int(counts[n]) for n in np.flatnonzero(counts).tolist()}


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a rate (Wilson 1927)."""
    rate, shrink = hits / n, 1 + z * z / n
    middle, half = rate + z * z / (2 * n), z * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))
    return (middle - half) / shrink, (middle + half) / shrink


def ks(first: np.ndarray, second: np.ndarray) -> float:
    """The largest distance of two empirical distributions (Kolmogorov and Smirnov)."""
    first, second = np.sort(first), np.sort(second)
    values = np.concatenate([first, second])
    below = (np.searchsorted(side, values, "right") / len(side) for side in (first, second))
    return float(np.abs(np.subtract(*below)).max())


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """The correlation of the ranks, ties with their mean rank; None where one side is all ties."""
    ranks = [_ranks(side) for side in (first, second)]
    if len(first) < 2 or any(side.std() == 0 for side in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def ceiling(fitted_to: Views, held_out: Views) -> dict[str, float | None]:
    """What a simulator cannot well beat in `rank_correlation`, over the items of the part that it is fitted to.

    `parts`: the popularity in the one part against that in the other. `chance`: the same where the views are dealt out
    to two parts at random (the mean of some deals): how far luck alone moves the ranks.
    """
    pooled = np.concatenate([fitted_to.item, held_out.item])
    found = []
    for seed in range(DEALS):
        dealt = np.random.default_rng(seed).permutation(pooled)
        found.append(_stable(dealt[: len(fitted_to)], dealt[len(fitted_to) :]))
    known = [value for value in found if value is not None]
    return {
        "parts": _stable(fitted_to.item, held_out.item), "chance": float(np.mean(known)) if known else None,
    }  # fmt: skip


def _stable(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation of the views of the items of `first` (numbers) in both."""
    items, counts = np.unique(first, return_counts=True)
    return spearman(counts, np.bincount(second, minlength=int(items.max()) + 1)[items])


def evenly(held_out: Views) -> Mapping[str, float | None]:
    """What a world in which all items are shown alike gives: a figure that it reaches too says nothing."""
    items = len(np.unique(held_out.item))
    drawn = np.bincount(np.random.default_rng(0).integers(0, items, len(held_out)), minlength=items)
    curves = np.sort(drawn)[::-1], np.sort(list(per_item(held_out).values()))[::-1]
    return {"popularity_curve": spearman(*curves), "popularity_ks": ks(drawn[drawn > 0], curves[1])}


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _watch_ks(simulated: Views, held_out: Views, share: bool) -> float | None:
    sides = []
    for views in (simulated, held_out):
        chosen = (views.play_ms >= 0) & ((views.duration_ms > 0) | (not share))
        sides.append(views.play_ms[chosen] / (views.duration_ms[chosen] if share else 1))
    return ks(sides[0], sides[1]) if all(len(side) for side in sides) else None
