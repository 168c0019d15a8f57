"""Feature ids: what is a string or an integer outside is a 64-bit hash inside, with the feature's name mixed in.

No modulo is taken anywhere, so two ids meet only if their 64-bit hashes do (about 3e-8 for a million ids).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

_SIGN, _WRAP = 1 << 63, 1 << 64
_MASK = _WRAP - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN = np.uint64(_GOLDEN)  # 2^64 over the golden ratio


def feature_id(feature: str, raw: str | int) -> int:
    """The signed 64-bit id of `raw` under `feature`; never 0, which is the id of padding and of the default
    row. 7 and "7" are the same id.

    >>> feature_id("item", 7) == feature_id("item", "7") != feature_id("user", 7)
    True
    """
    return hash_text(f"{feature}\x00{raw}")


def feature_ids(feature: str, raw: Iterable[str | int]) -> np.ndarray:
    """`feature_id` of each: int64 [n]; a request has hundreds.

    >>> feature_ids("item", [7, "seven"]).tolist() == [feature_id("item", 7), feature_id("item", "seven")]
    True
    """
    digest, prefix = xxhash.xxh3_64_intdigest, f"{feature}\x00"
    ids = np.array([digest(f"{prefix}{one}".encode("utf-8", "surrogatepass")) for one in raw], np.uint64).view(np.int64)
    ids[ids == 0] = 1
    return ids


def hash_text(text: str) -> int:
    """xxh3 of the UTF-8 text, as a signed 64-bit integer, 0 replaced by 1."""
    value = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
    return (value - _WRAP if value & _SIGN else value) or 1


def combine(first: int, second: int) -> int:
    """The signed 64-bit id of a pair of integers of 64 bits, signed or not; never 0.

    splitmix64's finaliser (Steele et al., OOPSLA 2014) over first · golden ratio + second. Pairs that differ in one of
    the two alone have different ids, but for the two that would be 0 and 1.
    """
    x = (first * _GOLDEN + second) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    x ^= x >> 31
    return (x - _WRAP if x & _SIGN else x) or 1


def combine_all(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`combine` of each pair: int64 [n], [n] → int64 [n]."""
    x = finalised(first.astype(np.uint64) * GOLDEN + second.astype(np.uint64))
    x[x == 0] = 1
    return x.view(np.int64)


def finalised(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of each number: a bijection of uint64 [...] in which every bit depends on all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))
