"""Items that are clicked after one another: what an item's row keeps of it, and what candidates have of it.

A click of c by somebody whose recent items are H counts as a co-click of c with each of H, the more the nearer (NEAR to
the power of its place), in c's own list: its row changes anyway. The list keeps the KEPT items that weigh most; all of
it halves every HALF_LIFE_S. A pair's similarity is the cosine of what both lists say of it, shrunk where little is
known (item-based kNN, Sarwar et al., WWW 2001; over the last items in place of a session as in Ludewig and Jannach,
"Evaluation of session-based recommendation algorithms", 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from online_model.history import HISTORY, RECENT
from online_model.kernels import similarities

KEPT = 24  # neighbours of an item
NEAR, SHRINK, HALF_LIFE_S = 0.8, 10.0, 2_592_000
NEIGHBOURS = 2  # numbers of a candidate
_NEAR = NEAR ** np.concatenate((np.arange(RECENT), np.arange(HISTORY - RECENT))).astype(np.float64)


@dataclass
class Lists:
    """What the rows of m distinct items, ascending, keep, all of it as of one moment."""

    ids: np.ndarray  # int64 [m] of the items; 0: none
    items: np.ndarray  # int64 [m, KEPT] ids of the neighbours, 0 none
    weights: np.ndarray  # float64 [m, KEPT]
    taken: np.ndarray  # float64 [m] clicks of the item itself


def near(items: np.ndarray) -> np.ndarray:
    """How much the entries of histories weigh, int64 [B, HISTORY] ids → float64: by their place in their list. An item
    counts at its first place only."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, 1)
    again = np.zeros(items.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    return np.where(again | (items == 0), 0, _NEAR)


def lists_of(ids: np.ndarray, column: Callable[[str], np.ndarray], now_ms: int) -> Lists:
    """Lists of the items `ids` as of `now_ms`, out of the columns of their rows, by name."""
    since = column("heat_ms")
    weights, taken = left(column("nearness"), since, now_ms), left(column("taken"), since, now_ms)
    return Lists(ids, column("neighbours"), weights, taken)


def left(numbers: np.ndarray, since: np.ndarray, now_ms: int) -> np.ndarray:
    """What is left at `now_ms` of numbers [m] or [m, k] as of `since` (ms UTC, [m]): float64."""
    share = 0.5 ** (np.maximum(now_ms - since, 0) / (1000 * HALF_LIFE_S))
    return numbers * share.reshape(-1, *(1,) * (numbers.ndim - 1))


def added(
    items: np.ndarray, weights: np.ndarray, owner: np.ndarray, other: np.ndarray, amount: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lists [m, KEPT] with p co-clicks more: of list `owner` with the item `other`, int64 [p] each, weighing `amount`.

    The same whatever the order of the co-clicks: they are added up before the smallest go, and of those alike the ones
    with the larger ids. The heaviest come first.
    """
    of, place = np.nonzero(items)
    of, every = np.concatenate((of, owner)), np.concatenate((items[of, place], other))
    amount = np.concatenate((weights[items != 0], amount))
    order = np.lexsort((amount, every, of))
    of, every, amount = of[order], every[order], amount[order]
    new = np.ones(len(of), bool)
    new[1:] = (of[1:] != of[:-1]) | (every[1:] != every[:-1])
    first = np.flatnonzero(new)
    of, every, amount = of[first], every[first], np.add.reduceat(amount, first) if len(first) else amount
    order = np.lexsort((every, -amount, of))
    of, every, amount = of[order], every[order], amount[order]
    place = np.arange(len(of)) - np.searchsorted(of, of)
    kept = place < KEPT
    out = np.zeros_like(items), np.zeros(items.shape)
    for column, values in zip(out, (every, amount), strict=True):
        column[of[kept], place[kept]] = values[kept]
    return out


def similar(past: np.ndarray, item: np.ndarray, lists: Callable[[np.ndarray], Lists]) -> tuple[np.ndarray, np.ndarray]:
    """What histories say of candidates: (float32 [B, c], the sum of the entries' similarities by their places, of each
    history and each distinct item; which of these each candidate is, int64 [N]).

    past: int64 [B, HISTORY] ids, 0 none; item: int64 [N] ids; lists: of ids int64 [m], distinct and ascending.
    """
    ids, column = np.unique(item, return_inverse=True)
    histories, candidates = lists(np.unique(past[past != 0])), lists(ids)
    out = np.empty((len(past), len(ids)), np.float32)
    of_histories, of_candidates = ((one.ids, one.items, one.weights, one.taken) for one in (histories, candidates))
    similarities(past, near(past), *of_histories, *of_candidates, SHRINK, out)
    return out, column


def neighbour_numbers(similarity: np.ndarray) -> np.ndarray:
    """Numbers float32 [..., NEIGHBOURS] of similarities [...]: as they are, and as logarithms, which rare ones need."""
    return np.stack((similarity, np.log1p(100 * similarity) / 3), -1)
