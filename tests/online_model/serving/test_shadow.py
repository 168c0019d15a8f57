"""A shadow's figures are those of the clicks that came for what was shown, with an interval that tells the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from online_model.serving.shadow import WINDOW_MS, Comparison, Pages, log_losses


def test_log_losses_are_those_of_the_definition() -> None:
    got = log_losses([0.25, 0.25, 0.0, 1.0], np.array([True, False, True, True]))
    assert got[:2] == pytest.approx([-math.log(0.25), -math.log(0.75)])
    assert np.isfinite(got).all()


def test_the_difference_is_per_item_and_its_interval_is_paired_by_request() -> None:
    dice = np.random.default_rng(3)
    compared, d, n = Comparison(), [], []
    for _ in range(200):
        size = dice.integers(1, 12)
        clicked = dice.random(size) < 0.2
        ours, theirs = dice.random(size), dice.random(size)
        compared.add(ours, theirs, clicked)
        d.append((log_losses(theirs, clicked) - log_losses(ours, clicked)).sum())
        n.append(size)
    figures = compared.figures()
    ratio = sum(d) / sum(n)
    residuals = [x - ratio * size for x, size in zip(d, n, strict=True)]
    half = 1.96 * math.sqrt(200) * np.std(residuals, ddof=1) / sum(n)  # their mean is 0
    assert figures["requests"] == 200
    assert figures["difference"] == pytest.approx(ratio)
    assert (figures["low"], figures["high"]) == pytest.approx((ratio - half, ratio + half))
    assert figures["shadow_log_loss"] - figures["log_loss"] == pytest.approx(ratio)  # type: ignore[operator]


def test_nineteen_intervals_in_twenty_hold_the_truth() -> None:
    """Items of a request share a taste, which an interval over items would take for so many observations."""
    dice = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        compared = Comparison()
        for _ in range(150):
            likely = dice.random()
            compared.add(np.full(8, 0.5), np.full(8, 0.8), np.full(8, dice.random() < likely))
        low, high = compared.figures()["low"], compared.figures()["high"]
        assert low is not None
        assert high is not None
        held += low <= -0.5 * math.log(0.8) - 0.5 * math.log(0.2) + math.log(0.5) <= high
    assert 0.91 < held / 300 < 0.98


def test_nothing_is_claimed_of_too_few() -> None:
    compared = Comparison()
    assert compared.figures()["difference"] is None
    compared.add([0.5], [0.6], np.array([True]))
    assert compared.figures()["difference"] == pytest.approx(math.log(0.5 / 0.6))
    assert compared.figures()["low"] is None


def test_a_page_counts_once_its_window_is_over_with_the_clicks_that_came() -> None:
    pages = Pages()
    pages.show("r", 1_000, ["a", "b"], [0.5, 0.5])
    pages.click("r", "b")  # before the shadow has come to it
    pages.score("r", [0.1, 0.9])
    pages.click("r", "c")
    pages.click("other", "a")
    assert pages.moves(1_000 + WINDOW_MS) == 0
    assert pages.comparison.figures()["requests"] == 0
    assert pages.moves(1_001 + WINDOW_MS) == 0
    pages.click("r", "a")  # too late
    assert pages.comparison.figures()["difference"] == pytest.approx(math.log(0.5 / 0.9))


def test_pages_that_the_shadow_did_not_score_are_counted_and_not_compared() -> None:
    pages = Pages(most=1)
    assert pages.show("r", 1_000, ["a"], [0.5])
    assert not pages.show("s", 1_000, ["a"], [0.5]), "memory is bounded"
    assert pages.moves(1_001 + WINDOW_MS) == 1
    assert (len(pages), pages.comparison.figures()["requests"]) == (0, 0)
