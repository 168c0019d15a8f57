"""The model's features: which tables there are, what an item's row carries, and the numbers made of it.

An item is seen by the model as `item row + category row` (its vector), so that a new item starts where its category is;
a user's history is the mean of the vectors of its items. Trainer and replicas share the code below.
"""

from __future__ import annotations

import numpy as np

from embedding_store.specs import TableSettings, TableSpec
from online_model.examples import HISTORY
from online_model.settings import FeatureSettings

USER, ITEM, CATEGORY = "user", "item", "category"
CARD = "card"  # the blob family of catalogue records: item id → JSON
DENSE = 4  # dense features of an item

START_SCALE = {ITEM: 0.05, CATEGORY: 0.2}  # size of a new row's weights; users start from zero
CLICK_PRIOR = 0.05  # the click rate of an item that nobody has seen …
PRIOR_STRENGTH = 20.0  # … which weighs as much as this many impressions
_PRIOR_LOGIT = float(np.log(CLICK_PRIOR / (1 - CLICK_PRIOR)))
_MIX = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # splitmix64's multipliers
_STEP = 0x9E3779B97F4A7C15

ITEM_EXTRAS: dict[str, tuple[str, tuple[int, ...]]] = {
    "impressions": ("<i8", ()),  # rows that said whether it was clicked
    "clicks": ("<i8", ()),  # of these, clicked
    "interactions": ("<i8", ()),  # positives of logs without impressions: no click rate is made of them
    "category": ("<i8", ()),  # feature_id("category", …), 0 none
    "seller": ("<i8", ()),  # feature_id("seller", …), 0 none
    "created": ("<i8", ()),  # ms UTC, from the catalogue, else the first example's time; 0 unknown
    "card": ("<i8", ()),  # hash of the card that is kept for it, 0 none
}


def table_specs(settings: FeatureSettings) -> tuple[TableSpec, ...]:
    """The three tables: user, item, category."""

    def table(capacity: int) -> TableSettings:
        return TableSettings(
            dim=settings.dim, capacity=capacity, learning_rate=settings.learning_rate, eps=settings.eps
        )

    return (
        TableSpec(USER, (USER,), table(settings.users), {"history": ("<i8", (HISTORY,))}),
        TableSpec(ITEM, (ITEM,), table(settings.items), ITEM_EXTRAS),
        TableSpec(CATEGORY, (CATEGORY,), table(settings.categories)),
    )


TABLES = table_specs(FeatureSettings())


def item_features(
    impressions: np.ndarray, clicks: np.ndarray, interactions: np.ndarray, created: np.ndarray, ts: np.ndarray | int
) -> np.ndarray:
    """Dense features float32 [n, DENSE] of items at time `ts` (ms UTC, [n] or one for all).

    Columns: the logit of the smoothed click rate less its prior's (0: never shown), log of impressions, log of
    interactions, log of the age in hours. The first three are of the counts in the row: all that was learned so far.

    >>> item_features(np.array([0]), np.array([0]), np.array([0]), np.array([0]), 7).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """
    shown = np.asarray(impressions, np.float64)
    clicked = np.minimum(clicks, shown)  # a late click may be of an impression that was not learned
    rate = (clicked + CLICK_PRIOR * PRIOR_STRENGTH) / (shown + PRIOR_STRENGTH)
    created = np.asarray(created, np.int64)
    age = np.where(created > 0, np.maximum(np.asarray(ts, np.int64) - created, 0), 0) / 3_600_000
    out = np.empty((len(shown), DENSE), np.float32)
    out[:, 0] = np.log(rate / (1 - rate)) - _PRIOR_LOGIT
    out[:, 1] = np.log1p(shown) / 10
    out[:, 2] = np.log1p(np.asarray(interactions, np.float64)) / 10
    out[:, 3] = np.log1p(age) / 10
    return out


def mix(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each integer (the finaliser of splitmix64): int64 or uint64 [...] → uint64 [...]."""
    x = values.astype(np.uint64) + np.uint64(_STEP)
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def start_weights(ids: np.ndarray, dim: int, scale: float) -> np.ndarray:
    """What a new row starts from: ±scale by the bits of the id's hash, float32 [n, dim]; an id 0 stays zero.

    If items and users all started from zero, their products would have no gradient and all rows would move along a
    few common directions. Users can start from zero as long as items do not.
    """
    words = -(-dim // 64)
    hashed = mix(ids.astype(np.uint64)[:, None] + np.arange(1, words + 1, dtype=np.uint64)[None, :])
    bits = np.unpackbits(hashed.astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :dim]
    out = (bits.astype(np.float32) * 2 - 1) * np.float32(scale)
    out[ids == 0] = 0
    return out
