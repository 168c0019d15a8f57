"""Each table learns by its own optimizer and in its own dimension, and takes the state along wherever its rows go."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, WEIGHTS
from embedding_store.delta import Version, encode, row_bytes
from embedding_store.errors import StoreError
from embedding_store.export import export_store
from embedding_store.owed import Owed
from embedding_store.snapshot import read_snapshot, snapshot_of
from embedding_store.specs import Optimizer, TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
RATE = 0.1
DIMS: dict[Optimizer, int] = {"row_wise_adagrad": 8, "adagrad": 12, "sgd": 8}  # two share a collection

pytestmark = pytest.mark.usefixtures("one_thread")


def _spec(optimizer: Optimizer, dim: int = 8, capacity: int = 10, eps: float = 1e-8) -> TableSpec:
    settings = TableSettings(dim=dim, capacity=capacity, learning_rate=RATE, eps=eps, optimizer=optimizer)
    return TableSpec(optimizer, (optimizer, f"{optimizer} again"), settings)


def _every(capacity: int) -> list[TableSpec]:
    return [_spec(optimizer, dim, capacity) for optimizer, dim in DIMS.items()]


def _store(path: Path) -> CheckpointStore:
    return CheckpointStore(path, {spec.name: spec.layout for spec in _every(1)})


def _learn(tables: EmbeddingTables, ids: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Learns one batch, the same ids in every table; what was read first."""
    rng = np.random.default_rng(seed)
    rows = {name: tables.rows(name, ids, admit=True) for name in tables.specs}
    out = tables.embed({name: (at, None) for name, at in rows.items()})
    grads = [torch.from_numpy(rng.standard_normal(e.shape).astype(np.float32)) for e in out.values()]
    torch.autograd.backward(list(out.values()), grads)
    return {name: e.detach().numpy() for name, e in out.items()}


def _commit(tables: EmbeddingTables, store: CheckpointStore) -> None:
    head = store.head()
    store.commit(Commit(1, head.sequence + 1 if head else 1, b"", rows=tables.touched(), gone=tables.gone()))
    tables.clear_touched()


class Plain:
    """A table in numpy: one step with all of a batch's gradients."""

    def __init__(self, spec: TableSpec, rows: int) -> None:
        self.settings, s = spec.settings, spec.settings
        self.weights = np.zeros((rows, s.dim))
        self.state = np.zeros((rows, s.dim) if s.optimizer == "adagrad" else (rows, 1))

    def step(self, rows: np.ndarray, grads: np.ndarray) -> None:
        g = np.zeros_like(self.weights)
        np.add.at(g, rows, grads)
        if self.settings.optimizer == "sgd":
            self.weights -= RATE * g
            return
        self.state += g**2 if self.settings.optimizer == "adagrad" else (g**2).mean(1, keepdims=True)
        self.weights -= RATE * g / (np.sqrt(self.state) + self.settings.eps)


