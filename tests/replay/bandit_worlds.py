"""Logs of bandits whose true value is known: what estimators of off-policy evaluation are held against.

A context is one of four scenarios. A click on item a in scenario s has the probability σ(base + item_a + scenario_s +
cross_{s,a}); with no cross effects the model of rewards (additive) is right, with large ones it is wrong. The log is
a softmax policy's, the target another's; `logging` and `target` say how far each is from uniform, and `follow` how
far both go by the true click rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from replay.off_policy import estimators, verdicts
from replay.off_policy.decisions import Decisions
from replay.off_policy.estimate import columns_of
from replay.off_policy.estimators import Estimate
from replay.off_policy.policies import Choice, Scoring
from replay.off_policy.rewards import CrossFitted

SCENARIOS = 4


@dataclass(frozen=True)
class World:
    """A regime. `rate`: about that of clicks; `cross`: sd of what an additive model cannot say; `users`: of so many
    decisions each, with a taste for clicking of their own (0: decisions are independent)."""

    decisions: int = 4_000
    items: int = 20
    rate: float = 0.05
    effect: float = 0.7
    cross: float = 0.0
    logging: float = 0.5
    target: float = 0.7
    users: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        dice = np.random.default_rng([self.seed, 1])
        item, scenario = dice.normal(size=self.items), dice.normal(size=SCENARIOS)
        cross = dice.normal(size=(SCENARIOS, self.items))
        logit = self.effect * (item + 0.5 * scenario[:, None]) + self.cross * cross
        q = 1 / (1 + np.exp(-(np.log(self.rate / (1 - self.rate)) + logit)))
        noise = dice.normal(size=(2, SCENARIOS, self.items))
        log = _softmax(self.logging * noise[0])
        target = _softmax(self.target * (noise[1] + (logit - logit.mean()) / max(logit.std(), 1e-9)) / np.sqrt(2))
        for name, value in (("q", q), ("log", log), ("pi", target)):
            object.__setattr__(self, name, value)

    q: np.ndarray = None  # type: ignore[assignment]  # float64 [SCENARIOS, A] click rates
    log: np.ndarray = None  # type: ignore[assignment]  # the logging policy
    pi: np.ndarray = None  # type: ignore[assignment]  # the target

    @property
    def truth(self) -> float:
        """What the target earns: scenarios are as likely as one another, tastes are 1 in the mean."""
        return float((self.pi * self.q).sum(1).mean())

    def draw(self, seed: int) -> Decisions:
        """A log."""
        dice, n = np.random.default_rng([self.seed, 2, seed]), self.decisions
        scenario = dice.integers(SCENARIOS, size=n)
        item = (np.cumsum(self.log, 1)[scenario] < dice.random((n, 1))).sum(1).clip(max=self.items - 1)
        user = np.arange(n) // self.users if self.users else np.arange(n)
        taste = dice.choice([0.2, 1.8], size=user[-1] + 1) if self.users else np.ones(n)
        reward = (dice.random(n) < self.q[scenario, item] * taste[user]).astype(np.float64)
        zeros = np.zeros(n, np.int64)
        return Decisions(
            list(range(self.items)), item, zeros, scenario, self.log[scenario, item], reward, ts=np.arange(n),
            page=np.arange(n), cluster=user, example=np.arange(n),
        )  # fmt: skip


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def estimates(world: World, log: Decisions) -> tuple[dict[str, Estimate], str]:
    """(all four, why the log cannot say it; "" where it can)."""
    model = CrossFitted(columns_of(log), log.reward, log.cluster, binary=True)
    on = Scoring(lambda rows: world.pi[log.scenario[rows]], Choice()).on(log, model, lambda share: None)
    weights = estimators.weigh(on.chosen, log.propensity)
    found = verdicts.support(log.reward, on.chosen, log.propensity, weights, log.cluster, on.unseen)
    every = (
        estimators.ips(log.reward, weights, log.cluster), estimators.snips(log.reward, weights, log.cluster),
        estimators.dm(on.expected, log.cluster),
        estimators.dr(log.reward, weights, on.expected, model.of_logged(), log.cluster),
    )  # fmt: skip
    return {estimate.name: estimate for estimate in every}, verdicts.why_not(found)
