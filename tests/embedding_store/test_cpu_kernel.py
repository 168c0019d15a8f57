"""Our kernel for tables on the host does what fbgemm's does, faster, and hangs on nothing but a row's own gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding_store import rowwise
from embedding_store.columns import MOMENTUM, WEIGHTS
from embedding_store.cpu_kernel import HostKernel
from embedding_store.optimizers import fuse
from embedding_store.ranks import Ranks
from embedding_store.sharded import ShardedTables, TableConfig
from embedding_store.specs import TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from tests.embedding_store.test_ranks import on_ranks

RATE, EPS, DIM, ROWS = 0.1, 1e-8, 8, 500
CPU = torch.device("cpu")
STEPS = 50


def _plain(
    weights: np.ndarray, state: np.ndarray, rows: np.ndarray, gradients: np.ndarray, rate: float, eps: float
) -> None:
    """The reference of `rowwise.step`, in float32 and in its order."""
    f = np.float32
    for row in dict.fromkeys(rows[rows != 0].tolist()):
        g = np.add.accumulate(gradients[rows == row], axis=0)[-1]
        a, b, c, d = (np.add.accumulate(g[lane::4] * g[lane::4])[-1] for lane in range(4))
        state[row] += ((a + b) + (c + d)) * (f(1) / f(len(g)))
        weights[row] += -f(rate) / (np.sqrt(state[row]) + f(eps)) * g


def _drawn(dim: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, dim)).astype(np.float32), rng.random(rows).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([4, 8, 12, 32]),
    st.lists(st.lists(st.integers(0, 20), max_size=40), min_size=1, max_size=4),
    st.sampled_from([1e-8, 1.0]),
    st.integers(0, 1000),
)
def test_any_steps_are_those_of_the_plain_reference(dim: int, batches: list, eps: float, seed: int) -> None:
    (weights, state), (plain, moment) = _drawn(dim, 21, seed), _drawn(dim, 21, seed)
    place = np.full(21, rowwise.FREE, np.int32)
    rng = np.random.default_rng(seed)
    for batch in batches:
        rows = np.array(batch, np.int64)
        gradients = rng.standard_normal((len(rows), dim)).astype(np.float32)
        rowwise.step(weights, state, rows, gradients, place, np.float32(RATE), np.float32(eps))
        _plain(plain, moment, rows, gradients, RATE, eps)
        assert (place == rowwise.FREE).all()
    np.testing.assert_array_equal(weights, plain)
    np.testing.assert_array_equal(state, moment)


def _config(name: str, features: tuple[str, ...], optimizer: str = "row_wise_adagrad", dim: int = DIM) -> TableConfig:
    return TableConfig(name, ROWS, dim, features, RATE, EPS, optimizer)  # type: ignore[arg-type]


TABLES = [_config("a", ("x", "y")), _config("b", ("z",)), _config("c", ("w",), dim=16)]  # two kernels, two collections
OF = {feature: config for config in TABLES for feature in config.features}


def _batch(seed: int, ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(rows, gradients) of one rank's part: rows of all ranks, none of them a rank's row 0."""
    rng = np.random.default_rng([seed, ranks.rank])
    rows, gradients = {}, {}
    for feature, config in OF.items():
        drawn = rng.integers(1, 100, 60) + ROWS * rng.integers(0, ranks.size, 60)
        rows[feature] = torch.from_numpy(drawn)
        gradients[feature] = torch.from_numpy(rng.standard_normal((60, config.dim)).astype(np.float32))
    return rows, gradients


