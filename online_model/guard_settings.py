"""What can be set about the guard (guard.py)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class GuardSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Versions whose recent figures are past these bounds are not published."""

    tasks: Annotated[
        list[Literal["click", "watch", "purchase"]], Meta(description="whose figures are looked at; none: no guard")
    ] = msgspec.field(default_factory=lambda: ["click"])
    examples: Annotated[
        int, Meta(ge=0, description="the last so many scores of a task, at most model.window; 0: all of the window")
    ] = 0
    max_ne: Annotated[float, Meta(gt=0, description="normalised entropy; 1: no better than the mean rate")] = 1.5
    min_calibration: Annotated[float, Meta(ge=0, description="predicted / actual positives")] = 0.2
    max_calibration: Annotated[float, Meta(gt=0)] = 5.0
    rollback: Annotated[
        bool, Meta(description="go back to a kept checkpoint, instead of holding versions back only")
    ] = False

    def __post_init__(self) -> None:
        if self.min_calibration >= self.max_calibration:
            raise ValueError("min_calibration must be below max_calibration")
