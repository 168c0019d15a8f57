"""What a page says beside its items: why, what is like an item, what was not scored in time, what strangers get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedding_store.delta import Version
from online_model.features import CARD, CATEGORY, ITEM, USER
from online_model.history import EMPTY, as_array
from online_model.neighbours import KEPT
from online_model.ranker import Ranker
from online_model.serving.api import RankRequest, RecommendRequest, SimilarQuery
from online_model.serving.errors import NotReady, UnknownItem
from online_model.serving.explain import MOST
from online_model.serving.replica import Replica
from online_model.serving.scoring import AMPLE_S, SLICE
from online_model.serving.settings import Exploration, Policy, ReplicaSettings, Reranking, Scoring
from tests.online_model.serving.world import (
    DIM,
    FEATURES,
    HOUR,
    NOW,
    RANKER,
    cards,
    category_rows,
    delta,
    ids,
    item_rows,
    rank,
    recommend,
    replica,
    world,
)  # fmt: skip

SCENARIOS: tuple[Any, ...] = ("live", "video", "search", "shelf")
GREEDY = Exploration(epsilon=0)

# --- explanations ---------------------------------------------------------------------------------------------------


def test_the_tasks_parts_sum_to_the_score():
    made = replica(world(), policy=Policy(shelf=Scoring(click=0.7, watch=2, purchase=3, price_power=0.5)))
    made.apply(delta(2, blobs={CARD: cards(range(40), price=[float(i) for i in range(40)])}))
    for answer in (
        rank(made, "u1", "shelf", range(40), explain=True),
        recommend(made, "u1", "shelf", 10, explain=True),
    ):
        for r in answer.items:
            assert sum(r.explanation.tasks.values()) == pytest.approx(r.score, rel=1e-5)
            assert r.explanation.tasks["click"] == pytest.approx(0.7 * r.click, rel=1e-5)
            assert r.explanation.tasks["watch"] == pytest.approx(2 * r.click * r.watch, rel=1e-5)
    assert all(r.explanation is None for r in rank(made, "u1", "shelf", range(40)).items)


def test_a_features_share_is_what_the_score_falls_by_where_it_is_unknown():
    made, first = replica(world()), world()
    said = {r.item: r for r in rank(made, "u1", "video", range(40), query="red tea", explain=True).items}
    features = said[3].explanation.features
    assert set(features) == {
        "user", "history", "query", "moment", "scenario", "item", "content", "co-clicks", "item's counts", "age",
        "item's clicks of late", "category's counts", "seller's counts",
    }  # fmt: skip
    asked = {r.item: r.score for r in rank(made, "u1", "video", range(40)).items}
    scenarios = [{r.item: r.score for r in rank(made, "u1", s, range(40), query="red tea").items} for s in SCENARIOS]
    first.tables[USER].columns["weights"][1] = 0  # as that of a user whose row says nothing
    nobody = {r.item: r.score for r in rank(replica(first), "u1", "video", range(40), query="red tea").items}
    unwarmed = world()
    unwarmed.tables[ITEM].columns["heat"][:] = 0
    cold = {r.item: r.score for r in rank(replica(unwarmed), "u1", "video", range(40), query="red tea").items}
    for item, r in said.items():
        falls = r.explanation.features
        assert falls["query"] == pytest.approx(r.score - asked[item], abs=1e-5)
        assert falls["user"] == pytest.approx(r.score - nobody[item], abs=1e-5)
        assert falls["item's clicks of late"] == pytest.approx(r.score - cold[item], abs=1e-5)
        assert falls["scenario"] == pytest.approx(r.score - np.mean([s[item] for s in scenarios]), abs=1e-5)
    stranger = rank(made, "nobody", "video", ["no such item"], explain=True).items[0].explanation
    for name in ("user", "history", "query", "item", "content", "co-clicks", "item's counts"):
        assert stranger.features[name] == pytest.approx(0, abs=1e-6), "there is nothing to be without"


def test_without_the_history_is_as_if_nothing_had_been_done():
    first = world()
    for name in ("from_moment.weight", "wide_near"):  # what else hangs on what was done
        first.dense[name][:] = 0
    said = {r.item: r for r in rank(replica(first), "u1", "shelf", range(40), explain=True).items}
    first.tables[USER].columns["history"][1] = as_array([EMPTY])[0]
    idle = {r.item: r.score for r in rank(replica(first), "u1", "shelf", range(40)).items}
    falls = {item: r.explanation.features["history"] for item, r in said.items()}
    assert falls == pytest.approx({item: r.score - idle[item] for item, r in said.items()}, abs=1e-5)
    assert max(falls.values()) > 0.01


def test_explanations_are_of_the_best_hundred():
    made = replica(world())
    answer = rank(made, "u1", "shelf", [f"x{i}" for i in range(MOST + 30)], explain=True)
    assert [r.explanation is not None for r in answer.items] == [True] * MOST + [False] * 30


def test_the_rules_that_moved_an_item_are_said_in_words():
    made = replica(world(6), policy=Policy(exploration=GREEDY, reranking=Reranking(seller_cap=1)))
    best = [r.item for r in rank(made, "u1", "shelf", range(6)).items]
    seller = dict(zip(best, ["s", "s", "t", "s", "u", "v"], strict=True))
    made.apply(delta(2, blobs={CARD: cards(range(6), seller=[seller[i] for i in range(6)])}))
    page = recommend(made, "u1", "shelf", 6, explain=True).items
    assert [s.item for s in page] == [best[i] for i in (0, 2, 4, 5, 1, 3)]
    assert [s.explanation.rules for s in page] == [
        [], ["moved from 2 to 1: the rules held others back"], ["moved from 4 to 2: the rules held others back"],
        ["moved from 5 to 3: the rules held others back"], ["seller cap moved it from 1 to 4"],
        ["seller cap moved it from 3 to 5"],
    ]  # fmt: skip


def test_what_was_explored_says_where_it_would_have_been():
    made = replica(world(), epsilon=0.5)
    best = [r.item for r in rank(made, "u1", "shelf", range(40)).items]
    explored = 0
    for _ in range(20):
        page, left = recommend(made, "u1", "shelf", 6, explain=True).items, list(best)
        for s in page:
            surprise, expected = s.item != left[0], best.index(s.item)
            left.remove(s.item)
            explored += surprise
            said = s.explanation.rules
            assert (said == [f"explored: would have been at place {expected}"]) == surprise
            assert surprise or said == (
                [] if expected == s.position else [f"moved from {expected} to {s.position}: others were explored"]
            )
    assert explored > 20


# --- similar items --------------------------------------------------------------------------------------------------


def test_similar_items_are_those_clicked_together_and_those_with_vectors_alike():
    first, rng = world(60), np.random.default_rng(5)
    rows = first.tables[ITEM]
    rows.columns["weights"][:] = rng.normal(0, 0.5, (60, DIM))
    rows.columns["neighbours"][:] = 0
    rows.columns["neighbours"][3, 0] = ids(ITEM, [40])[0]
    rows.columns["nearness"][3, 0] = rows.columns["taken"][3] = rows.columns["taken"][40] = 500
    for name in ("category", "seller", "words"):
        rows.columns[name][:] = 0
    rows.columns["heat_ms"][:] = NOW + HOUR
    rows.columns["weights"][9] = 2 * rows.columns["weights"][3]
    made = replica(first)
    answer = made.similar("3", SimilarQuery(k=60))
    found = {one.item: one for one in answer.items}
    assert 3 not in found
    assert {found[40].item, found[9].item} == {one.item for one in answer.items[:2]}
    assert found[9].alike == pytest.approx(1, abs=1e-6)
    assert found[9].together == 0
    assert found[40].together == pytest.approx(500 / (500 + 10), rel=1e-3)
    a, b = rows.columns["weights"][[3, 40]]
    assert found[40].alike == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    for one in answer.items:
        assert one.score == pytest.approx(one.together + one.alike)
    assert [one.score for one in answer.items] == sorted((one.score for one in answer.items), reverse=True)
    assert (answer.item, answer.model_version, answer.model_age_ms) == (3, "1.1", HOUR)
    assert len(made.similar(3, SimilarQuery(k=4)).items) == 4


def test_what_is_similar_and_sold_out_is_not_named():
    made = replica(world(20))
    best = [one.item for one in made.similar(1, SimilarQuery(k=5)).items]
    made.apply(delta(2, blobs={CARD: cards(best[:2], stock=0)}))
    assert not {one.item for one in made.similar(1, SimilarQuery(k=19)).items} & set(best[:2])
    assert made.similar(best[0], SimilarQuery()).items, "one that is sold out has similar ones"


def test_an_item_without_a_row_is_similar_by_its_card_and_an_unknown_one_is_refused():
    made = replica(world(20))
    made.apply(delta(2, blobs={CARD: cards(["new"], category=2)}))
    answer = made.similar("new", SimilarQuery(k=20))
    of = made.state.categories.gather(made.state.categories.find(ids(CATEGORY, [2])))[0]
    assert all(one.together == 0 for one in answer.items)
    assert answer.items[0].alike > 0
    assert of.any()
    with pytest.raises(UnknownItem, match="'no such' is neither in the catalogue nor known to the model"):
        made.similar("no such", SimilarQuery())
    with pytest.raises(NotReady):
        replica().similar(1, SimilarQuery())
    made.apply(delta(3, gone={CARD: ids(ITEM, [1])}))
    assert made.similar(1, SimilarQuery()).items, "the model knows it"


# --- deadlines ------------------------------------------------------------------------------------------------------


class Hours:
    """A timer that goes on by `step` seconds whenever it is looked at."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def timed() -> Callable[..., Replica]:
    def make(step: float, n: int = 3 * SLICE) -> Replica:
        settings = ReplicaSettings(
            nearest=n, newest=0, popular=0, neighbours=0, policy=Policy(exploration=Exploration(epsilon=0, seed=1))
        )
        made = Replica(settings, FEATURES, RANKER, clock=lambda: NOW + HOUR, timer=Hours(step))
        made.apply(world(n))
        return made

    return make


