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
from streams.train_worker import (
    BEHIND_ROWS,
    BEHIND_SECONDS,
    BEHIND_SHARE,
    COMMIT_SECONDS,
    COMMIT_SHARE,
    RARE_SECONDS,
    TrainWorker,
)
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
    ("took_s", "waiting", "pause_s"),
    [
        (COMMIT_SECONDS * COMMIT_SHARE / 2, 0, COMMIT_SECONDS),
        (0.6, 0, 0.6 / COMMIT_SHARE),
        (140.0, 0, RARE_SECONDS),
        (0.03, BEHIND_ROWS, 0.03 / COMMIT_SHARE),
        (0.03, BEHIND_ROWS + 1, 0.03 / BEHIND_SHARE),
        (0.1, BEHIND_ROWS + 1, BEHIND_SECONDS),
        (0.6, BEHIND_ROWS + 1, 0.6 / COMMIT_SHARE),
        (140.0, BEHIND_ROWS + 1, RARE_SECONDS),
    ],
)
def test_commits_become_rarer_but_one_that_hung_does_not_keep_the_next_one_away(
    took_s: float, waiting: int, pause_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = open_trainer(SMALL, tmp_path / "train", lambda: 0)
    monkeypatch.setattr(Trainer, "pending", property(lambda _: waiting))
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


@pytest.mark.parametrize(("waits", "due_in_s", "steps"), [(99, -5.0, 2), (99, 0.2, 7), (99, 9.0, 9), (3, 9.0, 3)])
def test_a_turn_learns_until_a_commit_is_due_or_nothing_waits(
    waits: int, due_in_s: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1_000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(train_worker, "time", clock)

    def step(rows: int) -> int:
        clock.now += 0.03
        trainer.pending -= 1
        return rows

    trainer = SimpleNamespace(
        pending=waits, step=step, commit_due=lambda: False, store=SimpleNamespace(acknowledge=lambda _: None)
    )
    learned: list[int] = []
    metrics = SimpleNamespace(step=SimpleNamespace(time=nullcontext), batch=SimpleNamespace(observe=learned.append))
    worker = SimpleNamespace(
        _trainer=trainer, _published=0, _dirty=True, _commit_due=1_000.0 + due_in_s, _metrics=metrics,
        _rows_a_step=lambda: 1, _waiting=[], _commit=lambda everything: [(1, [])],
        _learn_items=lambda items: [],
        _figures=SimpleNamespace(progress=SimpleNamespace(made=lambda more: None)),
    )  # fmt: skip
    committed = TrainWorker._turn(worker, [], [], False)  # type: ignore[arg-type]
    assert len(learned) == steps
    assert bool(committed) == (clock.now >= worker._commit_due)
