"""Prequential figures against their plain definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_model.evaluation import TaskScores
from online_model.evaluation.scores import ECE_BINS, SCENARIOS


def plain(p, y):
    """(auc, ne, calibration) by their definitions."""
    p, y = np.asarray(p, float), np.asarray(y)
    pos, neg = p[y == 1], p[y == 0]
    if not len(pos):
        return None, None, None
    calibration = p.mean() / y.mean()
    if not len(neg):
        return None, None, calibration
    auc = ((pos[:, None] > neg).mean() + (pos[:, None] == neg).mean() / 2).item()
    loss = -np.where(y == 1, np.log(p), np.log(1 - p)).mean()
    base = y.mean()
    return auc, loss / -(base * np.log(base) + (1 - base) * np.log(1 - base)), calibration


def close(figures, expected):
    for got, want in zip((figures.auc, figures.ne, figures.calibration), expected, strict=True):
        assert got == (None if want is None else pytest.approx(want, abs=2e-3))


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n) - 2
    p = 1 / (1 + np.exp(-z))
    return np.arange(1, n + 1), p, (rng.random(n) < p).astype(int)


def test_total_and_recent_are_what_their_definitions_say():
    key, p, y = data(5000)
    task = TaskScores(window=700)
    for at in range(0, 5000, 190):
        task.add(key[at : at + 190], p[at : at + 190], y[at : at + 190])
    close(task.total(), plain(p, y))
    close(task.recent(), plain(p[-700:], y[-700:]))
    assert task.total().count == 5000
    assert task.recent().count == 700


def test_a_batch_larger_than_the_window():
    key, p, y = data(1000)
    task = TaskScores(window=64)
    task.add(key, p, y)
    close(task.total(), plain(p, y))
    close(task.recent(), plain(p[-64:], y[-64:]))


def test_a_label_that_comes_later_changes_total_and_recent_once():
    key, p, y = data(900)
    task = TaskScores(window=1000)
    task.add(key, p, np.zeros(900, int))
    late = key[y == 1]
    assert task.flip(late) == len(late)
    assert task.flip(late) == 0, "a second purchase of the same example changes nothing"
    close(task.total(), plain(p, y))
    close(task.recent(), plain(p, y))


def test_a_label_that_comes_when_its_score_is_forgotten_is_counted_and_calibration_stays_exact():
    key, p, y = data(3000)
    task = TaskScores(window=4)
    task.add(key, p, np.zeros(3000, int))
    bought = key[y == 1]
    found = task.flip(bought)
    total = task.total()
    assert found == int(y[-4:].sum())
    assert total.unmatched == len(bought) - found
    assert total.positives == len(bought)
    assert total.calibration == pytest.approx(p.sum() / y.sum(), rel=1e-5)


def test_a_score_weighs_as_many_rows_as_it_stands_for():
    """The figures are those of all rows repeated."""
    key, p, y = data(4000)
    weight = np.where(y == 1, 1, 3)
    task = TaskScores(window=1000)
    for at in range(0, 4000, 500):
        part = slice(at, at + 500)
        task.add(key[part], p[part], y[part], weight[part])
    close(task.total(), plain(np.repeat(p, weight), np.repeat(y, weight)))
    close(task.recent(), plain(np.repeat(p[-1000:], weight[-1000:]), np.repeat(y[-1000:], weight[-1000:])))
    assert task.total().count == int(weight.sum())
    other = TaskScores(window=1000)
    other.load(task.state())
    assert (other.total(), other.recent()) == (task.total(), task.recent())


def test_extreme_scores_flip_into_their_own_class():
    p = np.array([0.0, 1.0, 1 - 1e-7, 1e-30, 0.5], np.float32)
    task = TaskScores(window=8)
    task.add(np.arange(1, 6), p, np.zeros(5, int))
    task.flip(np.arange(1, 6))
    assert (task.state()["classes"] >= 0).all()
    assert task.total().positives == 5


def test_undefined_figures_are_none():
    task = TaskScores(window=8)
    assert (task.total().auc, task.total().ne, task.total().calibration, task.total().count) == (None, None, None, 0)
    task.add(np.array([1]), np.array([0.3]), np.array([0]))
    assert (task.total().auc, task.total().ne, task.total().calibration) == (None, None, None)
    task.flip(np.array([1]))
    assert (task.total().auc, task.total().ne) == (None, None)
    assert task.total().calibration == pytest.approx(0.3)


def test_another_window_keeps_the_totals():
    key, p, y = data(100)
    task, other = TaskScores(50), TaskScores(20)
    task.add(key, p, y)
    other.load(task.state())
    assert other.total() == task.total()
    assert other.recent().count == 0
    other.add(key, p, y)
    assert other.recent().count == 20


def plain_ece(p, y):
    """Guo et al. 2017, equation 3, over bins that hold equally many of the sorted predictions."""
    order = np.argsort(p, kind="stable")
    parts = zip(np.array_split(p[order], ECE_BINS), np.array_split(y[order], ECE_BINS), strict=True)
    return sum(abs(a.sum() - b.sum()) for a, b in parts) / len(p)


@pytest.mark.parametrize("odds", [1.0, 2.0, 0.3])
def test_the_calibration_error_is_that_of_bins_of_equal_mass(odds):
    key, p, y = data(20_000)
    told = odds * p / (1 - p + odds * p)
    task = TaskScores(window=5_000)
    for at in range(0, 20_000, 900):
        task.add(key[at : at + 900], told[at : at + 900], y[at : at + 900])
    assert task.total().ece == pytest.approx(plain_ece(told, y), abs=2e-3)
    assert task.recent().ece == pytest.approx(plain_ece(told[-5_000:], y[-5_000:]), abs=4e-3)


def test_the_calibration_error_sees_what_cancels_in_the_mean():
    p, y = np.repeat([0.2, 0.4], 5_000), np.zeros(10_000, int)
    y[:2_000], y[5_000:6_000] = 1, 1  # of the first 40 %, of the second 20 %
    task = TaskScores(window=10)
    task.add(np.arange(1, 10_001), p, y)
    assert task.total().calibration == pytest.approx(1, rel=1e-6)
    assert task.total().ece == pytest.approx(0.2, rel=1e-6)


def test_each_scenario_has_the_figures_of_its_own_scores():
    key, p, y = data(6_000)
    scenario = np.random.default_rng(2).integers(3, size=6_000).astype(np.uint8)  # nothing in the fourth
    weight = np.where(y == 1, 1, 2)
    task = TaskScores(window=1_000)
    for at in range(0, 6_000, 170):
        part = slice(at, at + 170)
        task.add(key[part], p[part], np.zeros(len(key[part]), int), weight[part], scenario[part])
        late = part if at % 340 else slice(0, 0)
        bought = np.flatnonzero(y[late] == 1) + at
        assert task.flip(key[bought], scenario[bought]) == len(bought)
    told = y * (np.arange(6_000) // 170 % 2)
    figures = task.metrics()
    assert list(figures["scenarios"]) == list(SCENARIOS[:3])
    for index, name in enumerate(SCENARIOS[:3]):
        for got, since in ((figures["scenarios"][name], 0), (figures["scenarios"][name]["recent"], 5_000)):
            own = np.flatnonzero(scenario[since:] == index) + since
            times = np.where(told[own] == 1, 1, weight[own])
            auc, ne, calibration = plain(np.repeat(p[own], times), np.repeat(told[own], times))
            assert got["auc"] == pytest.approx(auc, abs=5e-3)
            assert got["ne"] == pytest.approx(ne, abs=2e-3)
            assert got["calibration"] == pytest.approx(calibration, rel=1e-5)
            assert got["positives"] == told[own].sum()


def test_a_label_without_its_score_is_counted_in_its_scenario():
    task = TaskScores(window=2)
    for key in range(1, 6):
        task.add(np.array([key]), np.array([0.1]), np.array([0]), None, np.array([key % 2]))
    task.flip(np.array([1, 2, 5]), np.array([1, 0, 1]))
    figures = task.metrics()
    assert (figures["positives"], figures["unmatched"]) == (3, 2)
    assert [(f["positives"], f["unmatched"]) for f in figures["scenarios"].values()] == [(1, 1), (2, 1)]
    assert figures["scenarios"]["video"]["calibration"] == pytest.approx(0.3 / 2)


@given(st.integers(1, 40), st.lists(st.integers(0, 9), max_size=12), st.integers(1, 30))
def test_the_last_scores_are_the_last_ones_wherever_the_ring_has_turned(window, batches, last):
    task, p = TaskScores(window), np.empty(0)
    for number, size in enumerate(batches):
        new = (np.arange(size) + 1 + 10 * number) / 200
        task.add(np.zeros(size, int), new, np.ones(size, int))
        p = np.append(p, new)
    kept = p[-min(window, last) :]
    figures = task.recent(last)
    assert figures.count == len(kept)
    assert figures.calibration == (pytest.approx(kept.mean(), rel=1e-5) if len(kept) else None)