def test_past_the_deadline_the_rest_of_a_ranking_is_in_retrievals_order(timed):
    n = 3 * SLICE
    whole = rank(timed(0.0), "u1", "shelf", range(n))
    assert not whole.degraded
    score = {r.item: r.score for r in whole.items}
    made = timed(0.01)
    cut = made.rank(
        RankRequest("u1", list(range(n))), deadline=0.025
    )  # asked at 0.01, at 0.02 (before the second slice), at 0.03
    assert cut.degraded
    assert sorted(r.item for r in cut.items) == list(range(n))
    scored, rest = cut.items[: 2 * SLICE], cut.items[2 * SLICE :]
    assert [r.score for r in scored] == pytest.approx([score[r.item] for r in scored], rel=1e-5)
    assert [r.score for r in scored] == sorted((r.score for r in scored), reverse=True)
    assert {(r.score, r.click, r.watch, r.purchase) for r in rest} == {(0, 0, 0, 0)}
    late = timed(1.0).rank(RankRequest("u1", list(range(n))), deadline=-5.0)
    assert sum(r.score > 0 for r in late.items) == SLICE, "one slice is scored, however late it is"
    assert [r.item for r in late.items[2 * SLICE :]] == [r.item for r in rest], "the order is that of retrieval"


def test_a_deadline_far_off_changes_nothing(timed):
    n = 3 * SLICE
    whole = rank(timed(0.0), "u1", "shelf", range(n))
    for deadline in (2.0, AMPLE_S * n / 2):  # all at once; in slices
        again = timed(0.0).rank(RankRequest("u1", list(range(n))), deadline=deadline)
        assert not again.degraded
        assert [r.item for r in again.items[:50]] == [r.item for r in whole.items[:50]]
        assert [r.score for r in again.items] == pytest.approx([r.score for r in whole.items], rel=1e-5)


