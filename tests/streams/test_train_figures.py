"""What a train worker says of itself when something beside it is away."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from online_model.trainer import open_trainer
from streams import train_figures
from streams.settings import TrainWorkerSettings
from streams.train_figures import A_BLOCK, TrainFigures
from tests.online_model.logs import make_blocks, make_rows
from tests.online_model.test_trainer import SMALL

OLD_S = 1_000.0


def told(figures: TrainFigures, name: str) -> float:
    families = text_string_to_metric_families(generate_latest(figures.metrics.registry).decode())
    (sample,) = next(family.samples for family in families if family.name == f"headrace_train_{name}")
    return sample.value


def test_a_snapshot_grows_old_while_its_place_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_figures, "LOOK_SECONDS", 0.01)
    settings = TrainWorkerSettings(bootstrap="127.0.0.1:1", data_dir=tmp_path)
    snapshots = tmp_path / "snapshots"

    async def look() -> None:
        figures = TrainFigures(settings, lambda: (0, 0))
        trainer = open_trainer(SMALL, settings.store, lambda: 1)
        looking = asyncio.gather(*figures.tasks(trainer))
        assert told(figures, "snapshot_age_seconds") < OLD_S / 2  # none was seen: since the start
        (snapshots / "1-1").mkdir(parents=True)
        os.utime(snapshots / "1-1", times=(time.time() - OLD_S,) * 2)
        while told(figures, "snapshot_age_seconds") < OLD_S:
            await asyncio.sleep(0.01)
        snapshots.rename(tmp_path / "away")
        looked, on_disk = asyncio.Event(), figures._on_disk
        loop = asyncio.get_running_loop()

        def see() -> tuple[int, float | None]:
            found = on_disk()
            loop.call_soon_threadsafe(looked.set)
            return found

        monkeypatch.setattr(figures, "_on_disk", see)
        for _ in range(2):
            looked.clear()
            await looked.wait()
        assert told(figures, "snapshot_age_seconds") > OLD_S
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        trainer.store.close()

    asyncio.run(look())


def test_blocks_are_behind_until_they_are_learned(tmp_path: Path) -> None:
    settings = TrainWorkerSettings(bootstrap="127.0.0.1:1", data_dir=tmp_path)

    async def learn() -> None:
        figures = TrainFigures(settings, lambda: (0, 0))
        trainer = open_trainer(SMALL, settings.store, lambda: 1)
        for task in figures.tasks(trainer):
            task.close()
        blocks = make_blocks(make_rows(200, seed=1), 50, partition=0)
        figures._ends.ends = {0: A_BLOCK * len(blocks)}
        assert told(figures, "lag_records") == len(blocks) > 2
        for number, block in enumerate(blocks):
            trainer.offer(block, A_BLOCK * number)
        assert told(figures, "lag_records") == len(blocks)  # nothing is left in Kafka, and nothing is learned
        while trainer.pending:
            trainer.step()
        assert told(figures, "lag_records") == 0
        trainer.store.close()

    asyncio.run(learn())
