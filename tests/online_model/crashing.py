"""A process that learns a made log over a real store, publishes to a file, serves from it, and keeps checkpoints, until
it is done or ends at a fault point. Started again it goes on. The trainer's own code, and nothing else, decides what is
in the store.

Beside the run it writes marks: `pending` before a commit, `done` after it. What the store must hold by them is for
tests/online_model/expected.py to say.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from embedding_store import faults
from embedding_store.delta import Assembler
from embedding_store.kept import KeptCheckpoints
from embedding_store.snapshot import read_snapshot, snapshot_of
from online_model.checkpoints import describe, roll_back
from online_model.examples import Block
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.trainer import Trainer, open_trainer
from tests.online_model.logs import START, make_blocks, make_rows
from tests.online_model.test_trainer import SMALL

PARTITIONS = 2
STEPS = 2  # between two commits
ROWS = 400  # of a partition
PART_BYTES = 8  # of the length before a part in the file that stands for the topic


def blocks() -> list[Block]:
    """The log: the blocks of both partitions in turn."""
    lanes = [make_blocks(make_rows(ROWS, seed=p), 50, p) for p in range(PARTITIONS)]
    return [block for pair in zip(*lanes, strict=True) for block in pair]


def learn(folder: str, fault: str, until: int, drain: bool) -> None:
    """Learns the first `until` blocks, from where the store is. `fault`: as `faults.arm_from` has it."""
    torch.set_num_threads(1)
    faults.arm_from(fault)
    Run(Path(folder)).learn(until, drain)


def go_back(folder: str, fault: str) -> None:
    """Rolls back to the oldest kept checkpoint."""
    torch.set_num_threads(1)
    faults.arm_from(fault)
    run = Path(folder)
    kept = KeptCheckpoints(str(run / "kept"))
    roll_back(run / "store", kept, kept.oldest())


class Run:
    """One start of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.topic, self.marks = folder, folder / "topic", folder / "marks.jsonl"
        self.kept = KeptCheckpoints(str(folder / "kept"))
        self.trainer: Trainer = open_trainer(SMALL, folder / "store", lambda: START, PARTITIONS)
        self.assembler = Assembler()
        self.replica = self._replica()
        for sequence, parts in self.trainer.store.outbox():
            self._publish(parts)
            self.trainer.store.acknowledge(sequence)
        self.commits = 0

    def learn(self, until: int, drain: bool) -> None:
        log = blocks()[:until]
        self._mark("opened")
        for number, block in enumerate(log):
            self.trainer.offer(block, number // PARTITIONS)
        steps = 0
        while self.trainer.step(drain):
            steps += 1
            if steps % STEPS == 0:
                self._commit()
        self._commit()
        told = {
            "digest": self.trainer.digest(), "replica": self.replica.version, "version": self._version(),
            "positions": {p: [at.next, *at.accounted] for p, at in self.trainer.positions.items()},
        }  # fmt: skip
        (self.folder / "result.json").write_text(json.dumps(told))
        self.trainer.store.close()

    def _commit(self) -> None:
        self._mark("pending")
        parts = self.trainer.commit()
        self._mark("done")
        if parts is None:
            return
        self._publish(parts)
        self.trainer.store.acknowledge(self.trainer.sequence)
        self.commits += 1
        snapshot_of(self.trainer.store, self.folder / "snapshots", keep=2)
        if self.commits % 2 == 0:
            self.kept.keep(self.trainer.store, describe, keep=3)

    def _publish(self, parts: list[bytes]) -> None:
        """The file takes the place of the topic: what is in it, a replica may have."""
        with self.topic.open("ab") as topic:
            topic.write(b"".join(len(part).to_bytes(PART_BYTES, "big") + part for part in parts))
        for part in parts:
            if (version := self.assembler.add(part)) is not None:
                self.replica.apply(version)

    def _replica(self) -> Replica:
        replica = Replica(ReplicaSettings(), SMALL.features, SMALL.ranker, clock=lambda: START)
        if self.trainer.begun:  # after a rollback only a snapshot leads past it
            replica.apply(read_snapshot(snapshot_of(self.trainer.store, self.folder / "snapshots", keep=2)))
        for part in read_topic(self.topic):
            if (version := self.assembler.add(part)) is not None:
                replica.apply(version)
        return replica

    def _mark(self, what: str) -> None:
        rows = {p: list(at.accounted) for p, at in self.trainer.positions.items()}
        sequence = self.trainer.sequence + (what == "pending")
        with self.marks.open("a") as marks:
            marks.write(json.dumps({"mark": what, "sequence": sequence, "rows": rows}) + "\n")

    def _version(self) -> str:
        return f"{self.trainer.epoch}.{self.trainer.sequence}"


def read_topic(path: Path) -> list[bytes]:
    """The parts in the file that stands for the topic, less one that was cut off."""
    raw, parts, at = path.read_bytes() if path.exists() else b"", [], 0
    while at + PART_BYTES <= len(raw):
        size = int.from_bytes(raw[at : at + PART_BYTES], "big")
        parts.append(raw[at + PART_BYTES : at + PART_BYTES + size])
        at += PART_BYTES + size
    return parts
