"""Small streams for the tests of the comparison: simulated users, with impressions and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from replay.comparison.stream import Stream, read_stream
from replay.readers import Record
from replay.simulator import Simulation, SimulatorSettings
from streams.events import Impression
from streams.joiner import JoinSettings

PARTITIONS = 2
EVENTS = {True: 6_000, False: 30_000}  # with impressions, without them
MODEL = TrainerSettings(
    batch_size=128, seed=3, features=FeatureSettings(dim=8, users=1_000, items=4_000, categories=200),
    ranker=RankerSettings(hidden=16, second=8, seed=3),
)  # fmt: skip


def log(impressions: bool) -> Iterator[Record]:
    """Events by time; without `impressions` what users did remains, with items that stay: one that is new is always a
    positive there, and a baseline that counts would look worse than it is."""
    life_s = 300 if impressions else 1_000_000
    world = SimulatorSettings(users=60, items=400, item_life_s=life_s, requests_per_s=5)
    records = Simulation(world, events=EVENTS[impressions])
    return (record for record in records if impressions or not isinstance(record, Impression))


def join(impressions: bool) -> JoinSettings:
    """Clicks come a little after the wait, so that some are late."""
    return JoinSettings(wait_ms=1_000, implicit=not impressions)


@cache
def stream(impressions: bool, seed: int = 3) -> Stream:
    """The stream of `log`: do not change it."""
    import msgspec

    model = msgspec.structs.replace(MODEL, seed=seed)
    return read_stream(log(impressions), join(impressions), model, PARTITIONS)
