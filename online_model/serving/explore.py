"""Which items are shown, and with which probability: the best, with a little chance for every other candidate.

Place by place: with probability ε the item is drawn uniformly from the candidates that are left, else it is the best of
them. The propensity of what was put in a place is therefore exact, given the places before it: ε/m + (1 − ε)·[it is the
best left], for m candidates left. Over all m they sum to 1, so inverse propensity weights are unbiased.
"""

from __future__ import annotations

import numpy as np


def explore(order: np.ndarray, k: int, epsilon: float, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """Fill min(k, n) places from `order`: int64 [n], candidates from the best to the worst.

    Returns the entries of `order` that are shown and the propensity of each in its place.
    """
    left = order.tolist()
    chance, draw = rng.random((2, min(k, len(left)))).tolist()
    shown, propensities = [], []
    for explores, u in zip(chance, draw, strict=True):
        m = len(left)
        index = int(u * m) if explores < epsilon else 0
        propensities.append(propensity(index, m, epsilon))
        shown.append(left.pop(index))
    return shown, propensities


def propensity(index: int, m: int, epsilon: float) -> float:
    """The probability that the candidate at `index` of the m that are left (0: the best) is put in the next place."""
    return min(1.0, epsilon / m + (1.0 - epsilon if index == 0 else 0.0))
