"""The approximate index: nearly what the exact scan finds, of what can be had now, also while the model moves on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
import torch

from embedding_store.columns import TableRows
from embedding_store.delta import Version
from online_model.features import CARD, CATEGORY, ITEM, SELLER, WORD
from online_model.serving.approximate import REPLACED, Index
from online_model.serving.candidates import ExactIndex, Query
from online_model.serving.metrics import Metrics
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.serving.state import STAMP
from tests.online_model.serving.test_candidates import plain_scan, query
from tests.online_model.serving.world import (
    DIM,
    HOUR,
    NOW,
    cards,
    category_rows,
    delta,
    dense,
    ids,
    item_rows,
    recommend,
    replica,
    rows_of,
    world,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("inference")
ITEMS, CATEGORIES, LIMIT = 3000, 200, 50
THEN = NOW + HOUR


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


class Later(Executor):
    """Runs what it was given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future, Callable[[], Any]]] = []

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        for future, job in self.waiting:
            future.set_result(job())
        self.waiting = []


def catalogue(seed: int = 1) -> Version:
    """Thousands of items that are told apart by their categories more than by their own rows."""
    rng, made = np.random.default_rng(seed), world(ITEMS)
    of = (np.arange(ITEMS) % CATEGORIES).tolist()
    made.tables[ITEM] = item_rows(range(ITEMS), rng.normal(0, 0.2, (ITEMS, DIM)), of)
    made.tables[CATEGORY] = moved(seed)
    return made


def moved(seed: int) -> Any:
    """All categories somewhere else; no item is touched by that."""
    return category_rows(range(CATEGORIES), np.random.default_rng(seed).normal(size=(CATEGORIES, DIM)))


def indexed(made: Replica, later: Later, **settings: Any) -> Index:
    """An index that serves from cells, asked the queries 0 … so far. It rebuilds and probes only as `settings` say."""
    rare: dict[str, Any] = {"rebuild_s": 1e9, "probe_every": 10**9, "nearest": LIMIT}
    index = Index(made.state, ReplicaSettings(exact_up_to=0, **rare | settings), later)
    ask_until(index, later)
    later.run()
    index.candidates(query(0, THEN))
    assert index.approximate
    return index


def ask_until(index: Index, later: Later, now_ms: int = THEN) -> None:
    """Ask until a rebuild is wanted: its copy is made in slices."""
    for seed in range(20):
        index.candidates(query(seed, now_ms))
        if later.waiting:
            return
    raise AssertionError("no rebuild was begun")


def better(made: Replica, asked: Query, names: list[str]) -> Any:
    """Rows of new items like the best one for `asked`, each a little better than the one before."""
    best = ExactIndex(made.state, 1).candidates(asked)
    row = made.state.items.find(best)[0]
    columns = made.state.items.columns
    step = np.linspace(0.5, 1, len(names))[:, None] * asked.item / np.linalg.norm(asked.item)
    rows = item_rows(names, columns["weights"][row] + step)
    rows.columns["category"][:] = columns["category"][row]
    return rows


def recall(index: Index, made: Replica, now_ms: int = THEN) -> float:
    """The mean over queries that the index was not tuned by."""
    exact, shares = ExactIndex(made.state, LIMIT), []
    for seed in range(100, 130):
        asked = query(seed, now_ms)
        shares.append(np.isin(exact.candidates(asked), index.candidates(asked)).mean())
    return float(np.mean(shares))


def test_drift_costs_recall_and_a_scheduled_rebuild_brings_it_back():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later, rebuild_s=60)
    assert recall(index, made) > 0.9
    made.apply(delta(2, tables={CATEGORY: moved(2)}))
    assert recall(index, made) < 0.7
    assert not later.waiting
    ask_until(index, later, THEN + 60_000)
    later.run()
    assert recall(index, made, THEN + 60_001) > 0.9


def test_a_rebuild_that_fails_fails_no_request_and_is_tried_again(caplog):
    made, later = replica(catalogue()), Later()
    index = indexed(made, later, rebuild_s=60)
    made.apply(delta(2, tables={CATEGORY: moved(2)}))
    ask_until(index, later, THEN + 60_000)
    (failed, _), later.waiting = later.waiting[0], []
    failed.set_exception(MemoryError("std::bad_alloc"))
    assert len(index.candidates(query(0, THEN + 60_001))) == LIMIT
    assert "could not be rebuilt" in caplog.text
    ask_until(index, later, THEN + 120_001)
    later.run()
    assert recall(index, made, THEN + 120_002) > 0.9