def test_past_the_deadline_a_page_is_made_of_what_is_scored(timed):
    made = timed(1.0)
    page = made.recommend(RecommendRequest("u1", k=100), deadline=-1.0)
    assert page.degraded
    assert page.candidates == SLICE
    assert len(page.items) == 100
    assert [s.score for s in page.items] == sorted((s.score for s in page.items), reverse=True)
    assert page.items[-1].score > 0


# --- those who are not known ----------------------------------------------------------------------------------------


def fresh(n: int = 40, **columns: Any) -> Version:
    """A model as it begins: weights that nothing was learned into, items told apart by their counts alone."""
    first = world(n)
    first.dense = Ranker(DIM, RANKER).weights()
    zero = {name: np.zeros_like(column) for name, column in first.tables[ITEM].columns.items()}
    first.tables[ITEM].columns.update(zero | {name: np.asarray(c, zero[name].dtype) for name, c in columns.items()})
    return first


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_stranger_is_shown_what_is_popular_when_nothing_else_is_known(scenario):
    rng = np.random.default_rng(4)
    for columns in (
        {"impressions": np.full(40, 1000), "clicks": rng.permutation(40) * 20},
        {"interactions": rng.permutation(40)},
    ):
        first = fresh(**columns)
        first.dense["heads"][:] = 0  # or what the deep part makes of counts at first is anything
        made = replica(first, epsilon=0.0)
        likes = next(column for name, column in columns.items() if name != "impressions")
        by_taste = np.argsort(-likes).tolist()
        page = [s.item for s in recommend(made, "nobody", scenario, 40).items]
        assert page[:5] == by_taste[:5]
        assert [r.item for r in rank(made, "nobody", scenario, range(40)).items][:5] == by_taste[:5]


