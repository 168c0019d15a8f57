"""Coin flips that depend on what they are for, and on nothing that was flipped before.

Two worlds of one seed flip the same coins for the same user, request and place on the page, whatever was shown there
and in whatever order the pages came (common random numbers: Glasserman and Yao 1992). So two recommenders differ by
what they show and not by luck.
"""

from __future__ import annotations

import numpy as np

from embedding_store.ids import GOLDEN, finalised

_UNIT = 2.0**-53


def coins(seed: int, user: int, request: int, slots: int, purposes: int) -> np.ndarray:
    """Uniform numbers in (0, 1), float64 [purposes, slots]: splitmix64 of all that names them."""
    base = ((seed * 0x9E3779B97F4A7C15) ^ (user * 0xC2B2AE3D27D4EB4F) ^ (request * 0x165667B19E3779F9)) & (2**64 - 1)
    counter = np.arange(purposes * slots, dtype=np.uint64).reshape(slots, purposes).T  # a slot's do not depend on slots
    x = finalised(finalised(np.uint64(base) + counter * GOLDEN) + GOLDEN)
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * _UNIT
