"""A train worker that has fallen behind takes larger batches, as large as there is room for; commits become rarer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from online_model.history import HISTORY
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from streams import train_worker
from streams.train_worker import COMMIT_SECONDS, COMMIT_SHARE, RARE_SECONDS, TrainWorker
from tests.online_model.logs import make_blocks, make_rows
from tests.online_model.test_trainer import SMALL

SIZE, ITEMS = 64, 300


def _behind(items: int, rows: int) -> tuple[TrainerSettings, Trainer]:
    """A trainer with room for so many items, that has learned one batch since the last commit, and `rows` to go."""
    model = TrainerSettings(
        batch_size=SIZE, features=FeatureSettings(dim=8, users=4_000, items=items, categories=1_000),
        ranker=RankerSettings(hidden=16, second=8, third=8),
    )  # fmt: skip
    trainer = open_trainer(model, None, lambda: 0)
    for number, block in enumerate(make_blocks(make_rows(rows + SIZE, seed=1, users=500, items=ITEMS), 60, 0)):
        trainer.offer(block, number)
    assert trainer.step() == SIZE
    return model, trainer


@pytest.mark.parametrize(
    ("room_for", "rows", "deterministic", "wanted"),
    [
        (4 * SIZE, 1_000, False, 1_000 // 4),
        (2 * SIZE, 1_000, False, 1_000 // 8),
        (SIZE, 1_000, False, SIZE),
        (4 * SIZE, 3 * SIZE, False, 3 * SIZE // 2),
        (4 * SIZE, 50, False, 50),
        (4 * SIZE, SIZE + 6, False, SIZE + 6),
        (4 * SIZE, 1_000, True, SIZE),
    ],
)
def test_a_worker_that_is_behind_takes_what_there_is_room_for(
    room_for: int, rows: int, deterministic: bool, wanted: int
) -> None:
    each = 1 + TrainerSettings().negatives + HISTORY
    model, trainer = _behind(room_for * each + ITEMS + SIZE, rows)
    worker = SimpleNamespace(settings=SimpleNamespace(model=model, deterministic=deterministic), _trainer=trainer)
    assert TrainWorker._rows_a_step(worker) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("took_s", "pause_s"),
    [(COMMIT_SECONDS * COMMIT_SHARE / 2, COMMIT_SECONDS), (0.6, 0.6 / COMMIT_SHARE), (140.0, RARE_SECONDS)],
)
def test_commits_become_rarer_but_one_that_hung_does_not_keep_the_next_one_away(
    took_s: float, pause_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = open_trainer(SMALL, tmp_path / "train", lambda: 0)
    clock = iter((1_000.0, 1_000.0 + took_s))  # when the commit begins, and when it ends
    monkeypatch.setattr(train_worker, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    worker = SimpleNamespace(
        _trainer=trainer, _metrics=SimpleNamespace(commit=SimpleNamespace(time=nullcontext)), _stalled=False,
        _figures=SimpleNamespace(committed=lambda: None), _dense_due=0.0,
        settings=SimpleNamespace(dense_interval_s=1.0),
    )  # fmt: skip
    TrainWorker._commit(worker)  # type: ignore[arg-type]
    trainer.store.close()
    assert worker._commit_due == pytest.approx(1_000.0 + pause_s)
