"""Rows in fewer bytes: as near to the trainer's as the encoding says, whatever came and went, and found by the scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedding_store.columns import TableRows
from embedding_store.encoding import ENCODINGS, Encoding
from online_model.features import ITEM
from online_model.serving.candidates import ExactIndex
from online_model.serving.metrics import Metrics
from online_model.serving.table import _SCANNED, Table
from tests.online_model.serving.test_candidates import query
from tests.online_model.serving.world import DIM, cards, delta, ids, item_rows, rank, recommend, replica, world


def bound(weights: np.ndarray, encoding: Encoding) -> np.ndarray:
    """How far off each number may be, as table.py says, and the last bits of it."""
    if encoding == "fp32":
        return np.zeros_like(weights)
    if encoding == "fp16":
        return np.maximum(np.abs(weights) * 2.0**-11, 2.0**-25)
    return np.repeat(np.ptp(weights, axis=1, keepdims=True) / 510 * 1.001 + 1e-7, weights.shape[1], axis=1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_looked_up_is_what_was_put_but_for_the_bound(encoding: Encoding) -> None:
    dice, plain = np.random.default_rng(1), {}
    table = Table("item", DIM, {"seen": ("<i8", ())}, 4, encoding=encoding)
    for _ in range(60):  # it grows, and rows are used again
        put = dice.choice(np.arange(1, 400), 30, replace=False)
        weights = (dice.normal(size=(30, DIM)) * 10.0 ** dice.integers(-4, 4, (30, 1))).astype(np.float32)
        table.put(TableRows(put, {"weights": weights, "seen": put * 7}))
        plain |= dict(zip(put.tolist(), weights, strict=True))
        gone = dice.choice(np.arange(1, 400), 10, replace=False)
        table.remove(gone)
        plain = {i: row for i, row in plain.items() if i not in set(gone.tolist())}
    held = np.array(sorted(plain))
    wanted = np.stack([plain[i] for i in held.tolist()])
    rows = table.find(held)
    got = table.gather(rows)
    assert got.dtype == torch.float32
    assert (np.abs(got.numpy() - wanted) <= bound(wanted, encoding)).all()
    assert (table.columns["seen"][rows] == held * 7).all()
    assert not table.gather(np.zeros(1, np.int64)).any(), "the default row is zeros"
    vector = dice.normal(size=DIM).astype(np.float32)
    np.testing.assert_allclose(table.scores(vector)[rows], got.numpy() @ vector, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_scan_goes_over_rows_of_several_slices(encoding: Encoding) -> None:
    n, dice = _SCANNED + 1_000, np.random.default_rng(2)
    table = Table("item", 4, {}, n, encoding=encoding)
    table.put(TableRows(np.arange(1, n + 1), {"weights": dice.normal(size=(n, 4)).astype(np.float32)}))
    vector = np.array([1, -2, 3, 0.5], np.float32)
    np.testing.assert_allclose(table.scores(vector), table.gather(np.arange(table.end)).numpy() @ vector, atol=1e-4)


@pytest.mark.parametrize(("encoding", "off"), [("fp32", 0.0), ("fp16", 0.002), ("int8", 0.02)])
def test_answers_are_nearly_those_of_exact_rows(encoding: Encoding, off: float) -> None:
    exact, made = replica(world()), replica(world(), rows=encoding)
    new = item_rows(["new"], np.full((1, DIM), 0.3))
    for one in (exact, made):
        one.apply(delta(2, tables={ITEM: new}, blobs={"card": cards(["new"])}, gone={ITEM: ids(ITEM, [3])}))
    items = [*range(40), "new"]
    wanted, got = (
        {i.item: i.click for i in rank(one, "u1", "live", items).items} for one in (exact, made)
    )  # fmt: skip
    assert max(abs(wanted[item] - got[item]) for item in wanted) <= off
    assert len(recommend(made, "u1", "live", 10).items) == 10
    with torch.inference_mode():
        best = [set(ExactIndex(one.state, 20).candidates(query(5)).tolist()) for one in (exact, made)]
    assert len(best[0] & best[1]) >= 18


def test_bytes_are_told_and_fall_with_the_encoding() -> None:
    sizes = {}
    for encoding in ENCODINGS:
        made, metrics = replica(world(), rows=encoding), Metrics()
        metrics.watch(lambda made=made: made)  # type: ignore[misc]
        sizes[encoding] = made.nbytes()["user"]
        assert f'headrace_replica_bytes{{table="user"}} {float(sizes[encoding])}'.encode() in metrics.text()
    rows = len(made.state.users.columns["weights"])
    assert sizes["fp32"] - sizes["fp16"] == 2 * DIM * rows
    assert sizes["fp32"] - sizes["int8"] == (3 * DIM - 8) * rows
