"""The figures are right: against plain loops, against river, and where scores are tied."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river.metrics import ROCAUC

from replay.comparison import metrics
from replay.comparison.bootstrap import Users, difference, interval

SCORES = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)
RANKED = st.lists(st.lists(st.integers(0, 4), min_size=12, max_size=12), min_size=1, max_size=5)


def _some(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, labels, users): better than chance, users unlike each other."""
    dice = np.random.default_rng(seed)
    user = dice.integers(n // 20, size=n)
    chance = 1 / (1 + np.exp(-(dice.normal(size=n) + dice.normal(size=n // 20)[user] - 1)))
    return chance, (dice.random(n) < chance).astype(np.float32), user.astype(np.int64)


@given(SCORES)
def test_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    score, label = np.array([s for s, _ in pairs], float), np.array([float(is_one) for _, is_one in pairs])
    wins = [
        1.0 if up > down else 0.5 if up == down else 0.0
        for up, down in itertools.product(score[label == 1], score[label == 0])
    ]
    assert metrics.auc(score, label) == pytest.approx(np.mean(wins))


def test_auc_and_log_loss_are_rivers() -> None:
    score, label, _ = _some(1_000)
    area = ROCAUC(n_thresholds=2_000)
    for s, is_one in zip(score, label, strict=True):
        area.update(bool(is_one), float(s))
    assert metrics.auc(score, label) == pytest.approx(area.get(), abs=2e-3)


def test_entropy_of_the_base_rate_is_one_and_calibration_is_predicted_over_actual() -> None:
    label = np.array([1.0, 0, 0, 0] * 50)
    base = metrics.figures(np.full(200, 0.25), label, probabilistic=True)
    assert (base.auc, base.ne, base.calibration) == (0.5, pytest.approx(1.0), pytest.approx(1.0))
    assert base.ece == pytest.approx(np.mean([0.0] * 10), abs=0.1)
    double = metrics.figures(np.full(200, 0.5), label, probabilistic=True)
    assert double.calibration == pytest.approx(2.0)
    assert double.ne == pytest.approx(-math.log(0.5) / -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert metrics.figures(np.full(200, 9.0), label, probabilistic=False).ne is None
    assert metrics.figures(np.ones(3), np.ones(3), probabilistic=True).auc is None


@given(RANKED)
def test_a_tie_is_worth_what_chance_makes_of_it(rows: list[list[int]]) -> None:
    scores = np.array(rows, float)
    found = metrics.gains(scores)
    for at, row in enumerate(rows):
        above = sum(other > row[0] for other in row[1:])
        beside = sum(other == row[0] for other in row[1:])
        places = range(above + 1, above + beside + 2)  # each is as likely
        wanted = {
            "hr_at_10": [place <= 10 for place in places],
            "ndcg_at_10": [1 / math.log2(1 + place) if place <= 10 else 0 for place in places],
            "mrr": [1 / place for place in places],
        }
        for name, values in wanted.items():
            assert found[name][at] == pytest.approx(np.mean(values))


def test_a_constant_score_hits_by_chance_alone() -> None:
    assert metrics.gains(np.zeros((3, 201)))["hr_at_10"].tolist() == pytest.approx([10 / 201] * 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1_000))
def test_a_draw_that_takes_each_user_once_gives_the_figures_themselves(seed: int) -> None:
    score, label, user = _some(3_000, seed)
    users = Users(user, seed, draws=2)
    users.weight[:] = 1
    ndcg = np.random.default_rng(seed).random(50)
    found = users.draw(score, label, True, user[:50], ndcg)
    whole = metrics.figures(score, label, True)
    assert found.auc == pytest.approx([whole.auc] * 2, abs=3e-4)
    assert found.ne == pytest.approx([whole.ne] * 2)
    assert found.calibration == pytest.approx([whole.calibration] * 2)
    assert found.ndcg_at_10 == pytest.approx([ndcg.mean()] * 2)


def test_a_draw_is_of_whole_users() -> None:
    score, label, user = _some(2_000)
    users = Users(user, seed=1, draws=20)
    found = users.draw(score, label, True, user[:0], np.empty(0))
    for number, weight in enumerate(users.weight):
        again = np.repeat(np.arange(len(user)), weight[users.of_score].astype(int))
        figures = metrics.figures(score[again], label[again], True)
        assert found.auc[number] == pytest.approx(figures.auc, abs=5e-4)
        assert found.ne is not None
        assert found.ne[number] == pytest.approx(figures.ne, rel=1e-5)
    assert found.ndcg_at_10 is None


def test_a_constant_score_has_an_auc_of_a_half_in_every_draw() -> None:
    _, label, user = _some(2_000)
    users = Users(user, seed=1, draws=20)
    assert users.draw(np.full(2_000, 0.3), label, False, user[:0], np.empty(0)).auc == pytest.approx([0.5] * 20)


def test_draws_without_both_labels_have_no_figures_and_no_scores_no_interval() -> None:
    user = np.arange(6)
    label = np.array([1.0, 0, 0, 0, 0, 0])
    found = Users(user, seed=1, draws=300).draw(np.linspace(0.1, 0.6, 6), label, True, user[:0], np.empty(0))
    assert 50 < np.isnan(found.auc).sum() < 250
    assert found.ne is not None
    assert (np.isnan(found.ne) == np.isnan(found.auc)).all()
    assert interval(found.auc) is None
    nobody = Users(user[:0], seed=1).draw(np.empty(0), np.empty(0), True, user[:0], np.empty(0))
    assert interval(nobody.auc) is interval(nobody.calibration) is None


def test_the_interval_of_a_difference_is_paired() -> None:
    score, label, user = _some(4_000)
    noise = np.clip(score + np.random.default_rng(5).normal(0, 0.02, len(score)), 0.001, 0.999)
    users = Users(user, seed=0, draws=200)
    one, other = (users.draw(s, label, True, user[:0], np.empty(0)) for s in (score, noise))
    assert difference(one.auc, one.auc) == (0.0, 0.0)
    low, high = interval(one.auc) or (0, 0)
    assert low < metrics.auc(score, label) < high
    near, far = difference(one.auc, other.auc) or (0, 0)
    assert far - near < (high - low) / 3, "what both systems share does not blur the difference"
    assert difference(one.ndcg_at_10, other.ndcg_at_10) is None
