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

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from online_model.catalogue import CatalogueItem
from online_model.examples import Block, Counts, ExamplesDigest
from online_model.settings import TrainerSettings
from online_model.trainer import Trainer, open_trainer
from replay.joining import JoinedLog
from replay.oracle import Expected, PartitionOracle, Rules, compare
from streams.joiner import JoinSettings

COMMIT_SECONDS = 2.0  # of work between two commits …
COMMIT_SHARE = 0.1  # … which take at most so much of the time


class Joined(Protocol):
    """A log through the joiners of its partitions, as JoinedLog is. `events` counts an impression of k items as k.

    `to_ms`: event time so far. `whole_slices`: those that no record can be added to any more.
    """

    @property
    def events(self) -> int: ...

    @property
    def to_ms(self) -> int: ...

    @property
    def whole_slices(self) -> int: ...

    def slices(self, records: Iterable[Any]) -> Iterator[tuple[list[CatalogueItem], Iterator[Block]]]:
        """(items of the catalogue, blocks) of each slice of `records`."""

    def close(self) -> Iterator[Block]:
        """What is left at the end."""

    def counts(self) -> Counts:
        """The joiners' balance, in sum."""


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


class DirectReplay:
    """One replay into the store of `settings`, going on from what is in it. `progress` is called after each slice."""

    def __init__(self, settings: DirectSettings, progress: Callable[[Replayed], None] | None = None) -> None:
        """Raises StoreLocked, StoreError."""
        self.settings, self.progress = settings, progress or (lambda _: None)
        self.replayed, self.digest = Replayed(), ExamplesDigest()
        rules = Rules.of(settings.join)
        self._oracles = [PartitionOracle(rules) for _ in range(settings.partitions)]
        self._blocks = [0] * settings.partitions  # offered
        self._trainer = self._open()
        self._log = self._joined()
        self.replayed.resumed_at = self._trainer.mark
        self._commit_due = 0.0

    def run(self, records: Iterable[Any]) -> dict[str, Any]:
        """The whole log, by time (but for faults on purpose); returns the figures of `headrace replay --json`."""
        started = time.monotonic()
        self._commit_due = started + COMMIT_SECONDS
        try:
            for items, blocks in self._log.slices(records):
                self._slice(items, blocks)
                self.replayed.seconds = time.monotonic() - started
                self.progress(self.replayed)
            self._offer(self._log.close())
            self._learn(drain=True)
            self._commit()
            self.replayed.seconds = time.monotonic() - started
            return self._figures()
        finally:
            self._trainer.store.close()

    def _open(self, partitions: int | None = None) -> Trainer:
        """`partitions`: of the trainer's deterministic order (positions.py); None: those of a deterministic replay."""
        settings = self.settings
        torch.set_num_threads(1 if settings.deterministic else settings.threads)
        torch.use_deterministic_algorithms(settings.deterministic)
        if partitions is None:
            partitions = settings.partitions if settings.deterministic else 0
        return open_trainer(settings.model, settings.store, lambda: self.replayed.to_ms, partitions)

    def _joined(self) -> Joined:
        settings = self.settings
        return JoinedLog(
            settings.join, settings.partitions, settings.lag_ms, lambda p, value: self._oracles[p].feed(value, None)
        )

    def _slice(self, items: list[CatalogueItem], blocks: Iterator[Block]) -> None:
        """Steps 1 to 4 for one slice. One that was learned before is only joined."""
        self.replayed.slices += 1
        self.replayed.events, self.replayed.to_ms = self._log.events, self._log.to_ms
        learned = self.replayed.slices <= self.replayed.resumed_at
        if items and not learned:
            self._make_room(len(items))
            self._trainer.catalogue(items)
        self._offer(blocks)
        if not learned:
            self._learn(drain=False)
            self._trainer.mark = self._log.whole_slices
            if time.monotonic() >= self._commit_due:
                self._commit()

    def _offer(self, blocks: Iterator[Block]) -> None:
        for block in blocks:
            self._make_room(len(block.users))
            self.digest.add(block.examples)
            self._trainer.offer(block, self._blocks[block.partition])
            self._blocks[block.partition] += 1

    def _make_room(self, rows: int) -> None:
        """Commits where so many new ids may find a table full of what is not committed: whether an id gets a row must
        hang on the log, and not on when the last commit happened to be."""
        if self._trainer.short_of(rows):
            self._commit()

    def _learn(self, drain: bool) -> None:
        while True:
            if self._trainer.commit_due():
                self._commit()
            if not self._trainer.step(drain):
                return

    def _commit(self) -> None:
        start = time.monotonic()
        if self._trainer.commit() is not None:
            self._trainer.store.acknowledge(self._trainer.sequence)  # nobody follows a replay
        end = time.monotonic()
        self._commit_due = end + max(COMMIT_SECONDS, (end - start) / COMMIT_SHARE)

    def _accounts(self) -> tuple[dict[int, Expected], dict[int, tuple[int, int]]]:
        """By partition: what the oracle expects, and (rows trained, sum of their ids)."""
        expected = {p: oracle.expected for p, oracle in enumerate(self._oracles)}
        return expected, {p: at.accounted for p, at in self._trainer.positions.items()}

    def _figures(self) -> dict[str, Any]:
        trainer, counts = self._trainer, self._log.counts()
        expected, trained = self._accounts()
        verdict = compare(expected, trained)
        metrics = trainer.info()["metrics"]
        return {
            "events_in": counts.events_in,
            "events_rejected": counts.rejected,
            "examples": self.digest.rows,
            "trained_examples": sum(rows for rows, _ in trained.values()),
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
            "left_out": trainer.left_out,
            "no_room": trainer.info()["no_room"],
            "resumed_at": self.replayed.resumed_at,
            "slices": self.replayed.slices,
        }
