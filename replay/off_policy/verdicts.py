"""When a log cannot say what a policy is worth, and why: the limits, each with its reason in words.

| limit | why there |
|---|---|
| propensities are missing of more than MISSING | what is left is a sample that nobody drew |
| more than UNSEEN of the target's mass on what was never shown | the log says nothing about it |
| mean weight surely below 1 − UNSEEN | it is expected to be the target's mass on what could be shown |
| mean weight surely above 1 + UNSEEN | that part is at most 1: the propensities are not those of the choices |
| effective sample size below ESS | the estimate hangs on a handful of decisions |
| (Σ w²)² / Σ w⁴ below TAIL | so does its standard error (Owen, Monte Carlo, 2013, section 9.3) |
| clusters below CLUSTERS | a cluster-robust error of so few is too small |
| effective rewards, (Σ w r)² / Σ (w r)², below REWARDS | too few to know their spread by (docs/off-policy.md) |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from replay.off_policy.estimators import Estimate, Weights
from replay.off_policy.intervals import interval

MISSING, UNSEEN = 0.01, 0.05
ESS, TAIL, REWARDS, CLUSTERS = 200, 80, 10, 30


@dataclass(frozen=True)
class Support:
    """How much of the target the log can speak of."""

    unseen: float  # share of the target's mass on actions that were never shown
    mean_weight: float  # not clipped
    mean_weight_low: float
    mean_weight_high: float
    largest_weight: float
    ess: float
    ess_share: float  # of the decisions
    tail: float  # (Σ w²)² / Σ w⁴: so many decisions the weights' own spread hangs on
    effective_rewards: float
    clusters: int
    clip: float | None = None
    clipped: int = 0


def support(
    reward: np.ndarray, target: np.ndarray, propensity: np.ndarray, weights: Weights, cluster: np.ndarray, unseen: float
) -> Support:
    """reward, target, propensity: float64 [n] of the logged actions, n > 0; cluster: int64 [n]; unseen: the target's
    mass there."""
    raw = target / propensity
    mean = float(raw.mean())
    spread = interval(mean, (raw - mean) / len(raw), cluster)
    earned = weights.values * np.abs(reward)
    square = float(earned @ earned)
    return Support(
        unseen, mean, spread.low, spread.high, weights.largest, weights.ess, weights.ess / len(raw), weights.tail,
        float(earned.sum()) ** 2 / square if square else 0.0, spread.clusters, weights.clip, weights.clipped,
    )  # fmt: skip


def why_not(found: Support) -> str:
    """Why these decisions cannot say what the target is worth; "" where they can."""
    mean = f"the weights average {found.mean_weight:.2f} and not 1"
    if found.unseen > UNSEEN:
        return f"{found.unseen:.1%} of what the policy would show was never shown in the log (at most {UNSEEN:.0%})"
    if found.mean_weight_high < 1 - UNSEEN:
        lacking = 1 - found.mean_weight
        return f"{mean}: {lacking:.0%} of what the policy would show had no chance of being shown in the log"
    if found.mean_weight_low > 1 + UNSEEN:
        return f"{mean}: the propensities are not those of the choices that were logged"
    if found.ess < ESS:
        return (
            f"the policy is too far from the log's: an effective sample of {found.ess:.0f} decisions (at least {ESS})"
        )
    if found.tail < TAIL:
        few = f"{found.tail:.0f} decisions (at least {TAIL}), the largest weight is {found.largest_weight:.0f}"
        return f"the policy is too far from the log's: the spread of the weights hangs on {few}"
    if found.clusters < CLUSTERS:
        return f"there are {found.clusters} independent users or requests (at least {CLUSTERS}): take more of the log"
    if found.effective_rewards < REWARDS:
        rewards = f"{found.effective_rewards:.0f} effective rewards (at least {REWARDS})"
        return f"there are {rewards}, too few for an interval: take more of the log"
    return ""


def judged(estimate: Estimate, why: str) -> Estimate:
    """The estimate, without an interval where there is a reason against it; its own reason comes first."""
    why = estimate.why or why
    return replace(estimate, low=None, high=None, why=why) if why else estimate


def bounded(estimate: Estimate, low: float | None, high: float | None) -> Estimate:
    """The interval, cut to where the truth can lie: rewards are never below `low` or above `high` (None: no limit)."""
    if estimate.low is None or estimate.high is None:
        return estimate
    at_least, at_most = -np.inf if low is None else low, np.inf if high is None else high
    return replace(
        estimate,
        low=float(np.clip(estimate.low, at_least, at_most)),
        high=float(np.clip(estimate.high, at_least, at_most)),
    )
