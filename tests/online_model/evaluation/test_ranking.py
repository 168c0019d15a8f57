"""Next-item figures against their plain definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_model.evaluation import Ranking, mid_ranks, ranked
from online_model.ranker import WAYS


def plain(ranks):
    """(hit rate, NDCG, MRR) at 10 of one relevant item each."""
    if not len(ranks):
        return None, None, None
    gains = [1 / np.log2(1 + r) if r <= 10 else 0 for r in ranks]
    return np.mean([r <= 10 for r in ranks]), np.mean(gains), np.mean([1 / r for r in ranks])


def told(figures):
    return figures["hr_at_10"], figures["ndcg_at_10"], figures["mrr"]


@given(st.lists(st.lists(st.integers(2, 60), max_size=9), max_size=9), st.integers(1, 20))
def test_total_and_recent_are_what_their_definitions_say(batches, window):
    ranking, every = Ranking(window, among=30), []
    for batch in batches:
        ranking.add([np.array(batch) / 2] * len(WAYS))
        every += [r / 2 for r in batch]
    figures = ranking.metrics()
    for got, ranks in ((figures, every), (figures["recent"], every[-window:])):
        assert got["count"] == len(ranks)
        assert told(got) == tuple(None if x is None else pytest.approx(x, rel=1e-6) for x in plain(ranks))
    assert (figures["among"], figures["sampled"]) == (30, True)
    again = Ranking(window, among=30)
    again.load(ranking.state())
    assert again.metrics() == figures


def test_what_counts_is_the_rank_by_the_way_that_gained_more_until_then():
    ranking = Ranking(10, among=30)
    good, bad = np.array([1.0]), np.array([25.0])
    ranking.add([bad, good, bad])
    assert ranking.metrics()["mrr"] == pytest.approx(1 / 25), "nothing was known before: the first way"
    assert ranking.metrics()["way"] == "affinity"
    ranking.add([bad, good, bad])
    assert ranking.metrics()["mrr"] == pytest.approx((1 / 25 + 1) / 2)
    again = Ranking(10, among=30)
    again.load(ranking.state())
    assert again.metrics() == ranking.metrics()
    for _ in range(3):
        again.add([good, bad, bad])
    assert again.metrics()["way"] == "click", "three to two"


def test_the_best_is_first_and_ties_share_the_middle():
    others = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5], [0.9, 0.5, 0.1]])
    assert mid_ranks(np.array([0.9, 0.0, 0.5, 0.5]), others).tolist() == [1, 4, 2.5, 2.5]


def test_a_model_that_scores_all_alike_ranks_in_the_middle():
    ranks = mid_ranks(np.zeros(5), np.zeros((5, 100)))
    assert ranks.tolist() == [51] * 5


def test_positions_are_drawn_by_row_and_seed_alone():
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 20_000)
    drawn = ranked(ids, 10, seed=3)
    assert drawn.mean() == pytest.approx(0.1, abs=0.01)
    assert (ranked(ids[::-1], 10, seed=3)[::-1] == drawn).all()
    assert ranked(ids, 1, seed=3).all()
    both = (drawn & ranked(ids, 10, seed=4)).mean()
    assert both == pytest.approx(0.01, abs=0.005), "another seed draws others"


def test_another_number_of_items_begins_anew_another_window_keeps_the_totals():
    ranking = Ranking(10, among=101)
    ranking.add([np.array([1.0, 3.0])] * len(WAYS))
    more, shorter = Ranking(10, among=201), Ranking(5, among=101)
    more.load(ranking.state())
    shorter.load(ranking.state())
    assert more.metrics()["count"] == 0
    assert told(shorter.metrics()) == told(ranking.metrics())
    assert shorter.metrics()["recent"]["count"] == 0
