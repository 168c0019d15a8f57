"""A replay without Kafka: a log through the very joiner, trainer and checkpoint, in one process, by the log's clock.

The log is the truth, and cut into slices of so many records. Slice after slice:

1. catalogue: its items go to the trainer;
2. join:      its events go to the joiner of their user's partition, and each partition hears the time (a tick);
3. learn:     the blocks are offered, the trainer steps while there is a whole batch below the smallest watermark;
4. commit:    when it is due, with the number of the slice as its mark.

A run that was killed is resumed from its last commit: the slices up to the mark are joined again, which is cheap, and
what of them was learned already is left out by the trainer. So a resumed run ends with the very checkpoint of one that
was never interrupted. The checkpoint is all that is kept; no joiner's state has to fit to it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from aiokafka.partitioner import murmur2

from online_model.examples import Counts, ExamplesDigest
from online_model.settings import TrainerSettings
from online_model.trainer import CatalogueItem, Trainer, open_trainer
from replay.faults import Garbage
from replay.oracle import PartitionOracle, Rules, compare
from replay.readers import Record
from streams.catalogue import catalogue_item
from streams.events import Event, Item, Tick, encode, units
from streams.joiner import Joiner, JoinSettings
from streams.joiner import Record as LogRecord

SLICE = 2_000  # records of the log
COMMIT_SECONDS = 2.0  # of work between two commits …
COMMIT_SHARE = 0.1  # … which take at most so much of the time


@dataclass(frozen=True)
class DirectSettings:
    """What a direct replay needs. `deterministic`: bit for bit the same each time, on one thread."""

    store: Path
    join: JoinSettings
    model: TrainerSettings
    partitions: int = 4
    threads: int = 1
    deterministic: bool = False
    lag_ms: int = 0  # records may come so much later than their place (faults on purpose)


@dataclass
class Replayed:
    """How far a replay has come. `events` counts an impression of k items as k."""

    events: int = 0
    slices: int = 0
    resumed_at: int = 0  # slices that had been learned before
    trained: int = 0
    seconds: float = 0.0
    to_ms: int = 0  # event time

    @property
    def events_per_s(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0


@dataclass
class _Lane:
    """One partition: its joiner, the oracle beside it, and what came in the slice."""

    joiner: Joiner
    oracle: PartitionOracle
    offset: int = 0
    blocks: int = 0
    records: list[LogRecord] = field(default_factory=list)

    def put(self, value: bytes) -> None:
        self.records.append(LogRecord(self.offset, None, value))
        self.offset += 1


class DirectReplay:
    """One replay into the store of `settings`, going on from what is in it. `progress` is called after each slice."""

    def __init__(self, settings: DirectSettings, progress: Callable[[Replayed], None] | None = None) -> None:
        """Raises StoreLocked, StoreError."""
        self.settings, self.progress = settings, progress or (lambda _: None)
        self.replayed, self.digest = Replayed(), ExamplesDigest()
        join, rules = settings.join, Rules.of(settings.join)
        self._lanes = [_Lane(Joiner(join, p), PartitionOracle(rules)) for p in range(settings.partitions)]
        self._trainer = self._open()
        self.replayed.resumed_at = self._trainer.mark
        self._commit_due = 0.0

    def run(self, records: Iterable[Record | Garbage]) -> dict[str, Any]:
        """The whole log, by time (but for faults on purpose); returns the figures of `headrace replay --json`."""
        started = time.monotonic()
        self._commit_due = started + COMMIT_SECONDS
        try:
            for part in _slices(records):
                self._slice(part)
                self.replayed.seconds = time.monotonic() - started
                self.progress(self.replayed)
            self._tick(self.replayed.to_ms + self.settings.join.closing_ms)
            self._offer()
            self._learn(drain=True)
            self._commit()
            self.replayed.seconds = time.monotonic() - started
            return self._figures()
        finally:
            self._trainer.store.close()

    def _open(self) -> Trainer:
        settings = self.settings
        torch.set_num_threads(1 if settings.deterministic else settings.threads)
        torch.use_deterministic_algorithms(settings.deterministic)
        partitions = settings.partitions if settings.deterministic else 0
        return open_trainer(settings.model, settings.store, lambda: self.replayed.to_ms, partitions)

    def _slice(self, records: list[Record | Garbage]) -> None:
        """Steps 1 to 4 for one slice. One that was learned before is only joined."""
        self.replayed.slices += 1
        learned = self.replayed.slices <= self.replayed.resumed_at
        items: list[CatalogueItem] = []
        for record in records:
            if isinstance(record, Item):
                items.append(catalogue_item(record, encode(record)))
            else:
                self._put(record)
        if items and not learned:
            self._make_room(len(items))
            self._trainer.catalogue(items)
        self._tick(max(0, self.replayed.to_ms - self.settings.lag_ms))
        self._offer()
        if not learned:
            self._learn(drain=False)
            self._trainer.mark = self.replayed.slices
            if time.monotonic() >= self._commit_due:
                self._commit()

    def _put(self, event: Event | Garbage) -> None:
        if isinstance(event, Tick):
            return  # a recorded log has its own; time is told here
        lane = self._lanes[partition_of(event.user, len(self._lanes))]
        if isinstance(event, Garbage):
            self.replayed.events += 1
            lane.put(event.value)
            return
        self.replayed.events += units(event)
        self.replayed.to_ms = max(self.replayed.to_ms, event.ts)
        lane.put(encode(event))

    def _tick(self, ts: int) -> None:
        """Every partition hears that event time has come to `ts`."""
        for partition, lane in enumerate(self._lanes):
            lane.put(encode(Tick(event_id=f"tick-{partition}-{ts}", ts=ts)))

    def _offer(self) -> None:
        for lane in self._lanes:
            records, lane.records = lane.records, []
            for record in records:
                lane.oracle.feed(record.value, None)
            block = lane.joiner.process(records).block
            self._make_room(len(block.users))
            self.digest.add(block.examples)
            self._trainer.offer(block, lane.blocks)
            lane.blocks += 1

    def _make_room(self, rows: int) -> None:
        """Commits where so many new ids may find a table full of what is not committed: whether an id gets a row must
        hang on the log, and not on when the last commit happened to be."""
        if self._trainer.short_of(rows):
            self._commit()

    def _learn(self, drain: bool) -> None:
        while True:
            if self._trainer.commit_due:
                self._commit()
            if not self._trainer.step(drain):
                return

    def _commit(self) -> None:
        start = time.monotonic()
        if self._trainer.commit() is not None:
            self._trainer.store.acknowledge(self._trainer.sequence)  # nobody follows a replay
        end = time.monotonic()
        self._commit_due = end + max(COMMIT_SECONDS, (end - start) / COMMIT_SHARE)

    def _figures(self) -> dict[str, Any]:
        trainer, positions = self._trainer, self._trainer.positions
        counts = Counts()
        for lane in self._lanes:
            for name, value in vars(lane.joiner.counts).items():
                setattr(counts, name, getattr(counts, name) + value)
        trained = {p: at.accounted for p, at in positions.items()}
        verdict = compare({p: lane.oracle.expected for p, lane in enumerate(self._lanes)}, trained)
        metrics = trainer.info()["metrics"]
        return {
            "events_in": counts.events_in,
            "events_rejected": counts.rejected,
            "examples": self.digest.rows,
            "trained_examples": sum(at.rows for at in positions.values()),
            "lost": verdict.lost,
            "duplicated": verdict.duplicated,
            "balance": {name: getattr(counts, name) for name in verdict.balance},
            "oracle_balance": verdict.balance,
            "prequential": {
                task: {key: figures[key] for key in ("auc", "ne", "calibration", "count")}
                for task, figures in metrics.items()
                if figures["count"]
            },
            "examples_digest": self.digest.hexdigest(),
            "checkpoint_digest": trainer.digest(),
            "events_per_s": round(self.replayed.events_per_s, 1),
            "seconds": round(self.replayed.seconds, 3),
            "no_room": trainer.info()["no_room"],
            "resumed_at": self.replayed.resumed_at,
            "slices": self.replayed.slices,
        }


def partition_of(user: str | int, partitions: int) -> int:
    """Where Kafka's default partitioner puts a user's events: murmur2 of the key."""
    return (murmur2(str(user).encode("utf-8", "surrogatepass")) & 0x7FFFFFFF) % partitions


def _slices(records: Iterable[Record | Garbage]) -> Iterator[list[Record | Garbage]]:
    rest = iter(records)
    while part := list(itertools.islice(rest, SLICE)):
        yield part
