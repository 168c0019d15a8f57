"""Row-wise Adagrad over a table in host memory, in one pass: the compiled loop of `cpu_kernel`.

fbgemm's CPU backward takes about 1 µs a distinct row; here it is 0.05 to 0.1. Rows lie far apart in memory, so they are
asked for a few ahead. What a row becomes depends on its own weights, state and gradients in the order of their
positions, and on nothing else: not on its number, nor on the other rows. So a run that was restored into other row
numbers goes on bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from embedding_store.compiled import compiled, prefetch

FREE = -1  # what `place` holds before and after

_AHEAD_PLACE, _AHEAD_ROW = 32, 4  # how far ahead memory is asked for, positions and rows
_LINE = 16  # float32 of a cache line

_Rows = types.Array(types.int64, 1, "C", readonly=True)
_Floats = types.Array(types.float32, 1, "C")
_Matrix = types.Array(types.float32, 2, "C")
_Gradients = types.Array(types.float32, 2, "C", readonly=True)
_Places = types.Array(types.int32, 1, "C")


@njit
def _by_row(rows, place, distinct, first, after):
    """The distinct rows in the order of their first positions, and the next position after each; how many they are."""
    n, count = len(rows), 0
    last = np.empty(n, np.int32)
    for i in range(n):
        if i + _AHEAD_PLACE < n:
            prefetch(place, rows[i + _AHEAD_PLACE])
        row = rows[i]
        at = place[row]
        after[i] = FREE
        if at == FREE:
            place[row] = count
            distinct[count], first[count], last[count] = row, i, i
            count += 1
        else:
            after[last[at]] = i
            last[at] = i
    return count


@njit
def _sum(gradients, i, after, g):
    """g = the sum of the gradients at position i and those after it."""
    for d in range(len(g)):
        g[d] = gradients[i, d]
    i = after[i]
    while i != FREE:
        for d in range(len(g)):
            g[d] += gradients[i, d]
        i = after[i]


@njit
def _squares(g):
    """The sum of squares, as four sums in a fixed order: alike on every machine."""
    a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for d in range(0, len(g), 4):
        a += g[d] * g[d]
        b += g[d + 1] * g[d + 1]
        c += g[d + 2] * g[d + 2]
        e += g[d + 3] * g[d + 3]
    return (a + b) + (c + e)


@njit
def _ask(weights, state, row, dim):
    """The row's cache lines are on their way."""
    prefetch(state, row)
    for line in range(0, dim, _LINE):
        prefetch(weights, row * dim + line)


@compiled(_Matrix, _Floats, _Rows, _Gradients, _Places, types.float32, types.float32)
def step(weights, state, rows, gradients, place, rate, eps):
    """One step of Gupta et al. 2014 (arXiv 1405.1665), the gradients of a row summed first; row 0 is left as it is.

    weights: float32 [R, D], D a multiple of 4; state: float32 [R]; rows: int64 [n] below R, may repeat; gradients:
    float32 [n, D]; place: int32 [R], all FREE. Changes weights and state in place.
    """
    n, dim = gradients.shape
    distinct, first, after = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32)
    count = _by_row(rows, place, distinct, first, after)
    flat, g = weights.reshape(-1), np.empty(dim, np.float32)
    share = np.float32(1) / np.float32(dim)
    for k in range(count):
        if k + _AHEAD_ROW < count:
            _ask(flat, state, distinct[k + _AHEAD_ROW], dim)
        row = distinct[k]
        place[row] = FREE
        if row == 0:
            continue
        _sum(gradients, first[k], after, g)
        moment = state[row] + _squares(g) * share
        state[row] = moment
        factor = -rate / (np.sqrt(moment) + eps)
        for d in range(dim):
            weights[row, d] += factor * g[d]
