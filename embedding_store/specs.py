"""What a table is, for those who only name tables and must not wait for torch to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np

from embedding_store.columns import layout


class TableSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table: its size and its optimizer (row-wise Adagrad)."""

    dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=4)] = 32
    capacity: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] = 1 << 18  # rows in memory; more live in the store
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 0.05
    eps: Annotated[float, msgspec.Meta(ge=1e-12)] = 1e-8  # not 0 in float32: row 0 is divided by it


@dataclass(frozen=True)
class TableSpec:
    """A table, the features that look rows up in it, and what else a row carries beside weights and momentum."""

    name: str
    features: tuple[str, ...]
    settings: TableSettings = field(default_factory=TableSettings)
    extras: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # name → (dtype, shape of a row's)

    @property
    def layout(self) -> np.dtype:
        """The structured dtype of a stored row, as `CheckpointStore` wants it."""
        return layout(self.settings.dim, self.extras)
