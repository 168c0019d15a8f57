"""The optimizers that a table may have (`TableSettings.optimizer`), as fbgemm fuses them into the backward pass.

g is the sum of a row's gradients in the batch, m its state (column MOMENTUM, zero for a new row):

| optimizer | state of a row | step |
|---|---|---|
| row_wise_adagrad | one number | m += mean(g²), w −= rate · g / (√m + eps) (Gupta et al. 2014, arXiv 1405.1665) |
| adagrad | one number an element | m += g², w −= rate · g / (√m + eps) (Duchi et al., JMLR 2011) |
| sgd | none | w −= rate · g |

On the CPU fbgemm has no fused Adam, LAMB or partial row-wise Adam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward

from embedding_store.specs import Optimizer

_FUSED: dict[Optimizer, type[torch.optim.Optimizer]] = {
    "row_wise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torchrec.optim.Adagrad,
    "sgd": torchrec.optim.SGD,
}


def fuse(optimizer: Optimizer, parameters: Iterable[torch.nn.Parameter], learning_rate: float, eps: float) -> None:
    """Marks a table's parameters: where TorchRec shards them, their backward pass does the optimizer's step."""
    options = {"lr": learning_rate} if optimizer == "sgd" else {"lr": learning_rate, "eps": eps}
    _apply_optimizer_in_backward(_FUSED[optimizer], parameters, options)