def test_without_a_new_version_nothing_is_rebuilt():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later, rebuild_s=60)
    for minutes in range(1, 20):
        index.candidates(query(1, THEN + minutes * 60_000))
    assert not later.waiting


def test_with_one_cell_it_is_the_exact_scan_whatever_versions_and_rebuilds_come():
    """Fewer than 78 items are one cell, and three times the limit are all of them: nothing is approximate but drift,
    new and lost items, and swaps, which must not show."""
    rng, later = np.random.default_rng(3), Later()
    made = replica(world(70))
    index = Index(made.state, ReplicaSettings(exact_up_to=0, nearest=32, rebuild_s=0.001, probe_every=10**9), later)
    served = 0
    for sequence in range(2, 80):
        some = rng.choice(90, 12, replace=False).tolist()
        fields: dict = {
            "tables": {
                ITEM: item_rows(some, rng.normal(size=(12, DIM)), rng.integers(0, 6, 12).tolist(),
                                impressions=rng.integers(0, 50, 12), clicks=rng.integers(0, 9, 12)),
                CATEGORY: category_rows([sequence % 6], rng.normal(size=(1, DIM))),
            },
            "dense": dense(sequence),
            "blobs": {CARD: cards(some[:8], stock=rng.integers(0, 2, 8).tolist())},
            "gone": {ITEM: ids(ITEM, rng.choice(90, 2).tolist()), CARD: ids(ITEM, rng.choice(90, 2).tolist())},
        }  # fmt: skip
        if sequence % 7 == 0:
            fields["gone"][SELLER] = ids(SELLER, [sequence % 2])
        made.apply(delta(sequence, **fields))
        asked = query(sequence, THEN + sequence)
        assert set(index.candidates(asked).tolist()) == plain_scan(made, asked, 32)
        served += index.approximate
        if rng.random() < 0.3:
            later.run()
    assert served > 60


def test_a_new_item_is_found_and_a_lost_one_not_before_all_that_was_touched_is_replaced():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later)
    asked = query(7, THEN)
    best = index.candidates(asked)
    items = range(4 * REPLACED)
    same = made.state.items
    touched = item_rows(items, same.columns["weights"][same.find(ids(ITEM, items))], [i % CATEGORIES for i in items])
    new = better(made, asked, ["new"])
    rows = TableRows(
        np.concatenate((touched.ids, new.ids)),
        {name: np.concatenate((column, new.columns[name])) for name, column in touched.columns.items()},
    )
    lost = [i for i in range(ITEMS) if ids(ITEM, [i])[0] in best][:20]
    made.apply(delta(
        2,
        tables={ITEM: rows},
        blobs={CARD: cards(["new", *lost[:10]], stock=[1] + [0] * 10)},
        gone={CARD: ids(ITEM, lost[10:])},
    ))  # fmt: skip
    for _ in range(6):
        found = set(index.candidates(asked).tolist())
        assert set(ids(ITEM, ["new"]).tolist()) <= found
        assert not found & set(ids(ITEM, lost).tolist())
        assert len(found) == LIMIT
    assert index.approximate


def test_what_changed_while_it_was_built_is_in_the_new_cells_before_they_serve():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later, rebuild_s=60)
    asked = query(7, THEN + 60_000)
    made.apply(delta(2, tables={CATEGORY: moved(2)}))
    ask_until(index, later, asked.now_ms)
    news = [f"new {i}" for i in range(3 * REPLACED)]  # it takes more than one request to bring them in
    made.apply(delta(3, tables={ITEM: better(made, asked, news)}, blobs={CARD: cards(news)}))
    for _ in range(3):
        index.candidates(asked)
    later.run()
    for _ in range(4):
        assert set(ids(ITEM, news[-20:]).tolist()) <= set(index.candidates(asked).tolist())
    sold_out = ids(ITEM, news[-10:])
    made.apply(delta(4, blobs={CARD: cards(news[-10:], stock=0)}))
    assert not np.isin(sold_out, index.candidates(asked)).any()
    assert recall(index, made, asked.now_ms) > 0.9


