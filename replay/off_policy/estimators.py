"""The estimators, in numpy alone: rewards, weights and a model's expectations in, an estimate out.

n decisions were logged: in context x_i the action a_i was taken with propensity p_i = p(a_i | x_i), and earned r_i.
The target policy would take it with π(a_i | x_i): its weight is w_i = π(a_i | x_i) / p_i. What is estimated is the
mean reward of a decision, had π decided.

| estimator | value | right when |
|---|---|---|
| IPS | mean of w r | propensities are right, and positive wherever π is |
| SNIPS | Σ w r / Σ w | the same, up to a bias of order 1/n |
| DM | mean of V̂(x), V̂(x) = Σ_a π(a|x) q̂(x, a) | the model q̂ of rewards is right |
| DR | mean of V̂(x) + w (r − q̂(x, a)) | either of the two is right |

IPS: Horvitz and Thompson, A generalization of sampling without replacement from a finite universe, JASA 47, 1952.
SNIPS: Swaminathan and Joachims, The self-normalized estimator for counterfactual learning, NIPS 2015, section 4. DM
and DR: Dudík, Langford and Li, Doubly robust policy evaluation and learning, ICML 2011, section 2. How they are
compared on real logs: Saito et al., Open Bandit Dataset and Pipeline, NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from replay.off_policy.intervals import interval

NAMES = ("ips", "snips", "dm", "dr")


@dataclass(frozen=True)
class Estimate:
    """`value` is None where nothing was there to count. `low`, `high`: a 95 % interval, None where none is claimed.

    `ess`: effective sample size of the weights, None for DM, which has none. `why`: why there is no interval to
    trust; "" if there is.
    """

    name: str
    value: float | None
    error: float | None
    low: float | None
    high: float | None
    ess: float | None
    why: str = ""

    @property
    def estimable(self) -> bool:
        return not self.why


@dataclass(frozen=True)
class Weights:
    """What the weights themselves say: float64 [n] `values`, at most `clip` (None: not clipped), of them `clipped`
    were larger."""

    values: np.ndarray
    clip: float | None = None
    clipped: int = 0

    @property
    def ess(self) -> float:
        """(Σ w)² / Σ w²: as many decisions of the target itself would say as much (Kish 1965). 0 without any weight."""
        square = float(self.values @ self.values)
        return float(self.values.sum()) ** 2 / square if square else 0.0

    @property
    def tail(self) -> float:
        """(Σ w²)² / Σ w⁴: the same of the squares. 0 without any weight."""
        square = self.values**2
        fourth = float(square @ square)
        return float(square.sum()) ** 2 / fourth if fourth else 0.0

    @property
    def largest(self) -> float:
        return float(self.values.max(initial=0.0))


def weigh(target: np.ndarray, propensity: np.ndarray, clip: float | None = None) -> Weights:
    """target, propensity: float64 [n], of the logged actions. Clipping trades variance for a bias that no interval
    here knows of."""
    values = target / propensity
    if clip is None:
        return Weights(values)
    return Weights(np.minimum(values, clip), clip, int((values > clip).sum()))


def ips(reward: np.ndarray, weights: Weights, cluster: np.ndarray) -> Estimate:
    """Inverse propensity scoring. reward: float64 [n]; cluster: int64 [n], rewards of one may depend on each other."""
    return _mean("ips", weights.values * reward, weights, cluster)


def snips(reward: np.ndarray, weights: Weights, cluster: np.ndarray) -> Estimate:
    """Self-normalised IPS, arguments as `ips`. Its interval is that of a ratio, linearised (the delta method)."""
    w, total = weights.values, float(weights.values.sum())
    if total == 0:
        return Estimate("snips", None, None, None, None, 0.0)
    value = float(w @ reward) / total
    found = interval(value, w * (reward - value) / total, cluster)
    return Estimate("snips", value, found.error, found.low, found.high, weights.ess)


def dm(expected: np.ndarray, cluster: np.ndarray) -> Estimate:
    """The direct method. expected: float64 [n], V̂(x). Its error is that of the model, of which the log cannot tell:
    no interval."""
    why = (
        "a model's answer alone: how wrong the model is cannot be had from this log, so no interval is claimed; see dr"
    )
    if not len(expected):
        return Estimate("dm", None, None, None, None, None, why)
    value = float(expected.mean())
    error = interval(value, (expected - value) / len(expected), cluster).error
    return Estimate("dm", value, error, None, None, None, why)


def dr(
    reward: np.ndarray, weights: Weights, expected: np.ndarray, predicted: np.ndarray, cluster: np.ndarray
) -> Estimate:
    """Doubly robust; reward, weights, cluster as `ips`.

    expected: float64 [n], V̂(x); predicted: float64 [n], q̂(x, a) of the logged action. Both by a model that was not
    fitted to the decision's own cluster (rewards.py), else the interval is too narrow.
    """
    return _mean("dr", expected + weights.values * (reward - predicted), weights, cluster)


def _mean(name: str, terms: np.ndarray, weights: Weights, cluster: np.ndarray) -> Estimate:
    if not len(terms):
        return Estimate(name, None, None, None, None, 0.0)
    value = float(terms.mean())
    found = interval(value, (terms - value) / len(terms), cluster)
    return Estimate(name, value, found.error, found.low, found.high, weights.ess)
