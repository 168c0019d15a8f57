"""The estimators against those of Open Bandit Pipeline (obp), where it is installed; it is none of our dependencies."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from replay.off_policy.estimate import columns_of
from replay.off_policy.policies import Choice, Scoring
from replay.off_policy.rewards import CrossFitted
from tests.replay.bandit_worlds import World, estimates

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own
    ope = pytest.importorskip("obp.ope", exc_type=ImportError)


def test_values_are_those_of_obp() -> None:
    world = World(decisions=2_000, cross=1.0)
    log = world.draw(0)
    ours, _ = estimates(world, log)
    model = CrossFitted(columns_of(log), log.reward, log.cluster, binary=True)
    every = slice(0, len(log))
    shared = {
        "action_dist": world.pi[log.scenario][:, :, None],
        "estimated_rewards_by_reg_model": model.of_all(every)[:, :, None],
        "reward": log.reward,
        "action": log.item,
        "pscore": log.propensity,
        "position": np.zeros(len(log), np.int64),
    }
    theirs = {
        "ips": ope.InverseProbabilityWeighting(),
        "snips": ope.SelfNormalizedInverseProbabilityWeighting(),
        "dm": ope.DirectMethod(),
        "dr": ope.DoublyRobust(),
    }
    for name, estimator in theirs.items():
        assert ours[name].value == pytest.approx(estimator.estimate_policy_value(**shared))
    chosen = Scoring(lambda rows: world.pi[log.scenario[rows]], Choice()).on(log, model, lambda share: None).chosen
    assert chosen == pytest.approx(world.pi[log.scenario, log.item])
