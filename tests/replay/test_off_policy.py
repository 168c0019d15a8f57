"""The estimators against plain loops, their verdicts, and what they promise on logs whose true value is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.off_policy import estimators, verdicts
from replay.off_policy.estimators import Weights, weigh
from replay.off_policy.intervals import Z95, interval
from replay.off_policy.rewards import AdditiveModel, CrossFitted, Levels
from tests.replay.bandit_worlds import World, estimates

rows = st.lists(
    st.tuples(
        st.floats(0, 1, width=16), st.floats(0.0625, 1), st.floats(0, 5), st.integers(0, 4), st.floats(0, 1),
        st.floats(0, 1),
    ),
    min_size=2,
    max_size=30,
)  # fmt: skip


@given(rows)
def test_the_values_are_those_of_a_loop_over_the_rows(some: list[tuple[float, ...]]) -> None:
    """The plain reference, written from the papers' sums."""
    target, propensity, reward, cluster, expected, predicted = (np.array(column) for column in zip(*some, strict=True))
    weights = weigh(target, propensity)
    total = weighed = mass = model = corrected = square = 0.0
    for pi, p, r, _, v, q in some:
        w = pi / p
        total += 1
        weighed += w * r
        mass += w
        square += w * w
        model += v
        corrected += v + w * (r - q)
    assert estimators.ips(reward, weights, cluster).value == pytest.approx(weighed / total)
    assert estimators.dm(expected, cluster).value == pytest.approx(model / total)
    assert estimators.dr(reward, weights, expected, predicted, cluster).value == pytest.approx(corrected / total)
    snips = estimators.snips(reward, weights, cluster)
    assert weights.tail == pytest.approx(tail(weights.values.tolist()))
    if mass:
        assert snips.value == pytest.approx(weighed / mass)
        assert weights.ess == pytest.approx(mass**2 / square if square else 0)
    else:
        assert snips.value is None


def tail(weights: list[float]) -> float:
    """(Σ w²)² / Σ w⁴."""
    squares = fourths = 0.0
    for w in weights:
        squares += w * w
        fourths += w**4
    return squares**2 / fourths if fourths else 0.0


@given(rows)
def test_the_standard_error_is_that_of_sums_over_clusters(some: list[tuple[float, ...]]) -> None:
    values, clusters = [row[2] for row in some], [row[3] for row in some]
    mean, n = sum(values) / len(some), len(some)
    sums: dict[float, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0) + (value - mean) / n
    found = interval(mean, (np.array(values) - mean) / n, np.array(clusters))
    c = len(sums)
    assert found.clusters == c
    if c < 2:
        assert math.isinf(found.error)
        return
    assert found.error == pytest.approx(math.sqrt(c / (c - 1) * sum(s * s for s in sums.values())), abs=1e-9)
    assert found.low <= mean + 1e-9
    assert found.high >= mean - 1e-9


def test_an_interval_of_what_is_not_skewed_is_the_normal_one() -> None:
    found = interval(0.5, np.array([-1.0, 1.0] * 50) / 100, np.arange(100))
    assert found.high - 0.5 == pytest.approx(Z95 * found.error)
    assert 0.5 - found.low == pytest.approx(Z95 * found.error)


def test_an_interval_of_few_rewards_reaches_further_up_than_down() -> None:
    """Of 25 clicks in 5,000 the exact (Clopper and Pearson) interval is 0.00324 to 0.00737."""
    reward = np.zeros(5_000)
    reward[:25] = 1
    found = estimators.ips(reward, Weights(np.ones(5_000)), np.arange(5_000))
    assert (found.low, found.high) == (pytest.approx(0.00324, abs=2e-4), pytest.approx(0.00737, abs=2e-4))


def test_a_policy_that_is_the_log_s_own_has_the_log_s_mean() -> None:
    log = World(decisions=1_000).draw(0)
    weights = weigh(log.propensity, log.propensity)
    for found in (estimators.ips(log.reward, weights, log.cluster), estimators.snips(log.reward, weights, log.cluster)):
        assert found.value == pytest.approx(log.reward.mean())
        assert found.ess == pytest.approx(1_000)


def test_self_normalised_weights_do_not_add_to_the_error_where_all_earn_alike() -> None:
    """Σ w·r / Σ w is r whatever is drawn; IPS swings with the sum of the weights."""
    log = World(decisions=1_000).draw(0)
    weights, reward = weigh(np.full(1_000, 0.05), log.propensity), np.full(1_000, 0.3)
    found = estimators.snips(reward, weights, log.cluster)
    assert (found.value, found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3))
    assert estimators.ips(reward, weights, log.cluster).error > 0.001


def test_clipping_is_asked_for_and_told() -> None:
    target, propensity = np.array([0.5, 0.1, 0.9]), np.array([0.5, 0.5, 0.1])
    assert weigh(target, propensity).values.tolist() == pytest.approx([1, 0.2, 9])
    clipped = weigh(target, propensity, 5.0)
    assert clipped.values.tolist() == pytest.approx([1, 0.2, 5])
    assert (clipped.clip, clipped.clipped) == (5.0, 1)
    found = verdicts.support(np.ones(3), target, propensity, clipped, np.arange(3), 0.0)
    assert (found.clip, found.clipped) == (5.0, 1)
    assert found.mean_weight == pytest.approx(10.2 / 3), "support is judged by what the weights were"


# --- the model of rewards