def test_many_replaced_rows_are_a_reason_to_rebuild():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later)
    some = list(range(ITEMS // 2))
    made.apply(delta(2, tables={ITEM: item_rows(some, np.ones((len(some), DIM)))}))
    ask_until(index, later)


def test_low_recall_is_seen_and_mended_at_once():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later, probe_every=2, exact_below_recall=0)
    assert recall(index, made) > 0.9
    assert index.recall is not None
    assert index.recall > 0.9
    assert not later.waiting
    made.apply(delta(2, tables={CATEGORY: moved(2)}))
    assert recall(index, made) < 0.8
    assert index.approximate
    assert len(later.waiting) == 1
    later.run()
    assert recall(index, made) > 0.9
    assert index.recall > 0.9
    assert not later.waiting


def test_with_very_low_recall_all_items_are_scanned_until_the_rebuild_is_done():
    made, later = replica(catalogue()), Later()
    index = indexed(made, later, probe_every=1, exact_below_recall=0.8)
    made.apply(delta(2, tables={CATEGORY: moved(2)}))
    recall(index, made)
    assert not index.approximate
    assert recall(index, made) == 1
    assert index.recall is not None
    assert index.recall < 0.8
    assert len(later.waiting) == 1
    later.run()
    assert 0.9 < recall(index, made) < 1
    assert index.approximate


def test_a_catalogue_that_grows_is_indexed_in_the_background():
    made = replica(world(100))
    index = Index(made.state, ReplicaSettings(exact_up_to=100, nearest=10))
    index.candidates(query())
    assert not index.approximate
    made.apply(delta(2, tables={ITEM: item_rows(["one more"], np.ones((1, DIM)))}, blobs={CARD: cards(["one more"])}))
    end = time.monotonic() + 20
    while not index.approximate and time.monotonic() < end:
        assert len(index.candidates(query())) == 10
    assert index.approximate
    assert len(index.candidates(query())) == 10


def test_what_was_prepared_serves_from_the_first_request_on():
    made, later = replica(catalogue()), Later()
    index = Index(made.state, ReplicaSettings(exact_up_to=0, nearest=LIMIT), later)
    index.prepare(THEN)
    assert index.approximate
    assert recall(index, made) > 0.8
    assert not later.waiting


def test_of_very_many_items_the_first_cells_are_coarse_and_the_first_requests_begin_better_ones(monkeypatch):
    monkeypatch.setattr("online_model.serving.approximate.QUICK_FROM", ITEMS)
    made, later = replica(catalogue()), Later()
    index = Index(made.state, ReplicaSettings(exact_up_to=0, nearest=LIMIT, rebuild_s=1e9, probe_every=10**9), later)
    index.prepare(THEN)
    assert index.approximate
    assert recall(index, made) > 0.8
    assert len(later.waiting) == 1
    later.run()
    assert recall(index, made) > 0.8
    assert not later.waiting, "once"


def test_a_small_catalogue_is_scanned():
    made, later = replica(world(100)), Later()
    index = Index(made.state, ReplicaSettings(exact_up_to=100), later)
    index.prepare(NOW)
    for seed in range(10):
        index.candidates(query(seed))
    assert not index.approximate
    assert not later.waiting


def test_a_catalogue_of_which_nothing_can_be_had_names_nothing():
    first, later = world(10), Later()
    first.blobs = {}
    made = replica(first)
    index = Index(made.state, ReplicaSettings(exact_up_to=0), later)
    index.prepare(NOW)
    assert [index.candidates(query(seed)).size for seed in range(3)] == [0, 0, 0]
    assert not later.waiting
    made.apply(delta(2, blobs={CARD: cards([3, 4])}))
    ask_until(index, later)
    later.run()
    assert set(index.candidates(query()).tolist()) == set(ids(ITEM, [3, 4]).tolist())
    made.apply(delta(3, gone={CARD: ids(ITEM, [3, 4])}))
    assert index.candidates(query()).size == 0


def test_the_recall_is_among_the_metrics_once_it_was_measured():
    made, metrics = replica(world(100), exact_up_to=0, probe_every=1, nearest=10), Metrics()
    metrics.watch(lambda: made)
    assert b"index_recall" not in metrics.text()
    end = time.monotonic() + 20
    while made.recall() is None and time.monotonic() < end:
        recommend(made, "u1", "live", 5)
    assert f"headrace_serve_index_recall {made.recall()}".encode() in metrics.text()


def test_a_new_word_touches_the_items_that_have_it_and_no_others():
    made = replica(world(30))  # every third title has "word"
    made.apply(delta(2, tables={WORD: rows_of(WORD, ["word"], np.ones((1, DIM)))}))
    items = made.state.items
    touched = items.ids_of(np.flatnonzero(items.used(STAMP) == 2))
    assert set(touched.tolist()) == set(ids(ITEM, range(2, 30, 3)).tolist())
