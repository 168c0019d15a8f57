"""Delayed feedback: what the purchase head learns while purchases are still to come, and what is then served.

A purchase comes up to three days after its click. To wait for all of them makes the model three days old; to learn "not
bought" at once makes most labels wrong for a while (fake negatives). Which strategy is right depends on what the joiner
does with a click (`[join] purchase_wait_ms`); all rows of an example share its `example_id`, each has its own `row_id`,
so each is learned once.

| strategy | the joiner's wait | learns from | serves |
|---|---|---|---|
| none | the purchase window: labels are final | bought or not | b |
| none | 0, for comparison only | fake negatives, uncorrected | b, too low |
| calibrated | 0 | the click as a negative, then the purchase as a positive | b / (1 − b) |
| weighted | 0 | the same rows, weighed by importance | b |
| elapsed | some time in between | a negative at the wait's end, a late purchase as a positive; weighed | b |

The click head is not corrected: it waits `wait_ms` for a click, which nearly all clicks come within, and a late one is
learned as a further positive; what is left is the share of late clicks times the click rate, far below its noise.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from online_model.examples import Examples, Part
from online_model.ranker import PURCHASE


class Strategy(Protocol):
    """How purchases are learned. Columns are those of the purchase head and of the E heads `extra` behind it.

    `extra`: heads that serve the learning alone; nobody is shown what they say.
    """

    extra: tuple[str, ...]
    entire: bool  # whether purchases are learned from all impressions, see `over_impressions`

    def over_impressions(self, log_p: torch.Tensor) -> torch.Tensor:
        """What learns where `entire`: the logit whose label is the row's, of the log of a purchase's probability among
        all impressions, click × purchase after it (ESMM: Ma et al., SIGIR 2018, section 2.3), [n]."""

    def labels(self, rows: Examples) -> np.ndarray:
        """Labels float32 [n, 1 + E]; nan where the row teaches a head nothing."""

    def weights(self, label: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Weights of the losses, given labels and the model's own probabilities (no gradient), all [n, 1 + E]."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What the logits [n, 1 + E] stand for, [n, 1 + E]: the same in trainer and replica."""


class Uncorrected:
    """The rows as they are. Right where labels are final, too low by the factor 1 / (1 + p) where they are not."""

    extra: tuple[str, ...] = ()

    def __init__(self, entire: bool = False) -> None:
        self.entire = entire

    def over_impressions(self, log_p: torch.Tensor) -> torch.Tensor:
        return log_p - torch.log1p(-torch.exp(log_p).clamp(max=1 - 1e-6))

    def labels(self, rows: Examples) -> np.ndarray:
        return np.where(rows.purchase >= 0, rows.purchase, np.nan).astype(np.float32)[:, None]

    def weights(self, label: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(p)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits)


class Calibrated(Uncorrected):
    """Fake negative calibration: Ktena et al., "Addressing delayed feedback for continuous training with neural
    networks in CTR prediction", RecSys 2019, arXiv 1907.06558, section 3.3.

    Of a click with probability p of a purchase there are 1 negative and p positives, so the head learns
    b = p / (1 + p), whose odds b / (1 − b) = e^logit are p.

    Over all impressions there is 1 negative for each and p more positives, so the same holds there: the logit of the
    row's label is log p. The head's own logit is then an ordinary one, of the purchase after a click.
    """

    def over_impressions(self, log_p: torch.Tensor) -> torch.Tensor:
        return log_p

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits) if self.entire else torch.exp(logits.clamp(max=0.0))


class Weighted(Uncorrected):
    """Fake negative weighted loss: the same paper, section 3.2, equations 7 and 8.

    The weight of a row is the true share of its label over its share among the rows: p / b = 1 + p for a positive,
    (1 − p) / (1 − b) = (1 − p)(1 + p) for a negative, with the head's own f for p. Where q is the true probability
    the expected gradient of the logit is (1 + f)(1 − f)(f − q): zero at f = q, and nowhere between but there.
    """

    def weights(self, label: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return (1 + p) * torch.where(label == 1, 1.0, 1 - p)


class Elapsed(Uncorrected):
    """Elapsed-time sampling (ES-DFM): Yang et al., "Capturing delayed feedback in conversion rate prediction via
    elapsed-time sampling", AAAI 2021, arXiv 2012.03245, section 4.

    Of a click with probability q of a purchase, i of one within the wait, l = q − i of a later one, there are i + l = q
    positives and 1 − i = 1 − q + l negatives: 1 + l rows. The weight is the true share of a label over its share among
    these: (1 + l) for a positive, (1 + l)(1 − q) / (1 − q + l) = (1 + l)(1 − d) for a negative, where
    d = l / (1 − i) is the share of those not bought in time that are bought later (1 − d is the paper's p_rn, l its
    p_dp). The expected gradient of the logit at f is then (1 + l)(f − q): zero at f = q.

    The paper learns p_rn and p_dp beforehand, on a log old enough to be final. Here two heads learn them on the stream:

    - in_time: i. NOT_BOUGHT is a 0, a purchase within the wait a 1: final both.
    - delayed: d. NOT_BOUGHT is a 0 and the late purchase a further 1: of those not bought in time there are 1 negative
      and d positives, so the odds of this head are d, as in Calibrated. No row has to say that a window has closed.

    l = (1 − i) d follows. Both heads are read, without a gradient, from before the step.
    """

    extra: tuple[str, ...] = ("in_time", "delayed")

    def __init__(self, purchase_wait_ms: int) -> None:
        super().__init__()
        self._wait_ms = purchase_wait_ms

    def labels(self, rows: Examples) -> np.ndarray:
        bought, not_bought = rows.part == Part.PURCHASE, rows.part == Part.NOT_BOUGHT
        late = bought & (rows.delay_ms > self._wait_ms)
        in_time = np.select([not_bought, bought & ~late], [0.0, 1.0], np.nan)
        delayed = np.select([not_bought, late], [0.0, 1.0], np.nan)
        return np.column_stack((super().labels(rows), in_time, delayed)).astype(np.float32)

    def weights(self, label: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        out = torch.ones_like(p)
        in_time, delayed = p[:, 1], p[:, 2]
        out[:, 0] = (1 + (1 - in_time) * delayed) * torch.where(label[:, 0] == 1, 1.0, 1 - delayed)
        return out

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        out = torch.sigmoid(logits)
        out[:, 2] = torch.exp(logits[:, 2].clamp(max=0.0))
        return out


def strategy(feedback: str, purchase_wait_ms: int = 0, entire: bool = False) -> Strategy:
    """The strategy of this name (online_model.settings.Feedback). `elapsed` learns from clicks alone in any case: what
    it knows of delays is known of clicks."""
    if feedback == "elapsed":
        return Elapsed(purchase_wait_ms)
    return {"none": Uncorrected, "calibrated": Calibrated, "weighted": Weighted}[feedback](entire)


def probabilities(logits: torch.Tensor, how: Strategy) -> torch.Tensor:
    """Logits [N, heads] → probabilities as served: click, long view if played, quantile of the play, purchase if
    clicked; then `extra`."""
    out = torch.sigmoid(logits)
    out[:, PURCHASE:] = how.probabilities(logits[:, PURCHASE:])
    return out
