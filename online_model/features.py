"""The model's features: which tables there are, what an item's row carries, and the numbers made of it.

An item is seen by the model as `item row + category row` (its vector), so that a new item starts where its category is;
a user's history is a weighted mean of the vectors of its items. Trainer and replicas share the code below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedding_store.ids import GOLDEN, finalised
from embedding_store.specs import RowRules, TableSettings, TableSpec
from online_model.history import COUNTED, HISTORY_BYTES, HORIZONS_S, MAX_SECOND, PANE_S, PANES, RECENT, unpack
from online_model.settings import FeatureSettings

USER, ITEM, CATEGORY = "user", "item", "category"
CARD = "card"  # the blob family of catalogue records: item id → JSON
DENSE = 4  # dense features of an item
CONTEXT = len(HORIZONS_S) * len(COUNTED) + 2 + 4  # features of a user at a moment

# New rows start from ±scale by the bits of their id. If items and users all started from zero, their products would
# have no gradient and all rows would move along a few common directions. Users can start from zero if items do not.
START_SCALE = {ITEM: 0.05, CATEGORY: 0.2}
CLICK_PRIOR = 0.05  # the click rate of an item that nobody has seen …
PRIOR_STRENGTH = 20.0  # … which weighs as much as this many impressions
_LONG_AGO = float(np.log1p(30 * 86_400))  # what is so many seconds old is as if it had never been
_DAY_MS, _WEEK_MS = 86_400_000, 604_800_000
_PRIOR_LOGIT = float(np.log(CLICK_PRIOR / (1 - CLICK_PRIOR)))

USER_EXTRAS: dict[str, tuple[str, tuple[int, ...]]] = {"history": ("|u1", (HISTORY_BYTES,))}  # the newest state
ITEM_EXTRAS: dict[str, tuple[str, tuple[int, ...]]] = {
    "impressions": ("<i8", ()),  # rows that said whether it was clicked
    "clicks": ("<i8", ()),  # of these, clicked
    "interactions": ("<i8", ()),  # positives of logs without impressions: no click rate is made of them
    "category": ("<i8", ()),  # feature_id("category", …), 0 none
    "seller": ("<i8", ()),  # feature_id("seller", …), 0 none
    "created": ("<i8", ()),  # ms UTC, from the catalogue, else the first example's time; 0 unknown
    "card": ("<i8", ()),  # hash of the card that is kept for it, 0 none
}

# What must not wait for a row's weights to move: the next answer is made of it, and no count comes near it.
SENT_FIRST: dict[str, tuple[str, ...]] = {USER: ("history",), ITEM: ("category", "seller", "created", "card")}


def table_specs(settings: FeatureSettings) -> tuple[TableSpec, ...]:
    """The three tables: user, item, category."""

    def table(name: str, capacity: int, rules: RowRules) -> TableSettings:
        return TableSettings(
            dim=settings.dim, capacity=capacity, learning_rate=settings.learning_rate, eps=settings.eps, rules=rules,
            optimizer=settings.optimizer, initialiser="signs" if name in START_SCALE else "zero",
            init_scale=START_SCALE.get(name, 1.0),
        )  # fmt: skip

    return (
        TableSpec(USER, (USER,), table(USER, settings.users, settings.user_rules), USER_EXTRAS),
        TableSpec(ITEM, (ITEM,), table(ITEM, settings.items, settings.item_rules), ITEM_EXTRAS),
        TableSpec(CATEGORY, (CATEGORY,), table(CATEGORY, settings.categories, settings.category_rules)),
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


@dataclass
class UserFeatures:
    """What the model sees of B users, each at a moment."""

    items: np.ndarray  # int64 [B, HISTORY] ids, the recent ones and then those of intent, newest first, 0 = none
    kinds: np.ndarray  # int64 [B, HISTORY] Kind of what was done, 0 = none
    recency: np.ndarray  # float32 [B, HISTORY] 1 (now) … 0 (a month ago and before, none): of the log of the age
    context: np.ndarray  # float32 [B, CONTEXT]


def user_features(states: np.ndarray, ts: np.ndarray | int) -> UserFeatures:
    """Features of users in `states` (uint8 [B, HISTORY_BYTES]) at time `ts` (ms UTC, [B] or one for all).

    Columns of `context`: log of the actions in each of HORIZONS_S by COUNTED, the recency of the newest entry of both
    lists, sine and cosine of the time of the day and of the week (UTC). A horizon's count is the sum of those of its
    panes that are still inside at `ts`: the pane `ts` is in, and the PANES - 1 before it.
    """
    state = unpack(states)
    ts = np.broadcast_to(np.asarray(ts, np.int64), len(state))
    newest = state["newest"].astype(np.int64)
    now = np.maximum(np.minimum(ts // 1000, MAX_SECOND), newest)  # a clock may be behind what has happened
    entries = np.concatenate((state["recent"], state["intent"]), axis=1)
    items = np.ascontiguousarray(entries["item"])
    age = np.log1p(now[:, None] - entries["second"])
    recency = np.where(items != 0, np.maximum(1 - age / _LONG_AGO, 0), 0).astype(np.float32)

    width, slot = np.array(PANE_S)[None, :, None], np.arange(PANES)
    newest_pane = newest[:, None, None] // width
    pane = newest_pane - (newest_pane - slot) % PANES  # [B, horizons, PANES] which one stands in each slot
    inside = now[:, None, None] // width - pane < PANES
    counts = (state["counts"] * inside[..., None]).sum(2).reshape(len(state), len(HORIZONS_S) * len(COUNTED))
    angles = 2 * np.pi * np.stack((ts % _DAY_MS / _DAY_MS, ts % _WEEK_MS / _WEEK_MS), 1)

    context = np.concatenate(
        (np.log1p(counts) / 4, recency[:, [0, RECENT]], np.sin(angles), np.cos(angles)), axis=1, dtype=np.float32
    )
    return UserFeatures(items, entries["kind"].astype(np.int64), recency, context)


def mix(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each integer (the finaliser of splitmix64): int64 or uint64 [...] → uint64 [...]."""
    return finalised(values.astype(np.uint64) + GOLDEN)
