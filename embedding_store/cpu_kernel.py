"""A faster kernel for tables in host memory with plain row-wise Adagrad: TorchRec's and fbgemm's, but for two loops.

Tables, state_dict, optimizer state and `fused_optimizer` stay fbgemm's: only `forward` is another, with its backward.
All else (other optimizers, other dtypes, CUDA) keeps fbgemm's kernel. TorchRec makes its kernels in the depth, so four
of its classes have an heir here that differs in what it makes:
sharder → sharded collection → row-wise sharding → look-up → kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding_store import rowwise

# What TorchRec may have been told of the optimizer: whatever else there is would change the step.
_PLAIN = {"optimizer", "learning_rate", "eps", "cache_precision", "enable_raw_embedding_streaming"}


class HostKernel(BatchedFusedEmbedding):
    """fbgemm's tables on the host, read and updated by `rowwise`. Row 0 of each is the default row: it learns nothing.

    Bit-identical from run to run, on any number of threads.
    """

    def look_up(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """feature → rows int64 [m] of this rank → embeddings float32 [m, dim].

        `backward` updates: one step a table with the gradients of all of its features, where they come in one pass.
        Raises IndexError on a row outside of the table.
        """
        out: dict[str, torch.Tensor] = {}
        for table, features in self._host_tables:
            given = [feature for feature in features if feature in rows]
            if given:
                found = _LookUp.apply(self._anchor, self, table, *(rows[feature] for feature in given))
                out.update(zip(given, found, strict=True))
        return out

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """As fbgemm: rows of all features of the kernel, one after the other → float32 [all rows, dim]."""
        names, ends = [name for _, own in self._host_tables for name in own], features.offset_per_key()
        rows = {n: features.values()[a:b].long() for n, a, b in zip(names, ends[:-1], ends[1:], strict=True)}
        found = self.look_up(rows)
        return torch.cat([found[name] for name in names])

    def step(self, table: _HostTable, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        rate, eps = self.emb_module.get_learning_rate(), self.emb_module.optimizer_args.eps
        rowwise.step(
            table.weights.numpy(), table.state.numpy(), rows.numpy(), gradients.contiguous().numpy(), table.place,
            np.float32(rate), np.float32(eps),
        )  # fmt: skip

    @cached_property
    def _host_tables(self) -> list[tuple[_HostTable, list[str]]]:
        """Each table with its features, in TorchRec's order."""
        tbe = self.emb_module
        every = zip(
            self._config.embedding_tables, tbe.split_embedding_weights(), tbe.split_optimizer_states(), strict=True
        )
        return [(_HostTable(w.detach(), state.detach()), c.embedding_names) for c, w, (state, *_) in every]

    @cached_property
    def _anchor(self) -> torch.Tensor:
        """What makes autograd come to `_LookUp`: the tables themselves are no leaves of it."""
        return torch.empty(0, requires_grad=True)


class _HostTable:
    """fbgemm's own storage: weights float32 [R, D], state float32 [R]; `place`: see `rowwise`."""

    def __init__(self, weights: torch.Tensor, state: torch.Tensor) -> None:
        self.weights, self.state = weights, state
        self.place = np.full(len(weights), rowwise.FREE, np.int32)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, kernel: HostKernel, table: _HostTable, *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.kernel, ctx.table, ctx.counts = kernel, table, [len(r) for r in rows]
        ctx.rows = torch.cat(rows)  # a copy: the caller's may change before `backward`, which checks no bounds
        ctx.set_materialize_grads(False)
        return tuple(table.weights.index_select(0, r) for r in rows)  # raises on what is out of bounds

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        rows, given = ctx.rows, [g for g in gradients if g is not None]
        if len(given) < len(gradients):
            parts = zip(rows.split(ctx.counts), gradients, strict=True)
            rows = torch.cat([rows[:0], *(r for r, g in parts if g is not None)])
        if len(rows):
            ctx.kernel.step(ctx.table, rows, given[0] if len(given) == 1 else torch.cat(given))
        return (None,) * (3 + len(gradients))


def fits(config: GroupedEmbeddingConfig, device: torch.device | None) -> bool:
    """Whether tables of this group are in host memory, float32, and learn by plain row-wise Adagrad."""
    options = config.fused_params or {}
    return (
        (device is None or device.type == "cpu")
        and config.data_type == DataType.FP32
        and config.compute_kernel == EmbeddingComputeKernel.FUSED
        and options.get("optimizer") == EmbOptimType.EXACT_ROWWISE_ADAGRAD
        and options.keys() <= _PLAIN
        and all(table.local_cols % 4 == 0 for table in config.embedding_tables)
    )


class _LookUps(GroupedEmbeddingsLookup):
    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, pg: Any, device: torch.device | None, env: Any = None
    ) -> Any:
        if fits(config, device):
            return HostKernel(config=config, pg=pg, device=device)
        return super()._create_embedding_kernel(config, pg, device, env)


class _RowWise(RwSequenceEmbeddingSharding):
    def create_lookup(self, device: Any = None, fused_params: Any = None, feature_processor: Any = None) -> _LookUps:
        device = self._device if device is None else device
        return _LookUps(grouped_configs=self._grouped_embedding_configs, pg=self._pg, device=device, env=self._env)


class _Collection(ShardedEmbeddingCollection):
    @classmethod
    def create_embedding_sharding(
        cls, sharding_type: str, sharding_infos: Any, env: Any, device: Any = None, qcomm_codecs_registry: Any = None
    ) -> Any:
        if sharding_type != ShardingType.ROW_WISE.value:
            return super().create_embedding_sharding(
                sharding_type, sharding_infos, env, device, qcomm_codecs_registry
            )
        return _RowWise(
            sharding_infos=sharding_infos, env=env, device=device, qcomm_codecs_registry=qcomm_codecs_registry
        )


class HostSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder, with `HostKernel` where that fits and fbgemm's kernels elsewhere."""

    def shard(
        self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: str | None = None
    ) -> ShardedEmbeddingCollection:
        return _Collection(
            module, params, env, self.fused_params, device, qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup, module_fqn=module_fqn,
        )  # fmt: skip
