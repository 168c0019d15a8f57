"""The store's tables on CUDA are those on the host: `pytest -m gpu` where there is a device (docs/gpu.md).

Each test runs on the host too, with the very same code, so that it is known to be sound where there is no device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, WEIGHTS
from embedding_store.cpu_kernel import HostKernel
from embedding_store.ranks import Ranks
from embedding_store.specs import Optimizer, TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from tests.devices import ON
from tests.embedding_store.test_optimizers import OPTIMIZERS
from tests.processes import processes

DIM, IDS, STEPS = 8, 200, 30


def _specs(optimizer: Optimizer, capacity: int = 2 * IDS) -> list[TableSpec]:
    settings = TableSettings(dim=DIM, capacity=capacity, learning_rate=0.1, optimizer=optimizer)
    return [TableSpec(name, (name,), settings, {"n": ("<i8", ())}) for name in ("a", "b")]


def _learn(tables: EmbeddingTables, steps: range, commit: Callable[[], None] = lambda: None) -> None:
    """The same steps on every device and number of ranks; ids that nobody knows, 0 and repeated ones among them."""
    ranks = tables.ranks
    for seed in steps:
        rng = np.random.default_rng(seed)
        tables.begin_step()
        rows, gradients = {}, {}
        for name in tables.specs:
            ids = np.append(rng.integers(1, IDS, 20), 0)
            at = tables.rows(name, ids, admit=True)
            drawn = torch.from_numpy(rng.standard_normal((len(ids), DIM)).astype(np.float32))
            part = ranks.part(len(ids))
            rows[name], gradients[name] = (at[part], None), drawn[part]
            tables.touch(name, at)
        out = tables.embed(rows)
        assert all(e.device == tables._device for e in out.values())
        torch.autograd.backward(list(out.values()), [gradients[name].to(tables._device) for name in out])
        commit()


def _columns(tables: EmbeddingTables) -> dict[str, np.ndarray]:
    """Weights and states by table, of its rows by id."""
    found = {}
    for name, rows in tables.touched().items():
        found |= {f"{name}.{column}": values for column, values in rows.columns.items()}
        found[f"{name}.ids"] = rows.ids
    return found


def _on_one_rank(device: str, optimizer: Optimizer, path: Path) -> None:
    torch.set_num_threads(1)
    tables = EmbeddingTables(_specs(optimizer), device)
    assert dist.get_backend() == ("nccl" if device == "cuda" else "gloo")
    _learn(tables, range(STEPS))
    _save(_columns(tables), path)


def _save(columns: dict[str, np.ndarray], path: Path) -> None:
    save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, path)


def _alone(work: Callable[..., Any], *arguments: Any) -> None:
    """A process has one process group in its life: NCCL's or gloo's."""
    process = processes.Process(target=work, args=arguments)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0


def _assert_close(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert sorted(a) == sorted(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_learn_what_they_learn_on_the_host(device: str, optimizer: Optimizer, tmp_path: Path) -> None:
    """One rank, over NCCL on CUDA: the same rows, weights and states after thirty steps, to rounding."""
    for name, on in (("host.safetensors", "cpu"), ("there.safetensors", device)):
        _alone(_on_one_rank, on, optimizer, tmp_path / name)
    _assert_close(tmp_path / "host.safetensors", tmp_path / "there.safetensors")


def _rank(rank: int, meeting: Path, kind: str, path: Path) -> None:
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    tables = EmbeddingTables(_specs("row_wise_adagrad"), device, ranks=Ranks(rank, 2, meeting, device))
    assert dist.get_backend() == ("nccl" if kind == "cuda" else "gloo")
    _learn(tables, range(STEPS))
    found = _columns(tables)  # collective
    if rank == 0:
        _save(found, path)


@pytest.mark.parametrize("device", ON)
def test_two_ranks_learn_what_one_does_on_the_host(device: str, tmp_path: Path) -> None:
    """A GPU each, over NCCL; numbers and objects of the host go over gloo."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    _alone(_on_one_rank, "cpu", "row_wise_adagrad", tmp_path / "host.safetensors")
    arguments = (tmp_path / "meeting", device, tmp_path / "there.safetensors")
    ranks = [processes.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    _assert_close(tmp_path / "host.safetensors", tmp_path / "there.safetensors")


def _store(path: Path, optimizer: Optimizer) -> CheckpointStore:
    return CheckpointStore(path, {spec.name: spec.layout for spec in _specs(optimizer)})


def _commits(device: str, optimizer: Optimizer, path: Path) -> None:
    """In tables that are too small, so that rows leave for the store and come back."""
    with _store(path, optimizer) as store:
        tables = EmbeddingTables(_specs(optimizer, capacity=60), device, store)

        def commit() -> None:
            head = store.head()
            store.commit(Commit(1, head.sequence + 1 if head else 1, b"", rows=tables.touched(), gone=tables.gone()))
            tables.clear_touched()

        _learn(tables, range(STEPS), commit)
        assert not any(tables.dropped(name) for name in tables.specs)


def _opens(path: Path, optimizer: Optimizer) -> None:
    """On the host: the very numbers that the store has, and they go on learning."""
    with _store(path, optimizer) as store:
        tables = EmbeddingTables(_specs(optimizer), "cpu", store)
        tables.restore()
        for name in tables.specs:
            stored = next(store.iter_rows(name))
            rows = tables.rows(name, stored.ids, admit=False)
            assert (rows > 0).all()
            for column, values in tables.read_rows(name, rows).items():
                np.testing.assert_array_equal(values, stored.columns[column])
        _learn(tables, range(STEPS, STEPS + 3))


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_committed_there_opens_on_the_host(device: str, optimizer: Optimizer, tmp_path: Path) -> None:
    for on, name in (("cpu", "host"), (device, "there")):
        _alone(_commits, on, optimizer, tmp_path / name)
    with _store(tmp_path / "host", optimizer) as host, _store(tmp_path / "there", optimizer) as there:
        for name in ("a", "b"):
            one, other = next(host.iter_rows(name)), next(there.iter_rows(name))
            np.testing.assert_array_equal(one.ids, other.ids)
            for column, values in one.columns.items():
                np.testing.assert_allclose(other.columns[column], values, atol=2e-5, rtol=1e-5, err_msg=column)
    _alone(_opens, tmp_path / "there", optimizer)


def _under_autocast(device: str) -> None:
    tables = EmbeddingTables(_specs("row_wise_adagrad"), device)
    dense = torch.nn.Linear(DIM, 1, device=tables._device)
    at = tables.rows("a", np.arange(1, 30), admit=True)
    out = tables.embed({"a": (at, None)})["a"]
    with torch.autocast(device, torch.bfloat16):
        said = dense(out)
    assert said.dtype == torch.bfloat16
    said.float().sum().backward()
    learned = tables.read_rows("a", at)
    assert learned[WEIGHTS].dtype == learned[MOMENTUM].dtype == np.float32
    rounded = dense.weight.detach().to(torch.bfloat16).float().cpu().numpy()[0]
    expected = np.tile(-0.1 * rounded / np.sqrt(np.mean(rounded**2)), (29, 1))  # its first step
    np.testing.assert_allclose(learned[WEIGHTS], expected, rtol=1e-2)


@pytest.mark.parametrize("device", ON)
def test_under_bf16_autocast_rows_stay_float32(device: str) -> None:
    """The dense part computes in bfloat16, gradients come back to the tables as float32."""
    _alone(_under_autocast, device)


def _kernel(device: str) -> None:
    tables = EmbeddingTables(_specs("row_wise_adagrad"), device)
    (collection,) = tables._sharded._module.module.collections
    kernels = [kernel for lookup in collection._lookups for kernel in lookup._emb_modules]
    assert [isinstance(kernel, HostKernel) for kernel in kernels] == [device == "cpu"]


@pytest.mark.parametrize("device", ON)
def test_cuda_keeps_the_kernel_of_fbgemm(device: str) -> None:
    _alone(_kernel, device)
