"""What is done to the cluster and when: drawn from the seed, so that a run can be had again.

What a fault meets hangs on the machine all the same: the plan is repeated to the millisecond, the processes are not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "kill", "freeze", "lose_rank", "stop_broker", "kill_broker", "damage_store", "damage_checkpoint", "damage_join",
    "damage_join_copy", "damage_snapshot", "full_disk", "slow_disk",
]  # fmt: skip

GAP_S = (0.4, 3.0)  # between two faults: from during a start to well after it
FREEZE_S = (0.2, 9.0)  # past the session timeout of a consumer as well
AWAY_S = (0.1, 6.0)  # the broker
BESIDES = {"freeze": 0.25, "stop_broker": 0.05, "kill_broker": 0.05}  # for each kill
LOST_RANKS = 0.1  # for each kill, where there are several
ON_DISK: dict[Kind, tuple[str, ...]] = {  # what is done to the disk, and the kinds of workers that it is done to
    "damage_store": ("train",), "damage_checkpoint": ("train",), "damage_join": ("join",),
    "damage_join_copy": ("join",), "damage_snapshot": ("serve",), "full_disk": ("train", "join"),
    "slow_disk": ("train", "join"),
}  # fmt: skip
ON_DISK_SHARE, ON_DISK_LEAST = 0.16, 4  # for each kill, where there is any
ON_DISK_S = (4.0, 7.0)  # a start, and a little of what comes of it


@dataclass(frozen=True)
class Fault:
    """After `wait_s` seconds: `target` is a worker's name, "" for the broker; `lasts_s` is how long it is gone, or
    about how long that takes. `seed`: of which byte of which file it is, and of what is done about it."""

    wait_s: float
    kind: Kind
    target: str
    lasts_s: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind.replace('_', ' ')} {self.target}".rstrip() + lasts


def plan(
    kills: int,
    seed: int,
    workers: Sequence[str],
    gap_s: tuple[float, float] = GAP_S,
    on_disk: Sequence[Kind] | None = None,
    ranks: int = 1,
) -> list[Fault]:
    """`kills` kill -9 of workers, and other faults between them, `gap_s` (from, to) apart.

    `ranks`: of the train worker. `on_disk`: what is done to the disk; None: some of all that can be done to one of
    `workers`.
    """
    dice = random.Random(f"faults {seed}")
    kinds: list[Kind] = ["kill"] * kills
    for kind, share in BESIDES.items():
        kinds += [kind] * round(share * kills)  # type: ignore[list-item]
    if ranks > 1 and "train" in workers:
        kinds += ["lose_rank"] * max(1, round(LOST_RANKS * kills))
    kinds += _some_on_disk(kills, dice, workers) if on_disk is None else on_disk
    dice.shuffle(kinds)
    return list(_drawn(kinds, dice, workers, gap_s))


def _some_on_disk(kills: int, dice: random.Random, workers: Sequence[str]) -> list[Kind]:
    possible = [kind for kind in ON_DISK if _targets(kind, workers)]
    if not (kills and possible):
        return []
    count = max(ON_DISK_LEAST, round(ON_DISK_SHARE * kills))
    rounds, rest = divmod(count, len(possible))
    return possible * rounds + dice.sample(possible, rest)


def _targets(kind: Kind, workers: Sequence[str]) -> list[str]:
    return [name for name in workers if name.split("-")[0] in ON_DISK[kind]]


def _drawn(
    kinds: list[Kind], dice: random.Random, workers: Sequence[str], gap_s: tuple[float, float]
) -> Iterator[Fault]:
    for kind in kinds:
        wait = dice.uniform(*gap_s)
        if kind == "kill":
            yield Fault(wait, kind, dice.choice(workers))
        elif kind == "freeze":
            yield Fault(wait, kind, dice.choice(workers), dice.uniform(*FREEZE_S))
        elif kind == "lose_rank":
            yield Fault(wait, kind, "train")
        elif kind in ON_DISK:
            target = dice.choice(_targets(kind, workers))
            yield Fault(wait, kind, target, dice.uniform(*ON_DISK_S), dice.getrandbits(32))
        else:
            yield Fault(wait, kind, "", dice.uniform(*AWAY_S))
