"""Filters say what may be shown, and no source starves behind one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from online_model.features import CARD, ITEM, USER
from online_model.history import entry_items
from online_model.serving.api import Filters
from online_model.serving.approximate import vectors
from online_model.serving.candidates import ExactIndex, Query
from online_model.serving.filters import Allowed, allowed
from online_model.serving.replica import Replica
from tests.online_model.serving.test_approximate import ITEMS, LIMIT, THEN, Later, catalogue, indexed
from tests.online_model.serving.test_candidates import query
from tests.online_model.serving.world import cards, delta, ids, recommend, replica, world

N = 400
NOTHING = np.empty(0, np.int64)
# A category of few items, which are also bad ones: nobody would find them without being told where to look.
CATEGORY = ["rare" if i % 100 == 7 else f"c{i % 5}" for i in range(N)]


@pytest.fixture
def made() -> Replica:
    first = world(N)
    first.blobs = {CARD: cards(
        range(N), category=CATEGORY, regions=[[[], ["north"], ["north", "south"], None][i % 4] for i in range(N)],
        stock=[0 if i % 10 == 3 else None for i in range(N)],
    )}  # fmt: skip
    return replica(first, epsilon=0.0, nearest=20, neighbours=5, newest=5, popular=5)


def shown(made: Replica, user: str = "u1", k: int = 100, **filters) -> set:
    return {s.item for s in recommend(made, user, "shelf", k, filters=Filters(**filters)).items}


def test_a_category_of_few_items_is_answered_in_full(made):
    assert shown(made, categories=["rare"]) == {7, 107, 207, 307}
    assert len(shown(made, categories=["c1", "no such"], k=20)) == 20
    assert all(CATEGORY[item] in ("c1", "rare") for item in shown(made, categories=["c1", "rare"]))
    assert shown(made, categories=["no such"]) == set()


def test_sold_out_items_come_where_they_are_asked_for(made):
    assert not any(item % 10 == 3 for item in shown(made))
    found = shown(made, in_stock=False, categories=["c3"])
    assert any(item % 10 == 3 for item in found)
    assert shown(made, in_stock=False, blocked=[i for i in range(N) if i != 13]) == {13}


def test_a_region_has_what_is_sold_there_or_everywhere(made):
    for region, sold in (("north", {0, 1, 2, 3}), ("south", {0, 2, 3}), ("east", {0, 3})):
        found = shown(made, region=region)
        assert {item % 4 for item in found} == sold
        assert len(found) >= 20
    made.apply(delta(2, blobs={CARD: cards([7, 107], category="rare", regions=[["south"]] * 2)}))
    assert shown(made, region="north", categories=["rare"]) == {207, 307}


def test_the_best_are_blocked_and_the_next_take_their_places(made):
    blocked: list = []
    for _ in range(5):  # 100 of them: more than all sources name together
        page = shown(made, k=20, blocked=blocked)
        assert len(page) == 20
        assert not page & set(blocked)
        blocked += page
    assert shown(made, blocked=[str(item) for item in blocked], k=5).isdisjoint(blocked), "7 and '7' are one item"


def test_what_is_in_the_history_is_seen(made):
    for user in ("u0", "u3"):
        row = made.state.users.find(ids(USER, [user]))
        past = entry_items(made.state.users.columns["history"][row])[0]
        history = [i for i, id_ in enumerate(ids(ITEM, range(N))) if id_ in past and i % 10 != 3]
        others = [i for i in range(N) if i not in history]
        assert shown(made, user, blocked=others) == set(history) != set()
        assert shown(made, user, blocked=others, unseen=True) == set()
        assert len(shown(made, user, unseen=True, k=20)) == 20


def test_no_filter_costs_nothing():
    made = replica(world())
    assert allowed(made.state, Filters(), NOTHING) is None
    assert allowed(made.state, Filters(unseen=True), NOTHING) is None
    assert allowed(made.state, Filters(), ids(ITEM, [1])) is None


def test_nothing_left_is_an_empty_page_not_an_error(made):
    answer = recommend(made, "u1", "shelf", 5, filters=Filters(blocked=list(range(N))))
    assert (answer.items, answer.candidates, answer.degraded) == ([], 0, False)
    made.apply(delta(2, blobs={CARD: cards(range(N), stock=0)}))
    assert recommend(made, "u1", "shelf", 5, explain=True).items == []


def test_an_item_with_a_card_and_no_row_is_filtered_by_its_card(made):
    made.apply(delta(2, blobs={CARD: cards(["bare"], category="of its own", regions=[["west"]])}))
    assert shown(made, categories=["of its own"]) == {"bare"}
    assert shown(made, categories=["of its own"], region="west") == {"bare"}
    assert shown(made, categories=["of its own"], region="east") == set()


def test_a_card_that_goes_takes_its_filters_along(made):
    made.apply(delta(2, gone={CARD: ids(ITEM, [7])}))
    assert shown(made, categories=["rare"], in_stock=False) == {107, 207, 307}
    made.apply(delta(3, blobs={CARD: cards([7, 8], category=["other", "rare"])}))
    assert shown(made, categories=["rare"]) == {8, 107, 207, 307}


def in_order(made: Replica, asked: Query, among: np.ndarray) -> list[int]:
    """Ids of the items of these rows (bool), the largest affinity first."""
    rows = np.flatnonzero(among)
    score = vectors(made.state, rows, asked.now_ms) @ np.concatenate((asked.item, asked.content, [asked.prior]))
    return made.state.items.ids_of(rows[np.argsort(-score)]).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_scan_finds_the_best_of_what_is_allowed(made, seed):
    rng = np.random.default_rng(seed)
    filters = Filters(in_stock=bool(seed % 2), blocked=rng.permutation(N)[:300].tolist())
    with torch.inference_mode():
        may = allowed(made.state, filters, NOTHING)
        asked = replace(query(seed), allowed=may, prior=float(seed))
        found = ExactIndex(made.state, 20).candidates(asked)
        assert set(found.tolist()) == set(in_order(made, asked, may.rows)[:20])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("in_stock", [True, False])
def test_cells_find_the_best_of_what_is_allowed(share, in_stock, monkeypatch):
    """Few rows are all scored; of more the cells find nearly the best, those that are sold out included."""
    monkeypatch.setattr("online_model.serving.approximate.GATHERED", 300)
    made, later = replica(catalogue()), Later()
    rng = np.random.default_rng(1)
    sold_out = rng.permutation(ITEMS)[:250].tolist()
    made.apply(delta(2, blobs={CARD: cards(sold_out, stock=0)}))
    with torch.inference_mode():
        index = indexed(made, later)
        blocked = rng.permutation(ITEMS)[: int(ITEMS * (1 - share))].tolist()
        may = allowed(made.state, Filters(in_stock=in_stock, blocked=blocked), NOTHING)
        recalls = []
        for seed in range(100, 120):
            asked = replace(query(seed, THEN), allowed=may)
            found, best = index.candidates(asked), in_order(made, asked, may.rows)[:LIMIT]
            assert len(found) == len(best)
            assert may.rows[made.state.items.find(found)].all()
            recalls.append(np.isin(best, found).mean())
            assert np.isin(np.intersect1d(best, ids(ITEM, sold_out)), found).all(), "those are no cells'"
    assert np.mean(recalls) == 1 if share == 0.05 else np.mean(recalls) > 0.85
    assert index.approximate


def test_cells_far_from_the_query_are_looked_into_for_what_is_allowed(monkeypatch):
    """All that is allowed lies in cells that the query would not look into."""
    monkeypatch.setattr("online_model.serving.approximate.GATHERED", 100)
    made, later = replica(catalogue()), Later()
    with torch.inference_mode():
        index = indexed(made, later)
        index._approximate._cells._file.nprobe = 1
        asked = query(5, THEN)
        everything = in_order(made, asked, made.state.items.used("available"))
        worst = set(everything[-200:])
        slots = made.state.cards.available.copy()
        slots[made.state.cards.find(np.array(everything[:-200]))] = False
        asked = replace(asked, allowed=Allowed(slots, slots[made.state.items.used("slot")]))
        found = index.candidates(asked)
    assert len(found) == LIMIT
    assert set(found.tolist()) <= worst