def test_strangers_in_other_scenarios_are_shown_other_things():
    made = replica(world(), epsilon=0.0)
    pages = {s: [i.item for i in recommend(made, "nobody", s, 10).items] for s in SCENARIOS}
    assert len(set(map(tuple, pages.values()))) == len(SCENARIOS), "the scenario is a feature"
    by_id = [item for _, item in sorted(zip(ids(ITEM, range(40)).tolist(), range(40), strict=True))]
    for scenario, page in pages.items():
        assert page != by_id[:10]
        assert len({i.score for i in recommend(made, "nobody", scenario, 10).items}) == 10
        other = [i.item for i in recommend(made, "u1", scenario, 10).items]
        assert page != other, "what is known of a user counts"


def test_an_item_with_a_card_and_no_row_is_scored_by_what_its_card_says():
    made = replica(world(20), epsilon=0.0)
    made.apply(delta(
        2, tables={CATEGORY: category_rows([0, 1], np.array([np.full(DIM, 3), np.full(DIM, -3)]))},
        blobs={CARD: cards(["a", "b", "c"], category=[0, 1, None], seller=[0, 0, None], created=NOW)},
    ))  # fmt: skip
    score = {r.item: r.score for r in rank(made, "u1", "shelf", ["a", "b", "c", "no card"]).items}
    assert score["a"] != pytest.approx(score["b"], rel=1e-3)
    assert score["c"] == pytest.approx(score["no card"], rel=1e-5), "its card says nothing"
    # As if it had a row that says the same, and nothing else.
    rows = item_rows(["d"], np.zeros((1, DIM)), [0], seller=ids("seller", [0]), nearness=np.zeros((1, KEPT)))
    made.apply(delta(3, tables={ITEM: rows}, blobs={CARD: cards(["d"], category=0, seller=0)}))
    both = {r.item: r.score for r in rank(made, "u1", "shelf", ["a", "d"]).items}
    assert both["a"] == pytest.approx(both["d"], rel=1e-5)
    assert {"a", "b", "c"} <= {s.item for s in recommend(made, "u1", "shelf", 30).items}, "it is among the newest"
