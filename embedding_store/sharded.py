"""The embedding weights in TorchRec: row-wise sharded tables, their optimizers fused into the backward pass.

On the CPU the other shardings either have no fused optimizer or no kernel; on CUDA the same plan runs over NCCL. What
differs by device: on the host plain row-wise Adagrad has a kernel of ours (cpu_kernel.py), and one rank asks it at
once, without TorchRec's distribution over ranks, which costs as much as the look-up.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding_store.cpu_kernel import HostKernel, HostSharder
from embedding_store.optimizers import fuse
from embedding_store.ranks import Ranks
from embedding_store.specs import Optimizer

logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # a deprecation inside torchrec, on stderr


@dataclass(frozen=True)
class TableConfig:
    """What TorchRec must know of a table. `rows` are those of one rank, and include its row 0."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    learning_rate: float
    eps: float
    optimizer: Optimizer


class _Tables(torch.nn.Module):
    """A collection for each dimension: the tables of one must have the same."""

    def __init__(self, collections: Sequence[EmbeddingCollection]) -> None:
        super().__init__()
        self.collections = torch.nn.ModuleList(collections)

    def forward(self, rows: Sequence[KeyedJaggedTensor]) -> list[Any]:  # lazy awaitables of feature → JaggedTensor
        return [collection(own) for collection, own in zip(self.collections, rows, strict=True)]


class ShardedTables:
    """Forward and backward over row numbers, and the rows themselves: `weights` and `momentum` by table.

    These are the module's own storage: float32 [rows, dim], and [rows] or [rows, dim] as the optimizer has it (nothing
    for one without a state); all zero at first, writable in place. With several ranks each has its own rows there, and
    row numbers count on from rank to rank.
    """

    weights: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]

    def __init__(self, configs: Sequence[TableConfig], device: torch.device, ranks: Ranks) -> None:
        self._device, self._ranks = device, ranks
        of_dim = {dim: [config for config in configs if config.dim == dim] for dim in {c.dim: None for c in configs}}
        self._features = [[feature for config in own for feature in config.features] for own in of_dim.values()]
        with ranks.together():  # TorchRec asks the other ranks
            self._module = _shard(list(of_dim.values()), device, ranks)
        self.weights, self.momentum = {}, {}
        self._near: dict[str, HostKernel] = {}  # feature → the kernel that is asked without TorchRec
        fast = {c.name for c in configs if device.type == "cpu" and c.optimizer == "row_wise_adagrad"}
        lookups = (lookup for collection in self._module.module.collections for lookup in collection._lookups)
        for kernel in (kernel for lookup in lookups for kernel in lookup._emb_modules):
            tbe, tables = kernel.emb_module, [config.name for config in kernel._config.embedding_tables]
            for table, weights in zip(tables, tbe.split_embedding_weights(), strict=True):
                self.weights[table] = weights.detach().zero_()
            if states := tbe.split_optimizer_states():  # empty where the optimizer has none
                for table, (state, *_) in zip(tables, states, strict=True):
                    self.momentum[table] = state.detach().zero_()
            if isinstance(kernel, HostKernel):
                fast -= set(tables)
                if ranks.size == 1:
                    self._near |= dict.fromkeys(kernel._config.embedding_names(), kernel)
        assert not fast, f"no kernel of ours for {fast}: TorchRec makes its kernels in another way"
        missing = {c.name for c in configs} - set(self.weights)
        assert not missing, f"TorchRec made no fused kernel for {missing}"

    def __call__(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """feature → rows int64 [m] (all within the table: this is not checked) → embeddings float32 [m, dim].

        Features that are not given have no rows. The optimizer's step happens in `backward`.
        """
        out: dict[str, torch.Tensor] = {}
        for kernel in dict.fromkeys(self._near[feature] for feature in rows if feature in self._near):
            out |= kernel.look_up({f: r for f, r in rows.items() if self._near.get(f) is kernel})
        if len(out) < len(rows):
            out |= self._through_torchrec({f: r for f, r in rows.items() if f not in self._near})
        return {feature: out[feature] for feature in rows}

    def _through_torchrec(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self._ranks.together():
            answers = self._module([self._keyed(own, rows) for own in self._features])
            of_feature = {feature: a for own, a in zip(self._features, answers, strict=True) for feature in own}
            return {feature: of_feature[feature][feature].values() for feature in rows}

    def _keyed(self, features: list[str], rows: dict[str, torch.Tensor]) -> KeyedJaggedTensor:
        none = torch.empty(0, dtype=torch.int64)
        values = [rows.get(feature, none) for feature in features]
        # A sequence look-up answers row by row, so how rows belong to examples is no concern of TorchRec's: each
        # feature is one bag. Features may so differ in their number of examples.
        lengths = torch.tensor([len(v) for v in values], dtype=torch.int32)
        return KeyedJaggedTensor(features, torch.cat(values).to(self._device), lengths=lengths.to(self._device))


def _shard(
    groups: Sequence[Sequence[TableConfig]], device: torch.device, ranks: Ranks
) -> DistributedModelParallel:
    """`groups`: the tables of each collection."""
    set_gradient_division(False)  # losses are sums: gradients of several ranks add up
    sharder = HostSharder()
    collections = [_collection(configs, ranks) for configs in groups]
    plans = {
        f"collections.{number}": construct_module_sharding_plan(
            collection,
            {c.name: row_wise(compute_kernel="fused") for c in configs},  # the default plan may choose an unfused one
            sharder=sharder,
            local_size=ranks.local_size,
            world_size=ranks.size,
            device_type=device.type,
        )
        for number, (configs, collection) in enumerate(zip(groups, collections, strict=True))
    }
    return DistributedModelParallel(
        _Tables(collections),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan(plan=plans),
        sharders=[sharder],
    )


def _collection(configs: Sequence[TableConfig], ranks: Ranks) -> EmbeddingCollection:
    collection = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                num_embeddings=ranks.size * c.rows, embedding_dim=c.dim, name=c.name, feature_names=list(c.features)
            )
            for c in configs
        ],
    )
    for config in configs:
        fuse(config.optimizer, collection.embeddings[config.name].parameters(), config.learning_rate, config.eps)
    return collection
