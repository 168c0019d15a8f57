"""Figures of watch time against their plain definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_model.evaluation import WatchTime
from online_model.evaluation.scores import SCENARIOS


def plain_xauc(predicted, played):
    """Of all pairs whose plays differ."""
    longer = np.sign(played[:, None] - played)
    right = (1 + longer * np.sign(predicted[:, None] - predicted)) / 2
    return right[longer != 0].mean()


def plays(n, seed=0, noise=0.7):
    rng = np.random.default_rng(seed)
    played = np.exp(rng.normal(9, 1, n)).astype(np.int64)
    predicted = played * np.exp(rng.normal(0, noise, n))
    return predicted, played, rng.integers(len(SCENARIOS), size=n).astype(np.uint8)


def fed(window, columns, size):
    time = WatchTime(window)
    for at in range(0, len(columns[0]), size):
        time.add(*(c[at : at + size] for c in columns))
    return time


@pytest.mark.parametrize(("window", "size"), [(2_000, 130), (1_500, 4_000), (7, 1)])
def test_total_and_recent_are_what_their_definitions_say(window, size):
    columns = plays(12_000)
    figures = fed(window, columns, size).metrics()
    for got, since in ((figures, 0), (figures["recent"], 12_000 - window)):
        predicted, played, _ = (c[since:] for c in columns)
        assert got["count"] == len(played)
        assert got["mae_ms"] == pytest.approx(np.abs(predicted - played).mean(), rel=1e-5)
        if len(played) > 100:
            assert got["xauc"] == pytest.approx(plain_xauc(predicted[:3_000], played[:3_000]), abs=0.015)


def test_each_scenario_has_the_figures_of_its_own_plays():
    predicted, played, scenario = plays(12_000)
    predicted = np.where(scenario == 2, -predicted, predicted)  # in search the order is told the wrong way round
    figures = fed(3_000, (predicted, played, scenario), 200).metrics()
    for index, name in enumerate(SCENARIOS):
        own = scenario == index
        assert figures["scenarios"][name]["count"] == own.sum()
        assert figures["scenarios"][name]["mae_ms"] == pytest.approx(np.abs(predicted - played)[own].mean(), rel=1e-5)
        expected = plain_xauc(predicted[own][:2_000], played[own][:2_000])
        assert figures["scenarios"][name]["xauc"] == pytest.approx(expected, abs=0.03)
        assert figures["scenarios"][name]["recent"]["xauc"] == pytest.approx(expected, abs=0.06)
    assert figures["scenarios"]["search"]["xauc"] < 0.3


def test_ties_count_half_and_equal_plays_say_nothing():
    time = WatchTime(50)
    time.add(np.full(50, 7.0), np.arange(50), np.zeros(50, np.uint8))
    assert (time.metrics()["xauc"], time.metrics()["recent"]["xauc"]) == (0.5, 0.5)
    alike = WatchTime(50)
    alike.add(np.arange(50.0), np.full(50, 7), np.zeros(50, np.uint8))
    assert alike.metrics()["xauc"] is None
    assert alike.metrics()["mae_ms"] == pytest.approx(np.abs(np.arange(50) - 7).mean())


def test_without_plays_nothing_is_claimed():
    assert WatchTime(5).metrics() == {
        "mae_ms": None, "xauc": None, "count": 0, "scenarios": {}, "recent": {"mae_ms": None, "xauc": None, "count": 0},
    }  # fmt: skip


@given(st.integers(1, 60), st.integers(0, 60), st.lists(st.integers(0, 25), max_size=8))
def test_restored_it_goes_on_bit_for_bit_and_batches_do_not_matter(window, cut, sizes):
    columns = plays(60)
    whole, first, second = (WatchTime(window) for _ in range(3))
    whole.add(*columns)
    first.add(*(c[:cut] for c in columns))
    second.load(first.state())
    at = cut
    for size in (*sizes, 60):
        second.add(*(c[at : at + size] for c in columns))
        at += size
    assert second.metrics()["recent"] == whole.metrics()["recent"]
    assert second.metrics()["xauc"] == whole.metrics()["xauc"], "the same pairs are drawn however it is cut"
    for name in ("predicted", "played", "scenario", "pairs", "scores", "counts"):
        assert second.state()[name].tobytes() == whole.state()[name].tobytes()


def test_another_window_keeps_the_totals():
    time, other = fed(100, plays(300), 40), WatchTime(50)
    other.load(time.state())
    told = other.metrics()
    assert {k: told[k] for k in ("mae_ms", "xauc", "count")} == {
        k: time.metrics()[k] for k in ("mae_ms", "xauc", "count")
    }
    assert told["recent"]["count"] == 0
