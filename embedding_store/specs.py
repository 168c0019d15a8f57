"""What a table is, for those who only name tables and must not wait for torch to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np

from embedding_store.columns import TOUCHED, layout

Optimizer: TypeAlias = Literal["row_wise_adagrad", "adagrad", "sgd"]  # see optimizers.py
Initialiser: TypeAlias = Literal["zero", "signs", "uniform", "normal"]


class RowRules(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which ids of a table get a row, how long they keep it, and which leave memory first (see docs/architecture.md).

    As it stands here every id gets one at once and keeps it.
    """

    admit_after: Annotated[int, msgspec.Meta(ge=1, le=255)] = 1  # sightings, counted in a sketch (admission.py)
    admit_cells: Annotated[int, msgspec.Meta(ge=64, le=1 << 28, multiple_of=64)] = 1 << 20  # of each of its 4 rows
    admit_half_life_ms: Annotated[int, msgspec.Meta(ge=1)] = 86_400_000  # of event time, in which its counts halve
    admit_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0  # or: the probability with which a sighting admits
    admit_seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    expire_after_ms: Annotated[int, msgspec.Meta(ge=0)] = 0  # of event time in which it was not learned; 0: never
    evict: Literal["lru", "lfu", "score"] = "lru"
    evict_half_life: Annotated[int, msgspec.Meta(ge=1)] = 1000  # steps in which a use counts half, of "score"

    def __post_init__(self) -> None:
        if self.admit_after > 1 and self.admit_share < 1:
            raise ValueError("ids are admitted by count or by chance: set admit_after or admit_share, not both")


class TableSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table: its size, its optimizer, and what new rows start from (initial.py)."""

    dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=4)] = 32
    capacity: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] = 1 << 18  # rows in memory; more live in the store
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 0.05
    eps: Annotated[float, msgspec.Meta(ge=1e-12)] = 1e-8  # not 0 in float32: row 0 is divided by it
    rules: RowRules = RowRules()
    optimizer: Optimizer = "row_wise_adagrad"  # sgd has no eps
    initialiser: Initialiser = "zero"
    init_scale: Annotated[float, msgspec.Meta(gt=0)] = 0.05  # ±scale of signs, bounds of uniform, deviation of normal
    init_seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0

    @property
    def momentum(self) -> tuple[int, ...] | None:
        """The shape of the optimizer's state of a row; None: it has none."""
        return {"row_wise_adagrad": (), "adagrad": (self.dim,), "sgd": None}[self.optimizer]


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
        return layout(self.settings.dim, self.columns, self.settings.momentum)

    @property
    def columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The extras and, where rows expire, when they were last learned (event time ms)."""
        return {**self.extras, **({TOUCHED: ("<i8", ())} if self.settings.rules.expire_after_ms else {})}
