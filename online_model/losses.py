"""What each head learns from a row, how much the row weighs, and the loss."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from online_model.examples import Examples, Part, Source
from online_model.feedback import Strategy
from online_model.ranker import CLICK, HEADS, PURCHASE, WATCH, WATCH_TIME
from online_model.watching import quantiles

LONG_VIEW = 0.5  # a play is a long view from this share of the duration on


def labels(rows: Examples, feedback: Strategy, plays: np.ndarray | None = None) -> np.ndarray:
    """Labels float32 [n, heads] of click, watch (a long view), the play's quantile, purchase and the strategy's own
    heads; nan where the row does not say.

    A watch of unknown duration says nothing of a long view. plays: the counts of watching.py, None where quantiles are
    not learned. Where purchases are learned from all impressions, each has its negative at first sight.
    """
    out = np.full((len(rows), len(HEADS) + len(feedback.extra)), np.nan, np.float32)
    out[:, CLICK] = np.where(rows.click >= 0, rows.click, np.nan)
    played = rows.play_ms >= 0
    watched = played & (rows.duration_ms > 0)
    out[watched, WATCH] = rows.play_ms[watched] >= LONG_VIEW * rows.duration_ms[watched]
    if plays is not None and played.any():
        out[played, WATCH_TIME] = quantiles(plays, rows.play_ms[played], rows.duration_ms[played])
    out[:, PURCHASE:] = feedback.labels(rows)
    if feedback.entire:
        impression = rows.source == Source.IMPRESSION
        out[impression & (rows.part == Part.SHOWN) & (rows.click == 0), PURCHASE] = 0
        out[impression & (rows.part == Part.LATE_CLICK), PURCHASE] = np.nan  # it had its negative when it was shown
    return out


def sampling_correction(rows: Examples, how: str, unclicked_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(weight, offset), float32 [n] each, that make up for unclicked impressions of which only a part is kept.

    Either the one or the other, never both. "loss": a row weighs as much as the 1 / rate rows that it stands for, and
    nothing is added. "logit": every row weighs 1, and what is added to the click's logit for the learning alone turns
    odds among all rows into odds among those kept. Of negatives a share r is kept and of positives all, so
    odds_kept = odds / r, logit_kept = logit − log r for both labels (King and Zeng 2001, "Logistic regression in rare
    events data", section 4.1; He et al. 2014, section 6.3). A click's row has rate 1, so its r is `unclicked_rate`,
    that of the unclicked rows around it. Without impressions nothing was sampled: weight 1, offset 0.
    """
    weight, offset = np.ones(len(rows), np.float32), np.zeros(len(rows), np.float32)
    impression = rows.source == Source.IMPRESSION
    if how == "loss":
        weight[impression] = 1 / rows.rate[impression]
    else:
        rate = np.where(rows.click == 1, np.float32(unclicked_rate), rows.rate)
        offset[impression] = -np.log(rate[impression])
    return weight, offset


def loss_sum(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sum over rows and heads of the binary cross entropy; all [N, H], nan in target is left out.

    The sum, not the mean: what a row of a table learns must not depend on how many others came with it.
    """
    said = ~torch.isnan(target)
    weight = torch.where(said, weight, 0.0)
    return binary_cross_entropy_with_logits(logits, torch.where(said, target, 0.0), weight, reduction="sum")


def retrieval_loss(
    logits: torch.Tensor, positive: torch.Tensor, sampled: torch.Tensor, items: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The weighted sum over P positives of the cross entropy of telling each from C items that are in the batch.

    logits: [P, C]; positive: int64 [P] their columns; sampled: [C] log of the probability that a draw gives the item,
    taken from its logit (logQ, Bengio and Senécal 2008; Yi et al., RecSys 2019, section 4); items: int64 [C] ids: what
    is the positive itself in another column is left out; weight: [P].
    """
    same = items.unsqueeze(0) == items.index_select(0, positive).unsqueeze(1)
    same.scatter_(1, positive.unsqueeze(1), False)
    corrected = (logits - sampled).masked_fill(same, -torch.inf)
    return (torch.nn.functional.cross_entropy(corrected, positive, reduction="none") * weight).sum()
