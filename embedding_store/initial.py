"""The first weights of a row: a function of its feature id and the table's settings, and of nothing else.

Not of the row's number, the time or the batch: so replays agree, and a row that was forgotten begins as it did before.
Whole numbers, and sums and products of floats, which all machines round alike: no logarithm or cosine, whose last bit
hangs on the library.
"""

from __future__ import annotations

import numpy as np

from embedding_store.ids import GOLDEN, finalised
from embedding_store.specs import TableSettings

_UNIFORM_BITS = 24  # as many as a float32 can tell apart
_PART_BITS, _PARTS = 16, 12  # a normal number is made of so many parts of hashes
# Teichroew's polynomial (1953; Abramowitz and Stegun 26.8.6 c): odd powers of (sum of 12 uniforms − 6) / 4 → normal.
_TEICHROEW = (3.949846138, 0.252408784, 0.076542912, 0.008355968, 0.029899776)


def first_weights(settings: TableSettings, ids: np.ndarray) -> np.ndarray:
    """What new rows of `ids` int64 [n] start from, float32 [n, dim] by `settings.initialiser`; an id 0 stays zero.

    Where two tables are multiplied and both start from zero, their products have no gradient: one of them must not.
    """
    scale, dim = settings.init_scale, settings.dim
    if settings.initialiser == "zero":
        return np.zeros((len(ids), dim), np.float32)
    keys = ids.astype(np.uint64) + finalised(np.array([settings.init_seed], np.uint64))  # of seed 0 the id itself
    if settings.initialiser == "signs":
        out = _signs(keys, dim) * np.float32(scale)
    else:
        draw = _uniform if settings.initialiser == "uniform" else _normal
        out = (draw(finalised(keys + GOLDEN), dim) * scale).astype(np.float32)
    out[ids == 0] = 0
    return out


def _signs(keys: np.ndarray, dim: int) -> np.ndarray:
    """uint64 [n] → −1 or 1 by the bits of hashes, float32 [n, dim]."""
    words = np.arange(1, -(-dim // 64) + 1, dtype=np.uint64)
    hashed = finalised(keys[:, None] + words + GOLDEN)
    bits = np.unpackbits(hashed.astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :dim]
    return bits.astype(np.float32) * 2 - 1


def _uniform(keys: np.ndarray, dim: int) -> np.ndarray:
    """Hashed keys uint64 [n] → float64 [n, dim] in (−1, 1)."""
    steps = _stream(keys, dim) >> np.uint64(64 - _UNIFORM_BITS)
    return (steps.astype(np.float64) + 0.5) * 2.0 ** (1 - _UNIFORM_BITS) - 1


def _normal(keys: np.ndarray, dim: int) -> np.ndarray:
    """Hashed keys uint64 [n] → float64 [n, dim], normal with variance 1, off by 2e-4 at most inside of ±3."""
    words = _PARTS * _PART_BITS // 64
    parts = _stream(keys, dim * words).astype("<u8").view("<u2").reshape(len(keys), dim, _PARTS)
    total = (parts.sum(2, dtype=np.int64) + _PARTS / 2) * 2.0**-_PART_BITS  # each is the middle of its step
    r = (total - _PARTS / 2) / 4
    square, out = r * r, np.zeros_like(r)
    for factor in reversed(_TEICHROEW):
        out = out * square + factor
    return out * r


def _stream(keys: np.ndarray, n: int) -> np.ndarray:
    """The first n numbers of splitmix64 (Steele et al., OOPSLA 2014) from each seed: uint64 [m] → uint64 [m, n]."""
    return finalised(keys[:, None] + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN)
