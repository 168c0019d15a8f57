"""Compiled loops over candidates: what features.py and neighbours.py say in words. Trainer and replica both call them.

A request has hundreds of candidates, each with some numbers out of twenty entries of a history: whole-array operations
spend their time on what lies between two of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from embedding_store.compiled import compiled

_SPARSE = 16  # bits for each id of what rules others out
_MOST_BITS = 17

_Ids = types.Array(types.int64, 1, "C", readonly=True)
_IdRows = types.Array(types.int64, 2, "C", readonly=True)
_Doubles = types.Array(types.float64, 1, "C", readonly=True)
_DoubleRows = types.Array(types.float64, 2, "C", readonly=True)
_FloatRows = types.Array(types.float32, 2, "C", readonly=True)
_Out = types.Array(types.float32, 2, "C")


@compiled(_FloatRows, _IdRows, _Ids, _Ids, _Out, types.int64)
def match(recency, entries, own, ctx, out, at):
    """out[i, at], out[i, at + 1]: of the entries of context ctx[i] that are `own[i]`, the largest recency, and their
    share of all recency. recency float32 [B, H], entries int64 [B, H], own, ctx int64 [N]; an id 0 is like no other."""
    for i in range(len(own)):
        b, best, alike, total = ctx[i], 0.0, 0.0, 1e-6
        for j in range(recency.shape[1]):
            total += recency[b, j]
            if own[i] != 0 and entries[b, j] == own[i]:
                best = max(best, recency[b, j])
                alike += recency[b, j]
        out[i, at] = best
        out[i, at + 1] = alike / total


@compiled(_Ids, _Ids, _Ids, types.float64, types.float64, _Out)
def rate(impressions, clicks, interactions, usual, logs, out):
    """The numbers of `features.rates` into out float32 [n, 4]."""
    strength, bias = 1 / (usual * (1 - usual)), np.log(usual / (1 - usual))
    for i in range(len(impressions)):
        shown = impressions[i]
        # A late click may be of an impression that was not learned.
        own = (min(clicks[i], shown) + usual * strength) / (shown + strength)
        out[i, 0] = np.log(own / (1 - own)) - bias
        out[i, 1] = np.log1p(np.float64(shown)) / logs
        out[i, 2] = np.log1p(np.float64(interactions[i])) / logs
        out[i, 3] = shown == 0 and interactions[i] == 0


@njit
def _bits(ids):
    """bool [2^k] that is true at the last k bits of each id: most others are ruled out by a look at it."""
    k = 1
    while k < _MOST_BITS and 1 << k < len(ids) * _SPARSE:
        k += 1
    known = np.zeros(1 << k, np.bool_)
    for id_ in ids:
        known[id_ & (len(known) - 1)] = True
    return known


@njit
def _place(ids, id_):
    """Where `id_` stands in ascending `ids`; -1: nowhere."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < id_:
            low = middle + 1
        else:
            high = middle
    return low if low < len(ids) and ids[low] == id_ else -1


@njit
def _entries(past, near, ids):
    """By the place of an id in `ids`: where its entries begin; of each entry its history, and how much it weighs."""
    first = np.zeros(len(ids) + 1, np.int64)
    for b in range(len(past)):
        for j in range(past.shape[1]):
            if near[b, j] != 0:
                first[_place(ids, past[b, j]) + 1] += 1
    first = np.cumsum(first)
    end, history, weight = first.copy(), np.empty(first[-1], np.int64), np.empty(first[-1])
    for b in range(len(past)):
        for j in range(past.shape[1]):
            if near[b, j] != 0:
                place = _place(ids, past[b, j])
                history[end[place]], weight[end[place]] = b, near[b, j]
                end[place] += 1
    return first, history, weight


@njit
def _add(sums, entries, h, c, similarity):
    """A pair's similarity to all histories that have its item h."""
    first, history, weight = entries
    for e in range(first[h], first[h + 1]):
        sums[history[e], c] += weight[e] * similarity


@compiled(
    _IdRows, _DoubleRows, _Ids, _IdRows, _DoubleRows, _Doubles, _Ids, _IdRows, _DoubleRows, _Doubles, types.float64,
    _Out,
)  # fmt: skip
def similarities(past, near, h_ids, h_items, h_weights, h_taken, c_ids, c_items, c_weights, c_taken, shrink, out):
    """out float32 [B, c]: what histories say of candidates (neighbours.py), by the lists of the histories' m items
    (h_…) and those of the c candidates (c_…), ids ascending. past int64 [B, H]; near float64 [B, H]: their weights.
    """
    entries, sums = _entries(past, near, h_ids), np.zeros(out.shape)
    known = _bits(c_ids)
    for h in range(len(h_ids)):
        for k in range(h_items.shape[1]):
            if h_items[h, k] != 0 and known[h_items[h, k] & (len(known) - 1)]:
                c = _place(c_ids, h_items[h, k])
                if c >= 0:
                    _add(sums, entries, h, c, h_weights[h, k] / (np.sqrt(h_taken[h] * c_taken[c]) + shrink))
    known = _bits(h_ids)
    for c in range(len(c_ids)):
        for k in range(c_items.shape[1]):
            if c_items[c, k] != 0 and known[c_items[c, k] & (len(known) - 1)]:
                h = _place(h_ids, c_items[c, k])
                if h >= 0 and h_ids[h] != c_ids[c]:  # an item and itself: once
                    _add(sums, entries, h, c, c_weights[c, k] / (np.sqrt(h_taken[h] * c_taken[c]) + shrink))
    out[:] = sums