@pytest.mark.parametrize("eps", [1e-8, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_the_formula(optimizer: Optimizer, eps: float) -> None:
    """The gradients of a row are summed first, within a feature and over two; what is not in the batch stays."""
    spec = _spec(optimizer, eps=eps)
    tables, plain = EmbeddingTables([spec]), Plain(spec, 11)
    every = tables.rows(optimizer, np.array([7, 8, 9]), admit=True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = every[rng.integers(0, 3, 5)]
        g = rng.standard_normal((5, 8)).astype(np.float32)
        out = tables.embed({optimizer: (rows[:3], None), f"{optimizer} again": (rows[3:], None)})
        torch.autograd.backward(list(out.values()), [torch.from_numpy(g[:3]), torch.from_numpy(g[3:])])
        plain.step(rows, g)
    np.testing.assert_allclose(tables.column(optimizer, WEIGHTS), plain.weights, atol=2e-5)
    if optimizer != "sgd":
        momentum = tables.column(optimizer, MOMENTUM)
        np.testing.assert_allclose(momentum.reshape(11, -1), plain.state, rtol=1e-5)
    assert not any(column.any() for column in tables.read_rows(optimizer, np.array([0, 4])).values())


@pytest.mark.parametrize("gradient", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_default_row_learns_nothing(optimizer: Optimizer, gradient: float) -> None:
    tables = EmbeddingTables([_spec(optimizer)])
    rows = tables.rows(optimizer, np.array([7, 0, 8]), admit=True)
    grads = torch.tensor([1.0, gradient, 1.0])[:, None].expand(3, 8)
    tables.embed({optimizer: (rows, None)})[optimizer].backward(grads)
    assert not any(column.any() for column in tables.read_rows(optimizer, np.array([0])).values())
    assert tables.column(optimizer, WEIGHTS)[1:3].all()


def test_what_a_row_keeps_is_its_optimizers_state() -> None:
    assert {o: _spec(o).layout.descr for o in OPTIMIZERS} == {
        "row_wise_adagrad": [(WEIGHTS, "<f4", (8,)), (MOMENTUM, "<f4")],
        "adagrad": [(WEIGHTS, "<f4", (8,)), (MOMENTUM, "<f4", (8,))],
        "sgd": [(WEIGHTS, "<f4", (8,))],
    }
    sizes = {row_bytes(_spec(o).layout, "fp32") for o in OPTIMIZERS}
    assert sizes == {8 + 4 * 8}, "in a version a row is its id and weights"


def test_tables_of_other_dimensions_and_optimizers_learn_as_if_alone() -> None:
    together = EmbeddingTables(_every(50))
    alone = {spec.name: EmbeddingTables([spec]) for spec in _every(50)}
    rng = np.random.default_rng(1)
    for seed in range(10):
        ids = rng.integers(0, 30, 20)
        for name, read in _learn(together, ids, seed).items():
            assert read.shape == (20, DIMS[name])
        rng_of = np.random.default_rng(seed)
        for name, tables in alone.items():
            e = tables.embed({name: (tables.rows(name, ids, admit=True), None)})[name]
            e.backward(torch.from_numpy(rng_of.standard_normal(e.shape).astype(np.float32)))
    for name, tables in alone.items():
        for column in tables.read_rows(name, np.arange(31)):
            np.testing.assert_array_equal(together.column(name, column)[:31], tables.column(name, column)[:31])


def test_tables_of_one_dimension_share_a_look_up() -> None:
    collections = EmbeddingTables(_every(5))._sharded._module.module.collections
    assert [sorted(c.embeddings) for c in collections] == [["row_wise_adagrad", "sgd"], ["adagrad"]]


def test_rows_come_back_with_their_state_bit_for_bit(tmp_path: Path) -> None:
    """Evicted, or restored after a restart, into other rows: what they learn next is the same."""
    with _store(tmp_path / "small") as store, _store(tmp_path / "large") as other:
        small, large = EmbeddingTables(_every(40), store=store), EmbeddingTables(_every(1000), store=other)
        rng = np.random.default_rng(2)
        for seed in range(60):
            ids = rng.integers(1, 200, 20)
            if seed == 30:
                small = EmbeddingTables(_every(40), store=store)
            elif seed == 45:
                small = EmbeddingTables(_every(300), store=store)
                small.restore()
            small.begin_step()
            large.begin_step()
            there, here = _learn(large, ids, seed), _learn(small, ids, seed)
            for name in OPTIMIZERS:
                np.testing.assert_array_equal(there[name], here[name])
            _commit(small, store)
        _commit(large, other)
        assert store.digest() == other.digest()
        momentum = [rows.columns.get(MOMENTUM) for rows in map(next, map(store.iter_rows, OPTIMIZERS))]
        assert [None if m is None else m.shape[1:] for m in momentum] == [(), (12,), None]


@pytest.mark.parametrize("by", ["forgotten", "evicted"])
def test_a_row_that_is_used_again_has_nothing_of_the_id_before(tmp_path: Path, by: str) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_every(4), store=store)
        _learn(tables, np.array([1, 2, 3, 4]), 0)
        _commit(tables, store)
        for name in OPTIMIZERS:
            if by == "forgotten":
                tables.forget(name, np.array([1, 2, 3, 4]))
            rows = tables.rows(name, np.array([5, 6, 7, 8]), admit=True)
            assert (rows > 0).all()
            assert not any(column.any() for column in tables.read_rows(name, rows).values())


def test_the_state_is_for_the_trainer_and_not_for_replicas(tmp_path: Path) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_every(4), store=store)
        _learn(tables, np.array([1, 2, 3, 4]), 0)
        touched, version = tables.touched(), Version(1, 1, None)
        for rate in (0, 1 << 30):
            plan = Owed(store, rate, 1000, {}, "fp32").plan(touched, {}, 1000, everything=False)
            assert {name: set(rows.columns) for name, rows in plan.tables.items()} == {name: {WEIGHTS} for name in DIMS}
        store.commit(Commit(1, 1, b"", rows=touched, parts=encode(version), version=version))
        snapshot = read_snapshot(snapshot_of(store, tmp_path / "snapshots"))
        assert {name: set(rows.columns) for name, rows in snapshot.tables.items()} == {name: {WEIGHTS} for name in DIMS}


def test_an_export_has_the_state_that_there_is(tmp_path: Path) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_every(4), store=store)
        _learn(tables, np.array([1, 2, 3, 4]), 0)
        _commit(tables, store)
        export_store(store, tmp_path / "out", {})
        for name in OPTIMIZERS:
            numbers, rows = load_file(tmp_path / "out" / f"{name}-0.safetensors"), next(store.iter_rows(name))
            assert numbers.keys() == rows.columns.keys()
            for column, values in numbers.items():
                np.testing.assert_array_equal(values, rows.columns[column])
            assert pq.read_schema(tmp_path / "out" / f"{name}-0.parquet").names == ["id"]


@pytest.mark.parametrize("other", [o for o in OPTIMIZERS if o != "adagrad"])
def test_a_store_of_another_optimizer_is_refused(tmp_path: Path, other: Optimizer) -> None:
    CheckpointStore(tmp_path / "s", {"t": _spec("adagrad").layout}).close()
    with pytest.raises(StoreError, match="dimensions or optimizers"):
        CheckpointStore(tmp_path / "s", {"t": _spec(other).layout})
