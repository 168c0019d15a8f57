"""What a train worker says of itself beside what its trainer knows: how far behind it is, its store, its snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

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

    def __init__(
        self, settings: TrainWorkerSettings, expected: Mapping[int, int], told: Callable[[], tuple[int, int]]
    ) -> None:
        """expected: partition of `examples` → the offset of the next record to take, live. told: gives the bytes of
        blocks that wait, and the last sequence that is in Kafka."""
        self.progress = Progress()
        self._settings, self._expected, self._told = settings, expected, told
        topics = settings.topics
        self._ends = Ends(settings.connection, topics.examples, topics.partitions, committed_only=True)
        self._trainer: Trainer | None = None
        self._committed = time.time()
        self._snapshot: float | None = None  # when the newest was made
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
        values: dict[str, Value] = {
            **train_values(trainer, *self._told()),
            "lag_records": {
                (str(p),): self._ends.behind(p, at) // A_BLOCK for p, at in list(self._expected.items())
            },
            "checkpoint_age_seconds": now - self._committed,
            "checkpoint_bytes": self._bytes,
        }
        if self._snapshot is not None:
            values["snapshot_age_seconds"] = now - self._snapshot
        return values

    async def _look(self) -> None:
        while True:
            self._bytes, self._snapshot = await asyncio.to_thread(self._on_disk)
            await asyncio.sleep(LOOK_SECONDS)

    def _on_disk(self) -> tuple[int, float | None]:
        """(bytes of the store, when the newest snapshot was made). Files come and go meanwhile."""
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
