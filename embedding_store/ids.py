"""Feature ids: what is a string or an integer outside is a 64-bit hash inside, with the feature's name mixed in.

No modulo is taken anywhere, so two ids meet only if their 64-bit hashes do (about 3e-8 for a million ids).
"""

from __future__ import annotations

import xxhash

DEFAULT_ID = 0  # never a hash: the id of padding and of the default row
_SIGN, _WRAP = 1 << 63, 1 << 64


def feature_id(feature: str, raw: str | int) -> int:
    """The signed 64-bit id of `raw` under `feature`; never 0. 7 and "7" are the same id.

    >>> feature_id("item", 7) == feature_id("item", "7") != feature_id("user", 7)
    True
    """
    return hash_text(f"{feature}\x00{raw}")


def hash_text(text: str) -> int:
    """xxh3 of the UTF-8 text, as a signed 64-bit integer, 0 replaced by 1."""
    value = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
    return (value - _WRAP if value & _SIGN else value) or 1
