"""Delayed feedback and downsampling: what is learned is right on average, nothing is scored after it was learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from online_model.examples import Examples, Part
from online_model.feedback import probabilities, strategy
from online_model.losses import labels, loss_sum, sampling_correction
from online_model.ranker import PURCHASE
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.figures.feedback import measure
from tests.online_model.delays import HOUR, make_clicks
from tests.online_model.delays import make_rows as delayed_rows
from tests.online_model.logs import START, make_blocks, make_rows

BASE = dict(
    batch_size=128, window=1 << 14, features=FeatureSettings(dim=8, users=1000, items=1000, categories=100),
    ranker=RankerSettings(hidden=16, second=8, third=8),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def played(path, rows: Examples, **settings) -> Trainer:
    trainer = open_trainer(TrainerSettings(**BASE | settings), path, lambda: START)
    for number, block in enumerate(make_blocks(rows, 1024, users=False)):
        trainer.offer(block, number)
        while trainer.step():
            pass
    return trainer


@pytest.mark.parametrize("wait", [0, 12 * HOUR])
@pytest.mark.parametrize("name", ["calibrated", "weighted", "elapsed"])
def test_the_expected_gradient_is_zero_where_the_truth_is_served(name, wait):
    """Given the rows of many clicks of one kind, the loss does not want to move heads that are right."""
    if (name == "elapsed") != (wait > 0):
        pytest.skip("a strategy for the other wait")
    clicks = make_clicks(4000, 3.0, seed=1)
    clicks.kind[:] = 5
    rows, how = delayed_rows(clicks, wait), strategy(name, wait)
    rows = rows.take(rows.part != Part.SHOWN) if wait else rows
    bought, slow = (clicks.delay >= 0).mean(), ((clicks.delay < 0) | (clicks.delay > wait)).mean()
    q, in_time, delayed = bought, 1 - slow, (clicks.delay > wait).mean() / slow
    if name == "elapsed":
        truth = [np.log(q / (1 - q)), np.log(in_time / (1 - in_time)), np.log(delayed)]
    else:
        truth = [np.log(q) if name == "calibrated" else np.log(q / (1 - q))]
    head = torch.tensor([0.0, 0.0, 0.0, *truth], dtype=torch.float64, requires_grad=True)
    logits = head.expand(len(rows), len(head))
    p = probabilities(logits.detach(), how)
    weight = torch.ones_like(p)
    weight[:, PURCHASE:] = how.weights(torch.from_numpy(labels(rows, how))[:, PURCHASE:], p[:, PURCHASE:])
    loss_sum(logits, torch.from_numpy(labels(rows, how)).double(), weight).backward()
    assert p[0, PURCHASE].item() == pytest.approx(q)
    assert head.grad is not None
    assert head.grad[PURCHASE:].abs().max() / len(rows) < 1e-6


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["calibrated", "weighted", "elapsed"])
def test_purchase_rates_are_right_while_purchases_are_still_to_come(name):
    """Over four streams: of a single one chance alone makes some percent."""
    assert np.mean([measure(name, seed).ratio for seed in range(1, 5)]) == pytest.approx(1, abs=0.05)


def test_of_one_stream_the_rate_is_near_and_without_a_correction_too_low():
    assert measure("calibrated", seed=1).ratio == pytest.approx(1, abs=0.1)
    assert measure("none", seed=1).ratio < 0.9


@pytest.mark.parametrize("feedback", ["none", "elapsed"])
def test_a_purchase_is_scored_at_the_click_before_any_of_its_rows_is_learned(tmp_path, feedback):
    """The score booked for a click is the one of a trainer that has learned the rows before its batch and no other."""
    clicks, wait = make_clicks(600, 2.0, seed=3), 12 * HOUR
    rows = delayed_rows(clicks, wait)
    settings = {"feedback": feedback, "purchase_wait_ms": wait}
    whole = played(tmp_path / "whole", rows, **settings)
    booked = whole._evaluation.tasks["purchase"].state()
    whole.store.close()
    cut = 5 * 128  # whole batches
    before = played(tmp_path / "before", rows.take(slice(0, cut)), **settings)
    now = rows.take(slice(cut, cut + 128))
    fresh = now.click == 1
    number = len(make_blocks(rows.take(slice(0, cut)), 1024))
    before.offer(make_blocks(now, 1024, first=10 * number, users=False)[0], number)
    before.step()
    before.store.close()
    expected = before._evaluation.tasks["purchase"].state()
    told = dict(zip(booked["key"].tolist(), booked["p"].tolist(), strict=True))
    scored = dict(zip(expected["key"].tolist(), expected["p"].tolist(), strict=True))
    assert fresh.any()
    assert [told[k] for k in now.example_id[fresh].tolist()] == [scored[k] for k in now.example_id[fresh].tolist()]
    assert len(booked["key"]) == len(set(booked["key"].tolist())) == 600, "one score for each click"
    assert booked["label"].sum() == (rows.part == Part.PURCHASE).sum()


def test_the_score_of_an_example_does_not_depend_on_what_becomes_of_it(tmp_path):
    """The same stream with other purchases in the last batch's examples: their scores are the same."""
    clicks = make_clicks(256, 0.5, seed=4)
    scores = []
    for delay in (-1, 1):
        clicks.delay[128:] = delay
        rows = delayed_rows(clicks, 12 * HOUR)
        rows = rows.take(np.argsort(rows.part != Part.SHOWN, kind="stable"))  # the clicks first: two batches of them
        trainer = played(tmp_path / str(delay), rows, feedback="elapsed", purchase_wait_ms=12 * HOUR)
        scores.append(trainer._evaluation.tasks["purchase"].state()["p"])
        trainer.store.close()
    assert (scores[0] == scores[1]).all()


