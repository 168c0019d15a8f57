"""A train worker that has fallen behind takes larger batches, as large as there is room for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from online_model.history import HISTORY
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from streams.train_worker import TrainWorker
from tests.online_model.logs import make_blocks, make_rows

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
        (4 * SIZE, 1_000, False, 4 * SIZE),
        (2 * SIZE, 1_000, False, 2 * SIZE),
        (SIZE, 1_000, False, SIZE),
        (4 * SIZE, 3 * SIZE, False, 3 * SIZE // 2),
        (4 * SIZE, 50, False, SIZE),
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
