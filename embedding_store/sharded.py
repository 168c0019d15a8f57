"""The embedding weights in TorchRec: row-wise sharded tables with a row-wise Adagrad fused into the backward pass.

Row-wise Adagrad keeps one sum of squared gradients a row (Gupta et al. 2014, arXiv 1405.1665; fbgemm's
EXACT_ROWWISE_ADAGRAD: the mean over the row's elements is added).
On the CPU the other shardings either have no fused optimizer or no kernel; on CUDA the same plan runs over NCCL.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding_store.errors import UsageError
from embedding_store.ranks import Ranks

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


class _Tables(torch.nn.Module):
    def __init__(self, collection: EmbeddingCollection) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, rows: KeyedJaggedTensor) -> Any:  # a lazy awaitable of feature → JaggedTensor
        return self.collection(rows)


class ShardedTables:
    """Forward and backward over row numbers, and the rows themselves: `weights` and `momentum` by table.

    These are the module's own storage: float32 [rows, dim] and [rows], all zero at first, writable in place. With
    several ranks each has its own rows there, and row numbers count on from rank to rank.
    """

    weights: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]

    def __init__(self, configs: Sequence[TableConfig], device: torch.device, ranks: Ranks) -> None:
        if len({config.dim for config in configs}) > 1:  # TorchRec's rule for one EmbeddingCollection
            raise UsageError("all tables must have the same `dim`: set it alike in their settings")
        self._device, self._ranks = device, ranks
        self._features = [feature for config in configs for feature in config.features]
        self._module = _shard(configs, device, ranks)
        self.weights, self.momentum = {}, {}
        for lookup in self._module.module.collection._lookups:
            for kernel in lookup._emb_modules:
                tbe = kernel.emb_module
                states = zip(tbe.split_embedding_weights(), tbe.split_optimizer_states(), strict=True)
                for config, (weights, state) in zip(kernel._config.embedding_tables, states, strict=True):
                    self.weights[config.name] = weights.detach().zero_()
                    self.momentum[config.name] = state[0].detach().zero_()
        missing = {c.name for c in configs} - set(self.weights)
        assert not missing, f"TorchRec made no fused kernel for {missing}"

    def __call__(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """feature → rows int64 [m] (all within the table: this is not checked) → embeddings float32 [m, dim].

        Features that are not given have no rows. The optimizer's step happens in `backward`.
        """
        none = torch.empty(0, dtype=torch.int64)
        values = [rows.get(feature, none) for feature in self._features]
        # A sequence look-up answers row by row, so how rows belong to examples is no concern of TorchRec's: each
        # feature is one bag. Features may so differ in their number of examples.
        lengths = torch.tensor([len(v) for v in values], dtype=torch.int32)
        keyed = KeyedJaggedTensor(self._features, torch.cat(values).to(self._device), lengths=lengths.to(self._device))
        with self._ranks.together():
            out = self._module(keyed)
            return {feature: out[feature].values() for feature in rows}


def _shard(configs: Sequence[TableConfig], device: torch.device, ranks: Ranks) -> DistributedModelParallel:
    set_gradient_division(False)  # losses are sums: gradients of several ranks add up
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
        parameters = collection.embeddings[config.name].parameters()
        options = {"lr": config.learning_rate, "eps": config.eps}
        _apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, parameters, options)
    # A faster CPU kernel goes in here: a sharder of our own whose look-ups create it (see docs/architecture.md).
    sharder = EmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        collection,
        {c.name: row_wise(compute_kernel="fused") for c in configs},  # the default plan may choose an unfused one
        sharder=sharder,
        local_size=ranks.size,
        world_size=ranks.size,
        device_type=device.type,
    )
    return DistributedModelParallel(
        _Tables(collection),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan(plan={"collection": plan}),
        sharders=[sharder],
    )
