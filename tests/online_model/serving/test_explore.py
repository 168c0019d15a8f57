"""Exploration says exactly how likely it was to show what it showed."""

from fractions import Fraction

import numpy as np
import pytest

from online_model.serving.explore import explore, propensity


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("m", [1, 2, 3, 300])
def test_propensities_of_all_candidates_for_a_place_sum_to_one(epsilon, m):
    total = sum(Fraction(propensity(index, m, epsilon)) for index in range(m))
    assert float(total) == pytest.approx(1, abs=1e-12)
    assert all(0 <= propensity(index, m, epsilon) <= 1 for index in range(m))


def test_each_place_holds_one_candidate_and_its_own_propensity():
    rng = np.random.default_rng(1)
    for _ in range(300):
        order = rng.permutation(20)
        shown, propensities = explore(order, 8, 0.4, rng)
        left = order.tolist()
        for entry, p in zip(shown, propensities, strict=True):
            assert p == propensity(left.index(entry), len(left), 0.4)
            assert 0 < p <= 1
            left.remove(entry)


def test_items_are_shown_as_often_as_their_propensities_say():
    rng, n, epsilon, rounds = np.random.default_rng(2), 5, 0.3, 40_000
    order = np.arange(n)
    first = np.zeros(n)
    weighted = np.zeros(n)  # inverse propensity: each candidate must come out as 1
    for _ in range(rounds):
        (shown, *_), (p, *_) = explore(order, 2, epsilon, rng)
        first[shown] += 1 / rounds
        weighted[shown] += 1 / p / rounds
    expected = [propensity(index, n, epsilon) for index in range(n)]
    assert first == pytest.approx(expected, abs=0.01)
    assert weighted == pytest.approx(np.ones(n), abs=0.1)


def test_without_exploration_the_best_are_shown_for_certain():
    assert explore(np.array([4, 2, 9]), 2, 0.0, np.random.default_rng(0)) == ([4, 2], [1.0, 1.0])


def test_more_places_than_candidates():
    shown, propensities = explore(np.array([4, 2]), 10, 1.0, np.random.default_rng(0))
    assert sorted(shown) == [2, 4]
    assert propensities == [0.5, 1.0]


def test_the_same_seed_shows_the_same():
    order = np.arange(100)
    once, again = (explore(order, 50, 0.5, np.random.default_rng(7)) for _ in range(2))
    assert once == again