def downsampled(n: int, keep: int) -> tuple[Examples, Examples]:
    """(all rows, the rows of which one in `keep` unclicked ones is left)."""
    rows = make_rows(n, seed=5)
    kept = (rows.click == 1) | (np.random.default_rng(5).random(n) < 1 / keep)
    part = rows.take(kept)
    part.rate = np.where(part.click == 0, 1 / keep, 1).astype(np.float32)
    return rows, part


@pytest.mark.parametrize("correction", ["loss", "logit"])
def test_downsampled_impressions_give_the_click_rate_of_all(tmp_path, correction):
    rows, part = downsampled(8_000, 4)
    trainer = played(tmp_path, part, sampling_correction=correction)
    task, stats = trainer._evaluation.tasks["click"], trainer.tables.column("item", "impressions").sum()
    trainer.store.close()
    assert task.total().count == pytest.approx(len(rows), rel=0.03)
    assert stats == task.total().count, "an item's impressions count what was dropped"
    state = task.state()
    recent = slice(len(state["p"]) // 2, None)
    p, label, weight = (state[name][recent].astype(np.float64) for name in ("p", "label", "weight"))
    assert (p @ weight) / (label @ weight) == pytest.approx(1, abs=0.1)


def test_sampling_is_made_up_for_once():
    _, part = downsampled(400, 4)
    for how in ("loss", "logit"):
        weight, offset = sampling_correction(part, how, 0.25)
        assert (weight == 1).all() != (offset == 0).all(), "in the loss or in the logit, never in both"
    weight, _ = sampling_correction(part, "loss", 0.25)
    _, offset = sampling_correction(part, "logit", 0.25)
    assert (weight == np.where(part.click == 0, 4, 1)).all()
    assert offset == pytest.approx(np.log(4)), "clicks too: what was dropped has raised the odds of both"


def test_a_strategy_that_does_not_fit_the_joiner_is_refused():
    for feedback, wait in (("elapsed", 0), ("calibrated", 5), ("weighted", 5)):
        with pytest.raises(ValueError, match=r"join\.purchase_wait_ms"):
            TrainerSettings(feedback=feedback, purchase_wait_ms=wait)
    for feedback, wait in (("none", 0), ("none", 5), ("calibrated", 0), ("weighted", 0), ("elapsed", 5)):
        TrainerSettings(feedback=feedback, purchase_wait_ms=wait)