def _learned(tables: ShardedTables, ranks: Ranks, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights, states and the last answers after some steps."""
    out: dict[str, torch.Tensor] = {}
    for seed in range(steps):
        rows, gradients = _batch(seed, ranks)
        out = tables(rows)
        torch.autograd.backward(list(out.values()), [gradients[feature] for feature in out])
    found = {f"{table} weights": w for table, w in tables.weights.items()}
    found |= {f"{table} state": state for table, state in tables.momentum.items()}
    return {name: tensor.clone() for name, tensor in found.items()} | {f: e.detach().clone() for f, e in out.items()}


class _Stock:
    """The same tables in TorchRec and fbgemm as they come."""

    def __init__(self, ranks: Ranks) -> None:
        self.modules = {dim: self._sharded([c for c in TABLES if c.dim == dim], ranks) for dim in (DIM, 16)}
        self.weights: dict[str, torch.Tensor] = {}
        self.momentum: dict[str, torch.Tensor] = {}
        for dmp in self.modules.values():
            for kernel in (kernel for lookup in dmp.module._lookups for kernel in lookup._emb_modules):
                assert not isinstance(kernel, HostKernel)
                tbe = kernel.emb_module
                views = zip(tbe.split_embedding_weights(), tbe.split_optimizer_states(), strict=True)
                for config, (w, (s, *_)) in zip(kernel._config.embedding_tables, views, strict=True):
                    self.weights[config.name], self.momentum[config.name] = w.detach().zero_(), s.detach().zero_()

    @staticmethod
    def _sharded(configs: list[TableConfig], ranks: Ranks) -> DistributedModelParallel:
        collection = EmbeddingCollection(
            device=torch.device("meta"),
            tables=[EmbeddingConfig(num_embeddings=ranks.size * c.rows, embedding_dim=c.dim, name=c.name,
                                    feature_names=list(c.features)) for c in configs],
        )  # fmt: skip
        for c in configs:
            fuse(c.optimizer, collection.embeddings[c.name].parameters(), c.learning_rate, c.eps)
        sharder = EmbeddingCollectionSharder()
        plan = construct_module_sharding_plan(
            collection, {c.name: row_wise(compute_kernel="fused") for c in configs}, sharder=sharder,
            local_size=ranks.size, world_size=ranks.size, device_type="cpu",
        )  # fmt: skip
        return DistributedModelParallel(
            collection, env=ShardingEnv.from_process_group(dist.group.WORLD), device=CPU,
            plan=ShardingPlan(plan={"": plan}), sharders=[sharder],
        )  # fmt: skip

    def __call__(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for dim, dmp in self.modules.items():
            own = {feature: r for feature, r in rows.items() if OF[feature].dim == dim}
            lengths = torch.tensor([len(r) for r in own.values()], dtype=torch.int32)
            answers = dmp(KeyedJaggedTensor(list(own), torch.cat(list(own.values())), lengths=lengths))
            out |= {feature: answers[feature].values() for feature in own}
        return out


def _as_fbgemm(ranks: Ranks) -> None:
    ours = _learned(ShardedTables(TABLES, CPU, ranks), ranks)
    stock = _learned(_Stock(ranks), ranks)  # type: ignore[arg-type]
    assert ours.keys() == stock.keys()
    assert all(tensor.any() for tensor in ours.values())
    for name, tensor in ours.items():
        if name.endswith("state"):  # sums of squares grow: so far in relation
            torch.testing.assert_close(tensor, stock[name], rtol=2e-6, atol=0, msg=name)
        else:
            assert (tensor - stock[name]).abs().max() <= 4e-7, name


@pytest.mark.parametrize("size", [1, 2])
def test_fifty_steps_are_those_of_fbgemm(size: int, tmp_path: Path) -> None:
    """Two features of one table, tables that share a kernel, two dimensions; on two ranks each with its part."""
    assert on_ranks(size, tmp_path / "meeting", _as_fbgemm) == [0] * size


def _kernels(tables: ShardedTables) -> list:
    return [k for c in tables._module.module.collections for lookup in c._lookups for k in lookup._emb_modules]


def test_only_row_wise_adagrad_has_the_kernel_and_nothing_else_is_another(one_thread: None) -> None:
    others = [_config("d", ("d",), "sgd"), _config("e", ("e",), "adagrad")]
    tables = ShardedTables([*TABLES, *others], CPU, Ranks())
    ours = {c.name: isinstance(k, HostKernel) for k in _kernels(tables) for c in k._config.embedding_tables}
    assert ours == {"a": True, "b": True, "c": True, "d": False, "e": False}
    keys = {key.removeprefix("collections.0.").removeprefix("collections.1.") for key in tables._module.state_dict()}
    assert keys == {f"embeddings.{name}.weight" for name in "abcde"}
    optimizer = tables._module.fused_optimizer.state_dict()["state"]
    assert any("c.momentum1" in key for states in optimizer.values() for key in states)


def test_the_state_dict_is_the_storage_that_is_learned(one_thread: None) -> None:
    tables = ShardedTables(TABLES, CPU, Ranks())
    _learned(tables, Ranks(), 2)
    shards = {key.split(".")[-2]: value for key, value in tables._module.state_dict().items()}
    for name, weights in tables.weights.items():
        (shard,) = shards[name].local_shards()
        assert shard.tensor.data_ptr() == weights.data_ptr()
        torch.testing.assert_close(shard.tensor, weights, rtol=0, atol=0)


def _learn(numbers: np.ndarray, threads: int = 1) -> dict[str, torch.Tensor]:
    """Weights and states by row number of the plain order, learned in rows numbered otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ranks = Ranks()
    tables = ShardedTables(TABLES, CPU, ranks)
    for seed in range(20):
        rows, gradients = _batch(seed, ranks)
        out = tables({feature: torch.from_numpy(numbers)[r] for feature, r in rows.items()})
        torch.autograd.backward(list(out.values()), [gradients[feature] for feature in out])
    torch.set_num_threads(before)
    at = torch.from_numpy(numbers)
    return {f"{kind} {t}": v[at] for kind in ("weights", "momentum") for t, v in getattr(tables, kind).items()}


def test_other_row_numbers_and_threads_give_the_same_bits() -> None:
    """A run that was restored puts its ids elsewhere: it must go on as if it had never stopped."""
    identity = np.arange(ROWS)
    elsewhere = np.append(0, 1 + np.random.default_rng(7).permutation(ROWS - 1))
    expected = _learn(identity)
    for other in (_learn(identity), _learn(elsewhere), _learn(identity, threads=2)):
        for name, tensor in expected.items():
            assert torch.equal(tensor, other[name]), name


def test_a_feature_without_a_gradient_learns_nothing(one_thread: None) -> None:
    tables = ShardedTables(TABLES, CPU, Ranks())
    out = tables({"x": torch.tensor([1, 2]), "y": torch.tensor([3]), "z": torch.tensor([4])})
    out["y"].sum().backward()
    assert tables.weights["a"].any(1).nonzero().ravel().tolist() == [3]
    assert not tables.weights["b"].any()


def test_rows_that_the_caller_changes_after_the_look_up_change_nothing(one_thread: None) -> None:
    tables = EmbeddingTables([TableSpec("t", ("t",), TableSettings(dim=4, capacity=5))])
    rows = np.array([1, 2])
    out = tables.embed({"t": (rows, None)})["t"]
    rows[:] = 1 << 40
    out.sum().backward()
    assert tables.column("t", WEIGHTS)[1:3].all()
    assert tables.column("t", MOMENTUM)[1:3].all()


@pytest.mark.parametrize("row", [-1, ROWS, 1 << 40])
def test_a_row_outside_of_the_table_is_refused_and_no_other_table_is_written(row: int, one_thread: None) -> None:
    tables = ShardedTables(TABLES, CPU, Ranks())
    with pytest.raises((IndexError, RuntimeError)):
        tables({"z": torch.tensor([1, row])})
    assert not any(weights.any() for weights in tables.weights.values())


def test_without_gradients_nothing_is_remembered(one_thread: None) -> None:
    tables = ShardedTables(TABLES, CPU, Ranks())
    with torch.no_grad():
        out = tables({"x": torch.tensor([1, 1, 0])})
    assert not out["x"].requires_grad
    assert out["x"].shape == (3, DIM)
