"""The model's features, each declared once: training, serving and replay all read FEATURES and the functions below.

An item is seen by the model as its own row and its content: the sum of its category's row, its seller's and the mean of
the rows of its title's words. A new item so starts where its content is. A user's history is the items of the last
actions. What is unknown or missing reads the default row, zeros: it says nothing, and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from embedding_store.ids import GOLDEN, feature_id, finalised
from embedding_store.specs import TableSettings, TableSpec
from online_model import kernels
from online_model.examples import QUERY_WORDS
from online_model.history import COUNTED, HISTORY, HISTORY_BYTES, HORIZONS_S, MAX_SECOND, PANE_S, PANES, RECENT, unpack
from online_model.neighbours import KEPT, NEIGHBOURS
from online_model.settings import FeatureSettings

USER, ITEM, CATEGORY, SELLER, WORD = "user", "item", "category", "seller", "word"  # the tables
CARD = "card"  # the blob family of catalogue records: item id → JSON
TITLE_WORDS = 6  # of a title, the first so many
CONTEXT = len(HORIZONS_S) * len(COUNTED) + 2 + 4  # numbers of a user at a moment
RATES = 4  # numbers of what was counted of an item, a category, a seller
HEAT_S = (3_600, 259_200)  # half-lives of what was clicked of late
MATCHES = 6  # numbers of what an item and a history have in common
NUMBERS = 3 * RATES + 1 + len(HEAT_S) + MATCHES  # of a candidate


@dataclass(frozen=True)
class Feature:
    """One input of the ranker. The settings of its table say who gets a row there (`RowRules`), and for how long."""

    name: str
    side: Literal["context", "candidate"]  # a context is a user in a state, at a moment, in a scenario
    kind: Literal["id", "text", "sequence", "dense"]
    table: str = ""  # where its ids have rows; "": numbers
    length: int = 1  # ids (0 where there is none) or numbers
    pooling: Literal["", "sum", "mean", "weights", "attention"] = ""  # of several rows to one


FEATURES = (
    Feature("user", "context", "id", USER),
    Feature("history", "context", "sequence", ITEM, HISTORY, "weights"),  # by kind of action and age, learned
    Feature("query", "context", "text", WORD, QUERY_WORDS, "mean"),
    Feature("moment", "context", "dense", length=CONTEXT),
    Feature("item", "candidate", "id", ITEM),
    Feature("category", "candidate", "id", CATEGORY, pooling="sum"),  # these three together are the content
    Feature("seller", "candidate", "id", SELLER, pooling="sum"),
    Feature("title", "candidate", "text", WORD, TITLE_WORDS, "mean"),
    Feature("attended", "candidate", "sequence", ITEM, HISTORY, "attention"),  # of the candidate over the history
    Feature("near", "candidate", "dense", length=NEIGHBOURS),
    Feature("numbers", "candidate", "dense", length=NUMBERS),
)

# New rows start from ±scale by the bits of their id. If items and users all started from zero, their products would
# have no gradient and all rows would move along a few common directions. Users can start from zero if items do not.
START_SCALE = {ITEM: 0.05, CATEGORY: 0.2, SELLER: 0.05, WORD: 0.1}
# Of `[model.features] learning_rate`: what a table's rows learn at. The rows of categories, sellers and words are in
# thousands of items, and users are each other's noise; items are what is worth remembering (docs/architecture.md).
RATE_SHARE = {USER: 0.375, ITEM: 1.0, CATEGORY: 0.125, SELLER: 0.125, WORD: 0.125}
CLICK_PRIOR = 0.05  # the click rate before anything was seen
_LONG_AGO = float(np.log1p(30 * 86_400))  # what is so many seconds old is as if it had never been
_DAY_MS, _WEEK_MS = 86_400_000, 604_800_000
_LOGS = 3.0  # what logarithms are divided by: most are between 0 and 3 then

USER_EXTRAS: dict[str, tuple[str, tuple[int, ...]]] = {"history": ("|u1", (HISTORY_BYTES,))}  # the newest state
COUNTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "impressions": ("<i8", ()),  # rows that said whether it was clicked
    "clicks": ("<i8", ()),  # of these, clicked
    "interactions": ("<i8", ()),  # positives of logs without impressions: no click rate is made of them
}
ITEM_EXTRAS: dict[str, tuple[str, tuple[int, ...]]] = COUNTS | {
    "heat": ("<f4", (len(HEAT_S),)),  # clicks and other positives, each counting half after a half-life …
    "heat_ms": ("<i8", ()),  # … as of then, ms UTC
    "neighbours": ("<i8", (KEPT,)),  # items that it is clicked after (neighbours.py), heaviest first, 0 none …
    "nearness": ("<f4", (KEPT,)),  # … how much each weighs …
    "taken": ("<f4", ()),  # … and how often it was clicked itself: all as of `heat_ms`
    "category": ("<i8", ()),  # feature_id("category", …), 0 none
    "seller": ("<i8", ()),  # feature_id("seller", …), 0 none
    "words": ("<i8", (TITLE_WORDS,)),  # word ids of the title, 0 none
    "created": ("<i8", ()),  # ms UTC, from the catalogue, else the first example's time; 0 unknown
    "duration": ("<i8", ()),  # ms, as the last watch had it; 0 unknown
    "card": ("<i8", ()),  # hash of the card that is kept for it, 0 none
}
EXTRAS = {USER: USER_EXTRAS, ITEM: ITEM_EXTRAS, CATEGORY: COUNTS, SELLER: COUNTS, WORD: {}}

# What must not wait for a row's weights to move: the next answer is made of it, and no count comes near it.
SENT_FIRST: dict[str, tuple[str, ...]] = {
    USER: ("history",), ITEM: ("category", "seller", "words", "created", "duration", "card"),
}  # fmt: skip
UNMEASURED = ("heat_ms", "neighbours")  # moments and ids: how far they move says nothing


def table_specs(settings: FeatureSettings) -> tuple[TableSpec, ...]:
    """The tables that FEATURES name: user, item, word, category, seller."""
    rows = {
        USER: (settings.users, settings.user_rules), ITEM: (settings.items, settings.item_rules),
        CATEGORY: (settings.categories, settings.category_rules), SELLER: (settings.sellers, settings.seller_rules),
        WORD: (settings.words, settings.word_rules),
    }  # fmt: skip

    def table(name: str) -> TableSettings:
        capacity, rules = rows[name]
        return TableSettings(
            dim=settings.dim, capacity=capacity, eps=settings.eps, rules=rules,
            learning_rate=settings.learning_rate * RATE_SHARE[name], optimizer=settings.optimizer,
            initialiser="signs" if name in START_SCALE else "zero",
            init_scale=START_SCALE.get(name, 1.0),
        )  # fmt: skip

    names = dict.fromkeys(feature.table for feature in FEATURES if feature.table)
    return tuple(TableSpec(name, (name,), table(name), EXTRAS[name]) for name in names)


TABLES = table_specs(FeatureSettings())


def words_of(text: str, most: int) -> np.ndarray:
    """Ids of the first `most` words of a text, int64 [most], 0 where there are fewer.

    Words are runs of letters and digits of any script, without case; each counts once.

    >>> (words_of("Red shoes, RED laces", 4) != 0).tolist()
    [True, True, True, False]
    """
    words = list(dict.fromkeys(re.findall(r"\w+", text.casefold())))[:most]
    return np.array([feature_id(WORD, word) for word in words] + [0] * (most - len(words)), np.int64)


def rates(impressions: np.ndarray, clicks: np.ndarray, interactions: np.ndarray, rate: float) -> np.ndarray:
    """Numbers float32 [n, RATES] of counts int64 [n] of items, categories or sellers: all that was learned so far.

    The logit of the smoothed click rate less that of `rate`, the usual one (0: never shown), log of impressions, log of
    interactions, and whether it was never seen: a first time is no small number of times. The usual rate weighs as much
    as 1 / (rate · (1 − rate)) impressions: as if logits were spread around its own with a variance of 1.

    >>> rates(np.array([0]), np.array([0]), np.array([0]), 0.05).tolist()
    [[0.0, 0.0, 0.0, 1.0]]
    """
    out = np.empty((len(impressions), RATES), np.float32)
    kernels.rate(impressions, clicks, interactions, rate, _LOGS, out)
    return out


def age(created: np.ndarray, ts: np.ndarray | int) -> np.ndarray:
    """Log of the age in hours at `ts` (ms UTC) of what was created then, float32 [n, 1]; 0 where that is not known."""
    created = np.asarray(created, np.int64)
    hours = np.where(created > 0, np.maximum(np.asarray(ts, np.int64) - created, 0), 0) / 3_600_000
    return (np.log1p(hours) / _LOGS).astype(np.float32)[:, None]


def heat(heats: np.ndarray, since: np.ndarray, ts: np.ndarray | int) -> np.ndarray:
    """What is left at `ts` (ms UTC) of heats float32 [n, len(HEAT_S)] as of `since` (ms UTC, [n]): the same shape."""
    passed = np.maximum(np.asarray(ts, np.int64) - since, 0)[:, None] / 1000
    return (heats * 0.5 ** (passed / np.array(HEAT_S))).astype(np.float32)


def item_numbers(column: Callable[[str, str], np.ndarray], ts: np.ndarray | int, rate: float) -> np.ndarray:
    """Numbers float32 [n, NUMBERS - MATCHES] of n items at `ts` (ms UTC) that hang on no user.

    column(table, name): [n, …] that column of the rows of the items, of their categories, of their sellers. rate: the
    usual click rate, `Ranker.click_rate`.
    """

    def rated(table: str) -> np.ndarray:
        return rates(column(table, "impressions"), column(table, "clicks"), column(table, "interactions"), rate)

    parts = [rated(ITEM), age(column(ITEM, "created"), ts)]
    parts.append(np.log1p(heat(column(ITEM, "heat"), column(ITEM, "heat_ms"), ts)))
    return np.concatenate([*parts, rated(CATEGORY), rated(SELLER)], axis=1)


def matches(
    past: UserFeatures, of_entries: Sequence[np.ndarray], of_items: Sequence[np.ndarray], ctx: np.ndarray
) -> np.ndarray:
    """What N candidates and the histories of their contexts have in common: float32 [N, MATCHES].

    of_entries: of the histories' entries, int64 [B, HISTORY] each, the ids of item, category and seller; of_items: the
    same of the candidates, int64 [N] each; ctx: int64 [N]. Two numbers for each of the three: the recency of the newest
    entry that is alike, and the share of the entries' recency that all of those have. An id 0 is like no other.
    """
    out = np.empty((len(ctx), MATCHES), np.float32)
    for at, (entries, own) in enumerate(zip(of_entries, of_items, strict=True)):
        kernels.match(past.recency, entries, own, ctx, out, 2 * at)
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
