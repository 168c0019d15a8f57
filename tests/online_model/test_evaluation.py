"""Prequential figures against their plain definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_model.evaluation import Evaluation, TaskScores


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
    assert Evaluation(4).metrics()["purchase"]["unmatched"] == 0


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


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.booleans()), max_size=60), st.integers(0, 60))
def test_restored_it_goes_on_bit_for_bit(scores, cut):
    def feed(evaluation, part):
        for key, p, flip in part:
            evaluation.tasks["purchase"].add(np.array([key]), np.array([p]), np.array([0]))
            if flip:
                evaluation.tasks["purchase"].flip(np.array([key // 2]))

    whole, first, second = Evaluation(16), Evaluation(16), Evaluation(16)
    feed(whole, scores)
    feed(first, scores[:cut])
    second.load(first.state())
    feed(second, scores[cut:])
    assert second.metrics() == whole.metrics()
    assert {n: a.tobytes() for n, a in second.state().items()} == {n: a.tobytes() for n, a in whole.state().items()}


def test_another_window_keeps_the_totals():
    key, p, y = data(100)
    task, other = TaskScores(50), TaskScores(20)
    task.add(key, p, y)
    other.load(task.state())
    assert other.total() == task.total()
    assert other.recent().count == 0
    other.add(key, p, y)
    assert other.recent().count == 20


def test_sampled_negatives_claim_no_rate():
    key, p, y = data(500)
    evaluation = Evaluation(100)
    evaluation.tasks["click_sampled"].add(key, p, y)
    sampled = evaluation.metrics()["click_sampled"]
    assert sampled["sampled"] is True
    assert sampled["auc"] > 0.5
    assert (sampled["ne"], sampled["calibration"], sampled["recent"]["calibration"]) == (None, None, None)
    assert evaluation.metrics()["click"]["count"] == 0
