"""The row map's inner loops, compiled: an open-addressing hash table over flat arrays. Nothing of it is for others.

slots int64 [2 · size]: pairs (id, row), an empty one is (0, 0); size is a power of two, `mask` is size − 1. An id lies
at or after its home, its hash & mask, with no empty slot between (linear probing, so mostly in one cache line).

The hash is simple tabulation (Pătraşcu and Thorup, STOC 2011): one word out of each of eight tables of 256 random
words, xored. Whatever the ids are, as long as they were chosen without knowing the tables, a search takes constant time
expected, as with a random function; no fixed mix can say that of ids that were made to collide. The tables are drawn
anew for each map; what a map answers does not depend on them.

Memory latency is the cost (a table of millions of rows is far larger than the caches), so ids go in groups: all of a
group are hashed and their slots asked for, then all are compared.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from embedding_store.compiled import compiled, prefetch

TABLES = (8, 256)  # shape of the random words, uint64
_GROUP = 64
_BYTES, _BYTE = np.uint64(8), np.uint64(255)

_Ids = types.Array(types.int64, 1, "C", readonly=True)
_Words = types.Array(types.uint64, 2, "C")
_Ints = types.Array(types.int64, 1, "C")


@njit
def hash_id(x, tables):
    """uint64 of an int64 (also elementwise, as `hash_id.py_func`). tables: uint64 [8, 256]."""
    rest = np.uint64(x)
    out = tables[0, rest & _BYTE]
    for k in range(1, 8):
        rest = rest >> _BYTES
        out = out ^ tables[k, rest & _BYTE]
    return out


@njit
def _ask(ids, start, stop, slots, tables, mask, at):
    """The homes of ids[start:stop] into `at`, their cache lines on the way."""
    for i in range(start, stop):
        home = np.int64(hash_id(ids[i], tables)) & mask
        at[i - start] = home
        prefetch(slots, 2 * home)


@njit
def _walk(x, at, slots, mask):
    """From slot `at` on: the one that holds x, or the first that is empty."""
    while slots[2 * at] != x and slots[2 * at] != 0:
        at = (at + 1) & mask
    return at


@compiled(_Ids, _Ints, _Words, types.int64, _Ints)
def find(ids, slots, tables, mask, rows):
    """rows[i] = the row of ids[i], 0 where it has none; how many have none."""
    at, absent = np.empty(_GROUP, np.int64), 0
    for start in range(0, len(ids), _GROUP):
        stop = min(start + _GROUP, len(ids))
        _ask(ids, start, stop, slots, tables, mask, at)
        for i in range(start, stop):
            row = slots[2 * _walk(ids[i], at[i - start], slots, mask) + 1]
            rows[i] = row
            absent += row == 0
    return absent


@compiled(_Ids, _Ids, _Ints, _Words, types.int64)
def insert(ids, rows, slots, tables, mask):
    """Puts ids that are not there (distinct, none 0) with their rows. More than half of the slots stay empty."""
    at = np.empty(_GROUP, np.int64)
    for start in range(0, len(ids), _GROUP):
        stop = min(start + _GROUP, len(ids))
        _ask(ids, start, stop, slots, tables, mask, at)
        for i in range(start, stop):
            slot = _walk(0, at[i - start], slots, mask)
            slots[2 * slot], slots[2 * slot + 1] = ids[i], rows[i]


@compiled(_Ids, _Ints, _Words, types.int64, _Ints)
def remove(ids, slots, tables, mask, rows):
    """Takes ids (distinct) out: rows[i] = the row that ids[i] had, or 0.

    Nothing is left behind: ids after the hole whose home is not after it move up (Knuth, volume 3, 6.4, algorithm R).
    """
    at = np.empty(_GROUP, np.int64)
    for start in range(0, len(ids), _GROUP):
        stop = min(start + _GROUP, len(ids))
        _ask(ids, start, stop, slots, tables, mask, at)
        for i in range(start, stop):
            hole = _walk(ids[i], at[i - start], slots, mask)
            rows[i] = slots[2 * hole + 1]
            if rows[i] == 0:
                continue
            next_ = (hole + 1) & mask
            while slots[2 * next_] != 0:
                home = np.int64(hash_id(slots[2 * next_], tables)) & mask
                if ((next_ - home) & mask) >= ((next_ - hole) & mask):
                    slots[2 * hole], slots[2 * hole + 1] = slots[2 * next_], slots[2 * next_ + 1]
                    hole = next_
                next_ = (next_ + 1) & mask
            slots[2 * hole], slots[2 * hole + 1] = 0, 0
