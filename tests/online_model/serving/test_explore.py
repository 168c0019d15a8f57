"""Exploration says exactly how likely it was to show what it showed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from online_model.serving.explore import Draw, Epsilon, Softmax, Thompson, drawn, fill
from online_model.serving.rerank import Rules
from online_model.serving.settings import Reranking

N = 6
SCORES = np.array([0.30, 0.29, 0.2, 0.1, 0.02, 0.0])
SD = np.array([0.01, 0.05, 0.001, 0.1, 0.03, 0.2])
DRAWS = {
    "epsilon": Epsilon(0.3), "softmax": Softmax(SCORES, 0.5), "thompson": Thompson(SCORES, SD, 3),
}  # fmt: skip


def rules(n: int = N, **settings: int) -> Rules:
    """Candidates of three categories and two sellers, one after the other."""
    return Rules(Reranking(**settings), np.arange(n) % 3 + 1, np.arange(n) % 2 + 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("m", [1, 2, 3, 300])
def test_epsilons_propensities_of_all_candidates_for_a_place_sum_to_one(epsilon, m):
    draw = Epsilon(epsilon)
    total = sum(Fraction(draw.propensity(index, m)) for index in range(m))
    assert float(total) == pytest.approx(1, abs=1e-12)
    assert all(0 <= draw.propensity(index, m) <= 1 for index in range(m))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("may", [[0, 1, 2, 3, 4, 5], [1, 3], [2, 4, 5], [5]])
def test_the_propensities_of_all_who_may_come_sum_to_one(draw, may):
    said = {}
    for u in np.linspace(0, 1, 20_001)[:-1]:
        for v in np.linspace(0, 0.999, len(may) + 1) if isinstance(draw, Epsilon) else [0.5]:
            at, propensity = draw(np.array(may), float(u), float(v))
            said[at] = propensity
    assert all(0 < propensity <= 1 for propensity in said.values())
    assert sum(said.values()) == pytest.approx(1, abs=1e-3 if len(said) < len(may) else 1e-12)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("limits", [{}, {"category_gap": 2, "seller_cap": 1}, {"seller_cap": 2}], ids=str)
def test_items_are_shown_as_often_as_their_propensities_say(draw: Draw, limits: dict):
    """Place by place, given the places before; what was drawn often enough to be sure of."""
    rng, rounds = np.random.default_rng(2), 6_000
    often: dict[tuple, int] = {}
    said: dict[tuple, float] = {}
    for _ in range(rounds):
        page = fill(3, N, rules(**limits), draw, rng)
        for place, propensity in enumerate(page.propensities):
            key = tuple(page.shown[: place + 1])
            often[key] = often.get(key, 0) + 1
            assert said.setdefault(key, propensity) == propensity, "it hangs on the places before, and nothing else"
    for shown, count in often.items():
        before = often.get(shown[:-1], 0) if len(shown) > 1 else rounds
        p = said[shown]
        if before >= 200:
            assert abs(count - before * p) < 5 * np.sqrt(before * p * (1 - p)) + 1, (shown, count, before, p)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_weighted_by_its_propensity_each_candidate_counts_the_same(draw: Draw):
    rng, rounds = np.random.default_rng(3), 20_000
    first, weighted = np.zeros(N), np.zeros(N)
    for _ in range(rounds):
        page = fill(1, N, rules(), draw, rng)
        first[page.shown] += 1 / rounds
        weighted[page.shown] += 1 / page.propensities[0] / rounds
    sure = first > 0.02
    assert sure.sum() >= 3
    assert weighted[sure] == pytest.approx(np.ones(sure.sum()), abs=0.25)


def test_softmax_draws_in_proportion_to_powers_of_the_scores():
    at, propensity = Softmax(SCORES, 0.5)(np.array([0, 2, 3]), 0.0, 0.0)
    assert at == 0
    assert propensity == pytest.approx(0.3**2 / (0.3**2 + 0.2**2 + 0.1**2))
    assert Softmax(np.zeros(4), 0.2)(np.arange(4), 0.6, 0.0) == (2, 0.25), "scores of zero are alike"
    assert Softmax(SCORES, 1e-6)(np.arange(N), 0.999999, 0.0) == (0, 1.0), "no temperature, no chance"


@pytest.mark.parametrize("seed", range(6))
def test_thompson_draws_as_the_largest_of_normal_draws_would_come(seed):
    rng = np.random.default_rng(seed)
    n = 40
    mean = np.sort(rng.gamma(1, 0.1, n))[::-1].copy()
    sd = rng.gamma(0.7, 0.05, n) + 1e-4
    draw = Thompson(mean, sd, 10)
    may = np.flatnonzero(rng.random(n) < 0.7)
    often = np.bincount((mean[may] + sd[may] * rng.normal(size=(100_000, len(may)))).argmax(1), minlength=len(may))
    assert draw.probabilities(may) == pytest.approx(often / 100_000, abs=0.012)
    assert draw.probabilities(may).sum() == pytest.approx(1, abs=1e-3)


def test_thompson_of_what_is_known_for_sure_takes_the_best():
    draw = Thompson(np.array([0.3, 0.2, 0.1]), np.full(3, 1e-6), 3)
    assert [draw(np.array(may), 0.5, 0.5) for may in ([0, 1, 2], [1, 2], [2])] == [(0, 1.0), (0, 1.0), (0, 1.0)]


def test_each_place_holds_one_candidate_and_its_own_propensity():
    rng, draw = np.random.default_rng(1), Epsilon(0.4)
    for _ in range(300):
        page, left = fill(8, 20, rules(20), draw, rng), list(range(20))
        for entry, p, surprise in zip(page.shown, page.propensities, page.surprises, strict=True):
            assert p == draw.propensity(left.index(entry), len(left))
            assert surprise == (entry != left[0])
            left.remove(entry)


def test_without_exploration_the_best_are_shown_for_certain():
    page = fill(2, 3, rules(3), Epsilon(0.0), np.random.default_rng(0))
    assert (page.shown, page.propensities) == ([0, 1], [1.0, 1.0])


def test_more_places_than_candidates():
    page = fill(10, 2, rules(2), Epsilon(1.0), np.random.default_rng(0))
    assert sorted(page.shown) == [0, 1]
    assert page.propensities == [0.5, 1.0]


def test_the_same_seed_shows_the_same():
    for draw in DRAWS.values():
        once, again = (fill(5, N, rules(), draw, np.random.default_rng(7)) for _ in range(2))
        assert once == again


def test_what_weighs_nothing_is_never_drawn():
    weights = np.array([0.0, 1.0, 0.0, 2.0, 0.0])
    assert {drawn(weights, u)[0] for u in (0.0, 0.2, 1 / 3, 0.9, np.nextafter(1, 0))} == {1, 3}
