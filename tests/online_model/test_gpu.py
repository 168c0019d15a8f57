"""A trainer on CUDA learns what one on the host does, and its store is any trainer's: `pytest -m gpu` (docs/gpu.md).

Each test runs on the host too, with the very same code, so that it is known to be sound where there is no device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from online_model.batch import candidates_of
from online_model.settings import FeatureSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.devices import ON
from tests.online_model.logs import START, make_blocks, make_rows
from tests.online_model.test_ranks import alone

SMALL = TrainerSettings(
    features=FeatureSettings(dim=8, users=3_000, items=3_000, categories=100), batch_size=64, window=20_000
)
ROWS, BLOCK = 3_000, 100


def _learn(trainer: Trainer, start: int) -> list[float]:
    """The losses of the steps over ROWS rows from `start` on."""
    losses = []
    blocks = make_blocks(make_rows(ROWS, seed=3, users=50, items=40, from_row=start), BLOCK, 0, start // BLOCK * 10)
    for number, block in enumerate(blocks):
        trainer.offer(block, start // BLOCK + number)
        while trainer.step(drain=number == len(blocks) - 1):
            losses.append(trainer.last_loss)
    trainer.commit()
    return losses


def _scores(trainer: Trainer) -> np.ndarray:
    """What it says of candidates, without learning them."""
    rows = make_rows(200, seed=3, users=50, items=40, from_row=2 * ROWS)
    candidates, *_ = candidates_of(rows, np.empty(0, np.int64), np.empty((0, 4), np.int64))
    return trainer.score(candidates)[0]


def _session(device: str, store: Path, start: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """(losses, scores before, scores after) of a trainer on the store."""
    torch.set_num_threads(1)
    trainer = open_trainer(SMALL, store, lambda: START, 1, device=device)
    before = _scores(trainer)
    losses = _learn(trainer, start)
    after = _scores(trainer)
    trainer.store.close()
    return losses, before, after


@pytest.mark.parametrize("device", ON)
def test_a_trainer_there_learns_what_one_on_the_host_does(device: str, tmp_path: Path) -> None:
    host, _, expected = alone(_session, "cpu", tmp_path / "host", 0)
    there, first, learned = alone(_session, device, tmp_path / "there", 0)
    assert len(there) == len(host) > 40
    np.testing.assert_allclose(there, host, atol=1e-3)
    np.testing.assert_allclose(learned, expected, atol=1e-3)
    assert np.abs(learned - first).max() > 0.01, "and it has learned something"


@pytest.mark.parametrize("device", ON)
def test_its_checkpoint_opens_on_the_host_and_back(device: str, tmp_path: Path) -> None:
    """Rows, dense weights and Adam's state: what one says at its end the next one says at its beginning."""
    *_, end = alone(_session, device, tmp_path / "s", 0)
    _, begin, end_on_host = alone(_session, "cpu", tmp_path / "s", ROWS)
    np.testing.assert_allclose(begin, end, atol=1e-5)
    _, begin, _ = alone(_session, device, tmp_path / "s", 2 * ROWS)
    np.testing.assert_allclose(begin, end_on_host, atol=1e-5)