def test_the_model_never_saw_the_cluster_that_it_speaks_of() -> None:
    log = World(decisions=400, users=10).draw(0)
    columns = [Levels(log.item, 20)]
    before = CrossFitted(columns, log.reward, log.cluster, binary=True)
    fold_of: dict[int, set[int]] = {}
    for cluster, fold in zip(log.cluster.tolist(), before.fold.tolist(), strict=True):
        fold_of.setdefault(cluster, set()).add(fold)
    assert all(len(folds) == 1 for folds in fold_of.values())
    mine = log.cluster == 3
    after = CrossFitted(columns, np.where(mine, 1 - log.reward, log.reward), log.cluster, binary=True)
    assert (before.of_logged()[mine] == after.of_logged()[mine]).all()
    assert (before.of_logged()[~mine] != after.of_logged()[~mine]).any()


def test_the_model_finds_additive_effects_and_the_mean_of_what_is_not_binary() -> None:
    world = World(decisions=60_000, rate=0.2, logging=0.0)
    log = world.draw(0)
    columns = [Levels(log.item, 20), Levels(log.scenario, 4)]
    model = AdditiveModel(columns, log.reward, np.ones(len(log), bool), binary=True)
    q = model.of_score(model.base + model.effects[0] + model.effects[1][:, None])
    assert np.abs(q - world.q).max() < 0.03
    seconds = 3.0 * log.item + 10.0 * log.scenario
    linear = AdditiveModel(columns, seconds, np.ones(len(log), bool), binary=False)
    expected = 3.0 * np.arange(20) + 10.0 * np.arange(4)[:, None]
    assert np.abs(linear.base + linear.effects[0] + linear.effects[1][:, None] - expected).max() < 0.5


def test_of_all_and_of_logged_agree() -> None:
    log = World(decisions=300).draw(1)
    model = CrossFitted([Levels(log.item, 20), Levels(log.scenario, 4)], log.reward, log.cluster, binary=True)
    every = np.concatenate([model.of_all(slice(0, 100)), model.of_all(slice(100, 300))])
    assert every[np.arange(300), log.item] == pytest.approx(model.of_logged())


# --- verdicts


SOUND = verdicts.Support(
    unseen=0.0, mean_weight=1.0, mean_weight_low=0.9, mean_weight_high=1.1, largest_weight=4.0, ess=5_000.0,
    ess_share=0.5,
    tail=2_000.0, effective_rewards=100.0, clusters=1_000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"unseen": 0.2}, "20.0% of what the policy would show was never shown"),
        (
            {"mean_weight": 0.6, "mean_weight_low": 0.5, "mean_weight_high": 0.7},
            "40% of what the policy would",
        ),
        ({"mean_weight": 3.0, "mean_weight_low": 2.5, "mean_weight_high": 3.5}, "the propensities are not those"),
        ({"ess": 40.0}, "effective sample of 40"),
        ({"tail": 5.0}, "hangs on 5 decisions"),
        ({"clusters": 12}, "12 independent users"),
        ({"effective_rewards": 3.0}, "3 effective rewards"),
    ],
)
def test_what_a_log_cannot_say_is_said_with_its_reason(changed: dict[str, float], said: str) -> None:
    assert verdicts.why_not(SOUND) == ""
    assert said in verdicts.why_not(replace(SOUND, **changed))  # type: ignore[arg-type]


def test_without_support_the_verdict_says_so_and_there_is_no_interval() -> None:
    """The log's policy never shows half of the items; the target likes them all."""
    world = World(decisions=4_000, target=0.0)
    half = world.log.copy()
    half[:, :10] = 0
    object.__setattr__(world, "log", half / half.sum(1, keepdims=True))
    found, why = estimates(world, world.draw(0))
    assert "never shown" in why
    assert verdicts.judged(found["ips"], why).high is None
    assert not verdicts.judged(found["dr"], why).estimable


def test_wrong_propensities_are_found_by_the_mean_weight() -> None:
    log = World(decisions=4_000).draw(0)
    target = log.propensity.copy()
    log.propensity *= 0.5
    weights = weigh(target, log.propensity)
    found = verdicts.support(log.reward, target, log.propensity, weights, log.cluster, 0.0)
    assert "the propensities are not those" in verdicts.why_not(found)


def test_an_interval_stays_where_the_truth_can_lie() -> None:
    found = estimators.Estimate("dr", 0.01, 0.02, -0.03, 0.05, 100.0)
    assert verdicts.bounded(found, 0.0, 1.0).low == 0.0
    assert verdicts.bounded(found, None, None).low == -0.03


# --- where the truth is known; tests/figures/off_policy.py does the same with 500 runs of more worlds


@pytest.mark.parametrize("world", [World(rate=0.1, decisions=2_000), World(rate=0.1, decisions=2_000, users=5)])
def test_intervals_cover_the_truth(world: World) -> None:
    """60 runs: a sound interval misses more than 8 of them with a chance of 1 in 200."""
    missed = dict.fromkeys(("ips", "snips", "dr"), 0)
    for seed in range(60):
        found, why = estimates(world, world.draw(seed))
        assert why == ""
        for name in missed:
            one = found[name]
            missed[name] += not one.low <= world.truth <= one.high
    assert max(missed.values()) <= 8, missed


def test_doubly_robust_is_nearest_to_the_truth_where_the_model_is_wrong() -> None:
    world = World(rate=0.2, decisions=2_000, cross=1.2)
    errors: dict[str, list[float]] = {name: [] for name in estimators.NAMES}
    for seed in range(60):
        found, _ = estimates(world, world.draw(seed))
        for name, one in found.items():
            errors[name].append((one.value - world.truth) ** 2)
    error = {name: float(np.mean(values)) for name, values in errors.items()}
    assert error["dr"] < error["ips"]
    assert error["dr"] < error["dm"] / 10
