"""Skew: a replica scores with the features that the joiner gives to the rows of the very impression.

joiner → block → trainer → version → replica → impression → joiner, in one process and in virtual time, so that nothing
but the code can make a difference.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from embedding_store.delta import Assembler
from online_model.history import unpack
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.serving.replica import Replica
from online_model.serving.settings import Exploration, Policy, ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import open_trainer
from replay.simulator import Marketplace, Request, SimulatorSettings
from replay.simulator.run import QUIET_MS, START_MS, STEP_MS
from streams.blocks import decode_block, encode_block
from streams.catalogue import catalogue_item
from streams.events import Event, Item, Tick, encode
from streams.joiner import Joiner, JoinSettings, Record
from streams.live_events import LiveEvents
from streams.settings import ServeWorkerSettings
from tests.online_model.serving.world import recommend

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = SimulatorSettings(users=30, items=60, requests_per_s=1 / 40, item_life_s=7_200)
MODEL = TrainerSettings(
    features=FeatureSettings(dim=8, users=100, items=2_000, categories=50),
    ranker=RankerSettings(hidden=16, second=8, third=8)
)
LATE_MS = 5_000  # some actions come so much later than they were done


class Loop:
    """The system around a marketplace. `lag`: how many versions the replica is behind, after the first. `live`: it
    reads the events itself."""

    def __init__(self, store: Path, lag: int = 0, live: bool = False) -> None:
        self.now = START_MS
        self.world, self.dice = Marketplace(WORLD), random.Random(3)
        self.joiner = Joiner(JoinSettings(wait_ms=3_000), 0)
        self.trainer = open_trainer(MODEL, store, lambda: self.now)
        settings = ReplicaSettings(policy=Policy(exploration=Exploration(seed=1)))
        users = LiveUsers(kept=100_000, disorder_ms=self.joiner.settings.disorder_ms) if live else None
        self.replica = Replica(settings, MODEL.features, MODEL.ranker, clock=lambda: self.now, live=users)
        worker = ServeWorkerSettings(bootstrap="", data_dir=store)
        self.events = LiveEvents(worker, Holder(self.replica), users, asyncio.Event()) if users is not None else None
        self.lag, self.assembler, self.versions = lag, Assembler(), []
        self.records: list[Record] = []
        self.offset = self.blocks = 0

    def run(self, hours: int) -> None:
        self.world.start(self.now)
        self.learn(self.world.catalogue())
        arriving: list[tuple[int, int, Event | Request]] = []  # when, a number of its own, what
        now, number = self.now, itertools.count()
        while now < START_MS + hours * 3_600_000:
            now = max(now + STEP_MS, self.world.next_ms(now + QUIET_MS))
            step = self.world.advance(now)
            for event in step.events:
                late = LATE_MS if self.dice.random() < 0.05 else 0
                heapq.heappush(arriving, (event.ts + late, next(number), event))
            for request in step.requests:
                heapq.heappush(arriving, (request.ts, next(number), request))
            while arriving and arriving[0][0] <= now:
                self.now, _, what = heapq.heappop(arriving)
                if isinstance(what, Request):
                    self.learn(step.items)
                    self.visit(what)
                else:
                    self.send(what)

    def send(self, event: Event) -> None:
        record = Record(self.offset, None, encode(event))
        self.records.append(record)
        if self.events:
            self.events.take(0, [record])
        self.offset += 1

    def tick(self, ts: int) -> None:
        """All that was done before `ts` is handled; what comes of it later is late."""
        self.send(Tick(event_id=self.offset, ts=ts + self.joiner.settings.disorder_ms))

    def learn(self, items: list[Item]) -> None:
        """All that was done before this moment is joined, learned, and in a version."""
        self.tick(self.now)
        records, self.records = self.records, []
        block = decode_block(encode_block(self.joiner.process(records).block))
        self.trainer.catalogue([catalogue_item(item, encode(item)) for item in items])
        self.trainer.offer(block, self.blocks)
        self.blocks += 1
        while self.trainer.step():
            pass
        for part in self.trainer.commit() or []:
            if (version := self.assembler.add(part)) is not None:
                self.versions.append(version)
        self.trainer.store.acknowledge(self.trainer.sequence)
        while len(self.versions) > (self.lag if self.replica.version else 0):
            assert self.replica.apply(self.versions.pop(0))

    def visit(self, request: Request) -> None:
        answer = recommend(self.replica, request.user, request.scenario, request.k)
        self.send(self.world.show(
            request, [shown.item for shown in answer.items], ts=request.ts, feature_hash=answer.feature_hash,
            propensities=[shown.propensity for shown in answer.items], model_version=answer.model_version,
        ))  # fmt: skip
        self.tick(request.ts + 1)  # before anything late comes, which nobody could have served with


def test_replayed_with_served_impressions_no_feature_differs(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run(hours=7)  # panes of an hour and of a day begin and end meanwhile
    loop.trainer.store.close()
    counts = loop.joiner.counts
    assert counts.skew_checked > 500
    assert counts.skew_differs == 0
    assert counts.late > 10, "late actions are known to both"
    states = unpack(loop.replica.state.users.used("history"))
    assert (np.count_nonzero(states["recent"]["item"], axis=1) == 14).any(), "a list that is full"
    assert (np.count_nonzero(states["counts"][:, 0].any(2), axis=1) == 4).any(), "panes that were used again"


def test_a_replica_that_is_behind_is_seen(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lag=1)
    loop.run(hours=1)
    loop.trainer.store.close()
    assert loop.joiner.counts.skew_differs > 0


def test_a_replica_that_reads_the_events_itself_is_not_behind(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lag=3, live=True)
    loop.run(hours=3)
    loop.trainer.store.close()
    counts = loop.joiner.counts
    assert counts.skew_checked > 200
    assert counts.late > 3
    assert counts.skew_differs == 0
