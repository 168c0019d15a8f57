"""Versions and replicas for the tests of serving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from embedding_store.columns import TableRows
from embedding_store.delta import Version
from embedding_store.ids import feature_id
from online_model.features import CARD, CATEGORY, EXTRAS, ITEM, ITEM_EXTRAS, SELLER, TITLE_WORDS, USER, WORD, words_of
from online_model.history import HISTORY
from online_model.neighbours import KEPT
from online_model.ranker import Ranker
from online_model.serving.api import Context, Id, Ranking, RankRequest, Recommendation, RecommendRequest
from online_model.serving.replica import Replica
from online_model.serving.settings import Exploration, Policy, ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings
from tests.online_model.logs import make_states

Arrays: TypeAlias = dict[str, np.ndarray]
Raw: TypeAlias = Iterable[str | int]
DIM = 8
NOW = 1_700_000_000_000  # ms UTC
HOUR = 3_600_000
FEATURES = FeatureSettings(dim=DIM, users=4, items=4, categories=2)  # so small that every test grows them
TITLES = [words_of(text, TITLE_WORDS) for text in ("", "Red shoes", "tea of a word that has no row")]
RANKER = RankerSettings(hidden=16, second=8, third=8, attention=True, experts=3)


def ids(feature: str, raw: Raw) -> np.ndarray:
    return np.array([feature_id(feature, r) for r in raw], np.int64)


def item_rows(
    raw: Sequence[str | int], weights: npt.ArrayLike, categories: Raw | None = None, **columns: Any
) -> TableRows:
    """Rows of items; columns that are not given are zero."""
    n = len(raw)
    zero = np.zeros(n, np.int64)
    category = zero if categories is None else ids(CATEGORY, categories)
    fields = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in ITEM_EXTRAS.items()}
    given = {name: np.asarray(column, ITEM_EXTRAS[name][0]) for name, column in columns.items()}
    fields |= {"weights": np.asarray(weights, np.float32), "category": category}
    return TableRows(ids(ITEM, raw), fields | given)


def user_rows(raw: Sequence[str | int], weights: npt.ArrayLike, histories: Iterable[Sequence[int]]) -> TableRows:
    """Rows of users; histories: raw item ids, the recent ones and then those of intent."""
    history = np.zeros((len(raw), HISTORY), np.int64)
    for row, items in zip(history, histories, strict=True):
        row[: len(items)] = ids(ITEM, items)
    states = make_states(history, np.full(len(raw), NOW))
    return TableRows(ids(USER, raw), {"weights": np.asarray(weights, np.float32), "history": states})


def rows_of(table: str, raw: Raw, weights: npt.ArrayLike, **columns: Any) -> TableRows:
    """Rows of categories, sellers or words; counts that are not given are zero."""
    given = {"weights": np.asarray(weights, np.float32)}
    for name in EXTRAS[table]:
        given[name] = np.asarray(columns.get(name, np.zeros(len(given["weights"]))), np.int64)
    return TableRows(ids(table, raw), given)


def category_rows(raw: Raw, weights: npt.ArrayLike) -> TableRows:
    return rows_of(CATEGORY, raw, weights)


def cards(raw: Raw, **fields: Any) -> dict[int, bytes]:
    """Cards of items; a field is one value for all or a list."""
    made = {}
    for i, item in enumerate(raw):
        one = {name: value[i] if isinstance(value, list) else value for name, value in fields.items()}
        made[feature_id(ITEM, item)] = orjson.dumps({"kind": "item", "item": item, **one})
    return made


def dense(seed: int = 3, features: FeatureSettings = FEATURES, ranker: RankerSettings = RANKER) -> Arrays:
    """Dense weights, none of them zero."""
    rng = np.random.default_rng(seed)
    weights = Ranker(features.dim, ranker).weights()
    dense = {name: rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in weights.items()}
    return dense | {"rated": np.array([[50, 10], [20, 8]], np.float32)}


def world(n_items: int = 40, n_users: int = 6, seed: int = 1) -> Version:
    """A first version: items 0 … n-1 in four categories, users "u0" … with histories."""
    rng = np.random.default_rng(seed)
    items, users = list(range(n_items)), [f"u{i}" for i in range(n_users)]
    shown = rng.integers(1, 100, n_items)
    return Version(
        epoch=1,
        sequence=1,
        created_ms=NOW,
        positions={0: 10, 1: 20},
        info={"rows": 7},
        dense=dense(seed),
        tables={
            ITEM: item_rows(
                items, rng.normal(0, 0.5, (n_items, DIM)), [i % 4 for i in items],
                neighbours=[ids(ITEM, rng.permutation(max(n_items, KEPT))[:KEPT]) for _ in items],
                nearness=np.sort(rng.random((n_items, KEPT)) * 9)[:, ::-1], taken=rng.random(n_items) * 30,
                heat=rng.random((n_items, 2)) * 9, heat_ms=NOW - rng.integers(0, 90, n_items) * HOUR,
                impressions=shown, clicks=shown // 5, created=NOW - rng.integers(0, 90, n_items) * HOUR,
                seller=ids(SELLER, [i % 3 for i in items]), words=[TITLES[i % len(TITLES)] for i in items],
            ),
            USER: user_rows(
                users, rng.normal(0, 0.5, (n_users, DIM)),
                [rng.integers(0, n_items, rng.integers(0, HISTORY + 1)).tolist() for _ in users],
            ),
            CATEGORY: rows_of(
                CATEGORY, range(4), rng.normal(0, 0.5, (4, DIM)), impressions=range(4), clicks=[0, 1, 1, 0]
            ),
            SELLER: rows_of(SELLER, range(2), rng.normal(0, 0.5, (2, DIM)), interactions=[5, 9]),  # the third has none
            WORD: rows_of(WORD, ["red", "shoes", "tea"], rng.normal(0, 0.5, (3, DIM))),
        },
        blobs={CARD: cards(items, created=[NOW - i * HOUR for i in items])},
    )  # fmt: skip


def delta(sequence: int, base: int | None = None, **fields: Any) -> Version:
    """Version 1.sequence on top of 1.base (the one before it)."""
    base = sequence - 1 if base is None else base
    return Version(epoch=1, sequence=sequence, base=(1, base), created_ms=NOW + sequence, **fields)


def replica(version: Version | None = None, epsilon: float = 0.1, **settings: Any) -> Replica:
    """A replica at `version`, with a clock that stands still."""
    policy = Policy(exploration=Exploration(epsilon=epsilon, seed=5))
    settings = {"policy": policy, **settings}
    made = Replica(ReplicaSettings(**settings), FEATURES, RANKER, clock=lambda: NOW + HOUR)
    if version is not None:
        assert made.apply(version)
    return made


def rank(made: Replica, user: Id, scenario: Any, candidates: Iterable[Id], query: str = "", **more: Any) -> Ranking:
    """What it answers to such a request."""
    return made.rank(RankRequest(user, list(candidates), scenario, Context(query), **more))


def recommend(made: Replica, user: Id, scenario: Any, k: int, query: str = "", **more: Any) -> Recommendation:
    """What it answers to such a request."""
    return made.recommend(RecommendRequest(user, scenario, Context(query), k, **more))
