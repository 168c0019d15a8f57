"""What a train worker says of itself beside what its trainer knows: how far behind it is, its store, its snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from embedding_store.errors import StoreError
from embedding_store.snapshot import latest_snapshot
from online_model.trainer import Trainer
from streams.ends import Ends
from streams.health import Progress, kafka_away
from streams.metrics import TrainMetrics, Value, tell_process, train_values
from streams.settings import TrainWorkerSettings

LOOK_SECONDS = 5.0  # between two looks at the disk
STUCK_SECONDS = 60.0  # a trainer that has work and ends no turn for so long is not well
A_BLOCK = 2  # offsets of `examples`: itself, and the mark that ends its transaction


class TrainFigures:
    """Of one train worker, which tells `progress` and `committed`. Anything may be asked from any thread."""

    def __init__(self, settings: TrainWorkerSettings, told: Callable[[], tuple[int, int]]) -> None:
        """told: gives the bytes of blocks that wait, and the last sequence that is in Kafka."""
        self.progress = Progress()
        self._settings, self._told = settings, told
        topics = settings.topics
        self._ends = Ends(settings.connection, topics.examples, topics.partitions, committed_only=True)
        self._trainer: Trainer | None = None
        self._committed = time.time()
        self._snapshot = time.time()  # when the newest was made; the start, where none was seen yet
        self._bytes = 0
        self.metrics = TrainMetrics(self._values)
        tell_process(self.metrics.registry, settings.data_dir)

    def tasks(self, trainer: Trainer) -> tuple[Coroutine[Any, Any, None], ...]:
        """What asks Kafka and looks at the disk until it is cancelled. There is nothing to say before."""
        self._trainer = trainer
        return self._ends.run(), self._look()

    def committed(self) -> None:
        """Something is in the store that was not."""
        self._committed = time.time()

    def unwell(self) -> str:
        """Why this worker is not well, "" where it is."""
        if (stuck_s := self.progress.stuck_s) > STUCK_SECONDS:
            return f"blocks wait, and none was learned for {stuck_s:.0f} s"
        if self._trainer is not None and self._trainer.guard.held:
            why = "; ".join(f"{task}: {text}" for task, text in sorted(self._trainer.guard.why.items()))
            return f"versions are held back by the guard ({why})"
        return kafka_away(self._ends.away_s)

    def _values(self) -> dict[str, Value]:
        trainer, now = self._trainer, time.time()
        if trainer is None:
            return {}
        return {
            **train_values(trainer, *self._told()),
            "lag_records": self._lag(trainer),
            "checkpoint_age_seconds": now - self._committed,
            "checkpoint_bytes": self._bytes,
            "snapshot_age_seconds": now - self._snapshot,
        }

    def _lag(self, trainer: Trainer) -> dict[tuple[str, ...], float]:
        """Not of what is in Kafka only: minutes of work may wait in this process."""
        learned = {p: position.source_offset for p, position in list(trainer.positions.items())}
        partitions = sorted(learned.keys() | self._ends.ends.keys())
        return {(str(p),): self._ends.behind(p, learned.get(p, 0)) // A_BLOCK for p in partitions}

    async def _look(self) -> None:
        while True:
            self._bytes, newest = await asyncio.to_thread(self._on_disk)
            self._snapshot = newest or self._snapshot  # where their place is away the last one is older and older
            await asyncio.sleep(LOOK_SECONDS)

    def _on_disk(self) -> tuple[int, float | None]:
        """(bytes of the store, when the newest snapshot was made). Files come and go meanwhile."""
        newest = None
        with contextlib.suppress(StoreError):  # said where the next one is written
            newest = latest_snapshot(self._settings.data_dir / "snapshots")
        return size_of(self._settings.store), None if newest is None else _made(newest)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, those that go away meanwhile left out."""
    total = 0
    for path in folder.glob("**/*"):
        with contextlib.suppress(OSError):  # the store has just dropped it
            total += path.stat().st_size
    return total


def _made(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None  # a newer one has just taken its place
