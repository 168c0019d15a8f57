"""Drift: river's detector finds a change of the loss, nothing where there is none, and the same after a restart."""

import numpy as np
import pytest

from online_model.evaluation import Drift
from online_model.evaluation.drift import GRAIN, MOST


def losses(n, rate, seed):
    """Log losses of a model that says `rate`, which is right: click rates vary them a lot."""
    clicked = np.random.default_rng(seed).random(n) < rate
    return np.where(clicked, -np.log(rate), -np.log1p(-rate))


def test_a_rise_and_a_fall_are_found_once_each():
    drift = Drift()
    drift.add(losses(30_000, 0.1, 0))
    assert drift.metrics()["found"] == 0
    drift.add(losses(30_000, 0.1, 1) * 1.5)
    assert (drift.found, drift.rose) == (1, 1)
    assert drift.metrics()["loss"] == pytest.approx(losses(30_000, 0.1, 1).mean() * 1.5, rel=0.05)
    assert drift.metrics()["examples"] == pytest.approx(30_000, rel=0.25), "what was before the change is forgotten"
    drift.add(losses(30_000, 0.1, 2))
    assert (drift.found, drift.rose) == (2, 1)


def test_a_loss_that_stays_raises_no_alarm():
    """Twenty streams of 64,000 examples each."""
    found = 0
    for seed in range(20):
        drift = Drift()
        drift.add(losses(64_000, 0.05, seed))
        found += drift.found
    assert found <= 1


def test_restored_it_goes_on_bit_for_bit():
    whole, part = Drift(), Drift()
    stream = np.concatenate([losses(20_000, 0.1, i) * (1 + i % 2) for i in range(4)])
    for number, losses_of in enumerate(np.array_split(stream, 90)):
        if number % 7 == 0:
            killed, part = part, Drift()
            part.load(killed.state())
        for one in (whole, part):
            one.add(losses_of)
    assert whole.found == 3
    assert part.metrics() == whole.metrics()
    assert {n: a.tobytes() for n, a in part.state().items()} == {n: a.tobytes() for n, a in whole.state().items()}


def test_what_it_remembers_is_bounded():
    drift = Drift()
    for seed in range(4):
        drift.add(losses(GRAIN * MOST // 2, 0.3, seed))
    assert MOST // 2 <= len(drift.state()["values"]) < MOST
    again = Drift()
    again.load(drift.state())
    for one in (drift, again):
        one.add(losses(20_000, 0.3, 9) * 2)
    assert again.metrics() == drift.metrics()
    assert drift.found == 1
