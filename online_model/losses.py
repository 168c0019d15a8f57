"""What each head learns from a row, and the loss."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from online_model.examples import Examples
from online_model.ranker import CLICK, HEADS, PURCHASE, WATCH

LONG_VIEW = 0.5  # a play is a long view from this share of the duration on


def labels(rows: Examples) -> np.ndarray:
    """Labels float32 [n, 3] of click, watch (a long view) and purchase; nan where the row does not say.

    A watch of unknown duration says nothing.
    """
    out = np.full((len(rows), len(HEADS)), np.nan, np.float32)
    out[:, CLICK] = np.where(rows.click >= 0, rows.click, np.nan)
    watched = (rows.play_ms >= 0) & (rows.duration_ms > 0)
    out[watched, WATCH] = rows.play_ms[watched] >= LONG_VIEW * rows.duration_ms[watched]
    out[:, PURCHASE] = np.where(rows.purchase >= 0, rows.purchase, np.nan)
    return out


def loss_sum(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over rows and heads of the binary cross entropy; logits, target: [N, 3], nan in target is left out.

    The sum, not the mean: what a row of a table learns must not depend on how many others came with it.
    """
    said = ~torch.isnan(target)
    return binary_cross_entropy_with_logits(logits, torch.where(said, target, 0.0), said.float(), reduction="sum")
