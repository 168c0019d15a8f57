"""What is done to the cluster and when: drawn from the seed, so that a run can be had again.

What a fault meets hangs on the machine all the same: the plan is repeated to the millisecond, the processes are not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["kill", "freeze", "stop_broker", "kill_broker"]

GAP_S = (0.4, 3.0)  # between two faults: from during a start to well after it
FREEZE_S = (0.2, 9.0)  # past the session timeout of a consumer as well
AWAY_S = (0.1, 6.0)  # the broker
BESIDES = {"freeze": 0.25, "stop_broker": 0.05, "kill_broker": 0.05}  # for each kill


@dataclass(frozen=True)
class Fault:
    """After `wait_s` seconds: `target` is a worker's name, "" for the broker; `lasts_s` is how long it is gone."""

    wait_s: float
    kind: Kind
    target: str
    lasts_s: float = 0.0

    def __str__(self) -> str:
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind.replace('_', ' ')} {self.target}".rstrip() + lasts


def plan(kills: int, seed: int, workers: Sequence[str], gap_s: tuple[float, float] = GAP_S) -> list[Fault]:
    """`kills` kill -9 of workers, and other faults between them, `gap_s` (from, to) apart."""
    dice = random.Random(f"faults {seed}")
    kinds: list[Kind] = ["kill"] * kills
    for kind, share in BESIDES.items():
        kinds += [kind] * round(share * kills)  # type: ignore[list-item]
    dice.shuffle(kinds)
    return list(_drawn(kinds, dice, workers, gap_s))


def _drawn(
    kinds: list[Kind], dice: random.Random, workers: Sequence[str], gap_s: tuple[float, float]
) -> Iterator[Fault]:
    for kind in kinds:
        wait = dice.uniform(*gap_s)
        if kind == "kill":
            yield Fault(wait, kind, dice.choice(workers))
        elif kind == "freeze":
            yield Fault(wait, kind, dice.choice(workers), dice.uniform(*FREEZE_S))
        else:
            yield Fault(wait, kind, "", dice.uniform(*AWAY_S))
