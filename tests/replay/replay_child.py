"""A deterministic replay in a process of its own, to be killed: says each slice that it has learned."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from replay import direct, joining
from replay.readers import Record
from replay.simulator import Simulation, SimulatorSettings
from streams.joiner import JoinSettings

SMALL = FeatureSettings(dim=8, users=4_000, items=20_000, categories=1_000)
JOIN = JoinSettings(wait_ms=3_000, watch_wait_ms=5_000)


def settings(store: Path, seed: int = 0, **more: bool | int) -> direct.DirectSettings:
    """A small model, and the partitions of Headrace's topics."""
    model = TrainerSettings(batch_size=256, seed=seed, features=SMALL, ranker=RankerSettings(seed=seed))
    return direct.DirectSettings(store, JOIN, model, **({"deterministic": True} | more))


def log() -> Iterator[Record]:
    """Some 15,000 events of simulated users, and items that come and go: the catalogue must be as of each slice."""
    return iter(Simulation(SimulatorSettings(users=300, items=200, item_life_s=30, requests_per_s=40), events=15_000))


def main(store: Path, says: Connection) -> None:
    """Replays, and sends each slice that it has learned, and at the end the figures."""
    joining.SLICE, direct.COMMIT_SECONDS, direct.COMMIT_SHARE = 60, 0.0, 1.0
    run = direct.DirectReplay(settings(store), lambda so_far: says.send(so_far.slices))
    says.send(run.run(log()))
