"""Tables in TorchRec as it comes: row-wise sharded over one rank, fbgemm's kernel, the optimizer fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from embedding_store.optimizers import fuse
from embedding_store.ranks import Ranks


class BareTables:
    """Tables of rows of zeros, row-wise Adagrad. Called with a KeyedJaggedTensor, as TorchRec's own."""

    def __init__(self, features: Mapping[str, Sequence[str]], rows: int | Mapping[str, int], dim: int,
                 rates: float | Mapping[str, float], eps: float) -> None:  # fmt: skip
        """features: table → what looks up there; rows, rates: of each table, or one for all."""
        Ranks()  # TorchRec wants a process group
        self.features = [feature for own in features.values() for feature in own]
        configs = [
            EmbeddingConfig(
                num_embeddings=rows if isinstance(rows, int) else rows[table], embedding_dim=dim, name=table,
                feature_names=list(own),
            )
            for table, own in features.items()
        ]  # fmt: skip
        collection = EmbeddingCollection(device=torch.device("meta"), tables=configs)
        for table, embedding in collection.embeddings.items():
            rate = rates if isinstance(rates, float) else rates[table]
            fuse("row_wise_adagrad", embedding.parameters(), rate, eps)
        sharder: Any = EmbeddingCollectionSharder()
        plan = construct_module_sharding_plan(
            collection, {table: row_wise(compute_kernel="fused") for table in features}, sharder=sharder,
            local_size=1, world_size=1, device_type="cpu",
        )  # fmt: skip
        self._tables = DistributedModelParallel(
            collection, env=ShardingEnv.from_process_group(dist.group.WORLD), device=torch.device("cpu"),
            plan=ShardingPlan(plan={"": plan}), sharders=[sharder],
        )  # fmt: skip
        self.weights: dict[str, torch.Tensor] = {}  # float32 [rows, dim], live
        for kernel in (kernel for lookup in self._tables.module._lookups for kernel in lookup._emb_modules):
            names = [config.name for config in kernel._config.embedding_tables]
            self.weights |= zip(names, kernel.emb_module.split_embedding_weights(), strict=True)
        for weights in self.weights.values():
            weights.detach().zero_()

    def __call__(self, rows: Any) -> Any:
        """KeyedJaggedTensor of row numbers → feature → JaggedTensor of embeddings."""
        return self._tables(rows)
