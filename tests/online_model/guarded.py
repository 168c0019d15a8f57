"""A guarded trainer with its store, its topic, snapshots, kept checkpoints and replicas, without Kafka."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from embedding_store.columns import concat
from embedding_store.delta import Assembler
from embedding_store.faults import arm
from embedding_store.kept import KeptCheckpoints
from embedding_store.snapshot import latest_snapshot, place_of, read_snapshot, snapshot_of
from online_model.checkpoints import describe
from online_model.examples import Block
from online_model.guard import decide, is_held, roll_back_if_due
from online_model.guard_settings import GuardSettings
from online_model.serving.errors import VersionGap
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import TrainerSettings
from online_model.trainer import open_trainer
from tests.online_model.crashing import PART_BYTES, read_topic
from tests.online_model.logs import START, make_blocks, make_rows
from tests.online_model.test_trainer import SMALL

N = 400  # scores the guard looks at, and rows of a block
BLOCKS = 30
BOUNDS = GuardSettings(examples=N, max_ne=1.5, min_calibration=0.6, max_calibration=1.7)
GUARDED = msgspec.structs.replace(SMALL, guard=BOUNDS)
GOING_BACK = msgspec.structs.replace(GUARDED, guard=msgspec.structs.replace(BOUNDS, rollback=True))


def made_log() -> dict[bool, list[Block]]:
    """BLOCKS blocks of N rows: of the good ones a fifth is clicked; of the poisoned ones (False) nearly all and nearly
    none in turn, so that what was learned of one is wrong in the next."""
    good, bad = make_rows(BLOCKS * N), make_rows(BLOCKS * N)
    turn = np.arange(len(bad)) // N % 2 == 0
    bad.click = (np.random.default_rng(1).random(len(bad)) < np.where(turn, 0.9, 0.02)).astype(np.int8)
    bad.purchase = np.where(bad.click == 1, 0, -1).astype(np.int8)
    return {True: make_blocks(good, N), False: make_blocks(bad, N)}


@dataclass
class World:
    """A trainer as its worker has it, without Kafka: a file is the topic, and replicas follow as the serve worker does.

    Made again over the same folder it goes on, as the worker does after a kill.
    """

    folder: Path
    log: dict[bool, list[Block]]
    model: TrainerSettings = GUARDED

    def __post_init__(self):
        self.kept, self.snapshots = KeptCheckpoints(str(self.folder / "kept")), self.folder / "snapshots"
        self.folder.mkdir(exist_ok=True)
        self.store, self.file = self.folder / "store", self.folder / "topic"
        self.assembler, self.topic = Assembler(), []
        self.read(read_topic(self.file))
        self.open()
        self.replica = self.started()

    def open(self):
        done = roll_back_if_due(self.store, self.kept) if self.model.guard.rollback else True
        self.trainer = open_trainer(self.model, self.store, lambda: START)
        if not done:
            self.trainer.give_up_rollback()
        self.trainer.on_hold = self.snapshot
        for sequence, parts in self.trainer.store.outbox():
            self.publish(sequence, parts)
        if self.trainer.begun:
            self.snapshot()

    def crash(self):
        self.trainer.store.close()
        self.open()

    def learn(self, good: bool):
        self.trainer.offer(self.log[good][self.at], self.at)
        while self.trainer.step():
            pass

    def commit(self):
        epoch, parts = self.trainer.epoch, self.trainer.commit()
        if parts:
            self.publish(self.trainer.sequence, parts)
        if self.trainer.epoch > epoch:
            self.snapshot()

    def round(self, good: bool):
        self.learn(good)
        self.commit()

    def publish(self, sequence, parts):
        with self.file.open("ab") as file:
            file.write(b"".join(len(part).to_bytes(PART_BYTES, "big") + part for part in parts))
        self.read(parts)
        self.trainer.store.acknowledge(sequence)

    def read(self, parts):
        self.topic += [v for v in map(self.assembler.add, parts) if v is not None]

    def snapshot(self):
        if self.trainer.sequence:
            snapshot_of(self.trainer.store, self.snapshots, wanted=lambda version: not is_held(version.info))

    def keep(self):
        self.kept.keep(self.trainer.store, describe, keep=9)

    def started(self) -> Replica:
        """A replica that has just started."""
        replica, path = self.empty(), latest_snapshot(self.snapshots)
        if path is not None:
            replica.apply(read_snapshot(path))
        return self.follow(replica)

    def follow(self, replica: Replica) -> Replica:
        """What the replica is once it has read the topic to its end."""
        for version in self.topic:
            try:
                replica.apply(version)
            except VersionGap:
                path = latest_snapshot(self.snapshots)
                if path is not None and place_of(path) >= (version.epoch, version.sequence):
                    replica = self.empty()
                    replica.apply(read_snapshot(path))
        return replica

    def empty(self) -> Replica:
        return Replica(ReplicaSettings(), SMALL.features, SMALL.ranker, clock=lambda: START)

    @property
    def at(self) -> int:
        """The next block."""
        position = self.trainer.positions.get(0)
        return position.next // 10 if position else 0

    @property
    def turning(self) -> bool:
        """Whether the next commit begins a hold, or ends one."""
        trainer = self.trainer
        decided = decide(trainer.guard, self.model.guard, self.model.window, trainer._evaluation.tasks)
        return decided.held is not trainer.guard.held

    @property
    def place(self):
        return self.trainer.epoch, self.trainer.sequence


def image(world: World) -> tuple:
    """What the store holds: its place, rows by table, dense weights."""
    store = world.trainer.store
    rows = {t: concat(list(store.iter_rows(t))) for t in store.layouts if store.has_rows(t)}
    return store.head().place, rows, store.head().dense


def holds(replica: Replica, image: tuple) -> bool:
    """Whether a replica is what the store was: the same version, rows and weights, and nothing else."""
    place, tables, dense = image
    same = (replica.epoch, replica.sequence) == place
    same &= all(name in tables or not len(table) for name, table in replica.state.tables.items())
    for name, rows in tables.items():
        table = replica.state.tables[name]
        at = table.find(rows.ids)
        same &= bool((at > 0).all()) and len(table) == len(rows)
        same &= all((table.columns[c][at] == rows.columns[c]).all() for c in table.carried)
    weights = replica.state.ranker.state_dict()
    return same and all((w.numpy() == dense[name]).all() for name, w in weights.items())


def until_proven(world: World) -> tuple:
    """Learns good blocks until the figures were within the bounds. The store's image."""
    for _ in range(10):
        world.round(good=True)
        if world.trainer.guard.proven:
            return image(world)
    raise AssertionError("never within the bounds")


def until_held(world: World) -> tuple:
    """Learns poisoned blocks until a version is held back. The image of the last good one."""
    for _ in range(10):
        last = image(world)
        world.round(good=False)
        if world.trainer.guard.held:
            return last
    raise AssertionError("never held")


def die_turning(folder: str, release: bool, point: str) -> None:
    """In a process of its own: until the guard holds (or, having held, releases), and killed in that commit."""
    torch.set_num_threads(1)
    world = World(Path(folder), made_log())
    until_proven(world)
    if release:
        until_held(world)
    while True:
        world.learn(good=release)
        if world.turning:
            arm(point)
        world.commit()
