"""`headrace estimate`: a log and a policy in, what the policy would have earned out, or why the log cannot say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embedding_store.errors import UsageError
from online_model.settings import TrainerSettings
from replay.off_policy import estimators, policies, verdicts
from replay.off_policy.decisions import Decisions, Lessons, Reward, read
from replay.off_policy.estimators import Estimate, Weights
from replay.off_policy.intervals import interval
from replay.off_policy.policies import Choice, Target, Targeted
from replay.off_policy.rewards import CrossFitted, Levels
from replay.readers import LogReader
from streams.events import SCENARIOS
from streams.joiner import JoinSettings

POLICIES = ("logged", "uniform", "popular", "served", "headrace")
LEARNING = ("popular", "headrace")  # from the first part of the log
SPLIT = 0.5
BINS = 40  # of the histogram of weights


@dataclass(frozen=True)
class EstimateSettings:
    """One estimate. `split`: that share of the decisions comes before those that are judged, None: SPLIT for a policy
    that learns, else 0."""

    policy: str
    join: JoinSettings
    model: TrainerSettings
    reward: Reward = "click"
    choice: Choice = field(default_factory=Choice)
    split: float | None = None
    clip: float | None = None
    served: LogReader | None = None  # whose policy is judged, for `served`
    partitions: int = 4

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"--policy: no policy is named {self.policy}; there are {', '.join(POLICIES)}")
        if (self.policy == "served") != (self.served is not None):
            raise UsageError("--policy served goes with --served FILE, a log of the same format that the policy served")
        if self.policy in LEARNING and self.split == 0:
            raise UsageError(f"--split: {self.policy} learns from the first part of the log; give it some, as 0.5")

    @property
    def share(self) -> float:
        """Of the decisions that come before those judged."""
        return (SPLIT if self.policy in LEARNING else 0.0) if self.split is None else self.split


def estimate(
    log: LogReader, settings: EstimateSettings, progress: Callable[[str, float], None] = lambda what, share: None
) -> dict[str, Any]:
    """JSON-ready: `policy`, `estimates` {ips, snips, dm, dr}, `logged`, `support`, `weights`, `about`.

    `progress` is told what is being done, and how far that is. Raises UsageError, LogError.
    """
    batch_size = settings.model.batch_size if settings.policy == "headrace" else None
    reading = partial(progress, "reading")
    every, lessons = read(log, settings.join, settings.reward, settings.partitions, batch_size, reading)
    other = None
    if settings.served is not None:
        reading = partial(progress, "reading what was served")
        other, _ = read(settings.served, settings.join, settings.reward, settings.partitions, None, reading)
        every = every.known(other.items)
    cut = int(every.ts[int(len(every) * settings.share)])
    judged = every.at(every.ts >= cut)
    unknown = np.isnan(judged.propensity)
    if not unknown.all():
        judged = judged.at(~unknown)
    known = _Known(every.at(every.ts < cut), other, lessons, cut)
    target = _target(settings, judged, known, partial(progress, "training"))
    found = judge(judged, target, settings, int(unknown.sum()), partial(progress, "estimating"))
    about = {
        "log": f"{log.name} {Path(log.path).name}", "policy": settings.policy, "reward": settings.reward,
        "items": len(every.items), "decisions": len(every), "split": settings.share, "judged": len(judged),
        "without_propensity": int(unknown.sum()), "clusters": found["logged"].pop("clusters"),
        "clustered_by": "user" if log.has_users else "request", "temperature": settings.choice.temperature,
        "epsilon": settings.choice.epsilon, "clip": settings.clip,
        "served": settings.served and Path(settings.served.path).name,
    }  # fmt: skip
    return {"policy": settings.policy, **found, "about": about}


def judge(
    judged: Decisions, target: Target, settings: EstimateSettings, missing: int, progress: Callable[[float], None]
) -> dict[str, Any]:
    """The estimates of `target` on these decisions; `missing`: so many have, or had, no propensity."""
    binary = settings.reward != "watch"
    model = CrossFitted(columns_of(judged), judged.reward, judged.cluster, binary)
    on = target.on(judged, model, progress)
    estimates, found, weights = _estimates(judged, on, model, settings.clip, missing)
    bounds = (0.0, 1.0 if binary else None)
    mean = float(judged.reward.mean())
    plain = interval(mean, (judged.reward - mean) / len(judged), judged.cluster)
    low, high = (end if np.isfinite(end) else None for end in (max(0.0, plain.low), plain.high))
    return {
        "estimates": {e.name: _told(verdicts.bounded(e, *bounds)) for e in estimates},
        "logged": {
            "value": mean, "low": low, "high": high, "n": len(judged), "rewards": int((judged.reward > 0).sum()),
            "clusters": plain.clusters,
        },
        "support": None if found is None else asdict(found),
        "weights": None if weights is None else _histogram(weights),
    }  # fmt: skip


def columns_of(judged: Decisions) -> list[Levels]:
    """What the model of rewards knows of a decision, the item first."""
    place = np.unique(judged.place, return_inverse=True)[1]
    return [
        Levels(judged.item, len(judged.items)),
        Levels(place, int(place.max(initial=0)) + 1),
        Levels(judged.scenario, len(SCENARIOS)),
    ]


@dataclass(frozen=True)
class _Known:
    """What a policy may be made of."""

    first: Decisions  # of the log, before those judged
    other: Decisions | None  # of the log that the policy served
    lessons: Lessons
    until_ms: int  # when those judged begin


def _target(settings: EstimateSettings, judged: Decisions, known: _Known, progress: Callable[[float], None]) -> Target:
    if settings.policy == "logged":
        return policies.Logged()
    if settings.policy == "uniform":
        return policies.uniform(judged)
    if settings.policy == "popular":
        return policies.popular(known.first, settings.choice)
    if known.other is not None:
        return policies.served(known.other, judged, settings.choice)
    from replay.off_policy.ours import headrace

    return headrace(known.lessons, judged, known.until_ms, settings.model, settings.choice, progress)


def _estimates(
    judged: Decisions, on: Targeted, model: CrossFitted, clip: float | None, missing: int
) -> tuple[list[Estimate], verdicts.Support | None, Weights | None]:
    direct = estimators.dm(on.expected, judged.cluster)
    if np.isnan(judged.propensity).any():
        why = f"none of {missing:,} decisions has a propensity: log with a policy that leaves some to chance"
        ips, snips, dr = (Estimate(name, None, None, None, None, None, why) for name in ("ips", "snips", "dr"))
        return [ips, snips, direct, dr], None, None
    weights = estimators.weigh(on.chosen, judged.propensity, clip)
    found = verdicts.support(judged.reward, on.chosen, judged.propensity, weights, judged.cluster, on.unseen)
    why, of = verdicts.why_not(found), len(judged) + missing
    if missing > verdicts.MISSING * of:
        why = f"{missing:,} of {of:,} decisions have no propensity (at most {verdicts.MISSING:.0%} may be left out)"
    every = [
        estimators.ips(judged.reward, weights, judged.cluster),
        estimators.snips(judged.reward, weights, judged.cluster),
        direct,
        estimators.dr(judged.reward, weights, on.expected, model.of_logged(), judged.cluster),
    ]
    return [verdicts.judged(e, why) for e in every], found, weights


def _told(found: Estimate) -> dict[str, Any]:
    """JSON-ready; what is no number is None."""
    told = {name: value for name, value in asdict(found).items() if name != "name"} | {"estimable": found.estimable}
    return {k: None if isinstance(value, float) and not np.isfinite(value) else value for k, value in told.items()}


def _histogram(weights: Weights) -> dict[str, list[float]]:
    counts, edges = np.histogram(weights.values, BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
