"""The policy in force: which arm a user is in, and what makes their pages. It outlives the replicas of a process."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from embedding_store.ids import hash_text
from online_model.serving.settings import Exploration, Limits, Policy, ReplicaSettings, Reranking, Scoring

CHANGEABLE = ("policy", "experiment", "arms", "limits")  # of ReplicaSettings, while the replica runs


@dataclass(frozen=True)
class Chosen:
    """What makes the pages of some users. `rng`: of the draws, the arm's own."""

    arm: str  # "": of none
    policy: Policy
    rng: np.random.Generator

    @property
    def reranking(self) -> Reranking:
        return self.policy.reranking

    @property
    def exploration(self) -> Exploration:
        return self.policy.exploration

    def scoring(self, scenario: str) -> Scoring:
        """Of one of the scenarios."""
        return getattr(self.policy, scenario)


class PolicyInForce:
    """[serve.policy], the experiment, its arms and the limits, changed as a whole, between two requests."""

    limits: Limits
    fingerprint: str  # of policy, experiment and arms, 16 hex digits: two replicas with one make pages alike

    def __init__(self, settings: ReplicaSettings) -> None:
        self.change(settings)

    def change(self, settings: ReplicaSettings) -> None:
        """Take over what is CHANGEABLE; draws begin anew."""
        shared = settings.policy
        self._experiment, self.limits = settings.experiment, settings.limits
        arms, upper, total = [], [], 0.0
        for arm in settings.arms:
            own: dict = {} if arm.scoring is None else dict.fromkeys(("live", "video", "search", "shelf"), arm.scoring)
            own |= {
                "reranking": arm.reranking or shared.reranking,
                "exploration": arm.exploration or shared.exploration,
            }
            total += arm.share
            arms.append(_chosen(arm.name, msgspec.structs.replace(shared, **own)))
            upper.append(total)
        self._arms, self._upper, self._rest = arms, upper, _chosen("", shared)
        said = msgspec.json.encode((shared, settings.experiment, settings.arms)).decode()
        self.fingerprint = f"{hash_text(said) % (1 << 64):016x}"

    def of(self, user: str | int) -> Chosen:
        """That of the user's arm: the same as long as the experiment's name and the shares are."""
        if self._arms:
            point = hash_text(f"{self._experiment}\x00{user}") % (1 << 64) / (1 << 64)
            for arm, upper in zip(self._arms, self._upper, strict=True):
                if point < upper:
                    return arm
        return self._rest


def _chosen(name: str, policy: Policy) -> Chosen:
    return Chosen(name, policy, np.random.default_rng(policy.exploration.seed))
