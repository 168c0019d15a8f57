"""`headrace bench train`: a training step over the store's tables, beside bare TorchRec and beside torch alone.

One model in all parts: 6 features of one id and 2 histories of 20 ids, each with a table of its own (200,000 ids drawn
uniformly: 47,104 look-ups a step), dim 32, histories pooled by their mean, hidden layers of 256, 256 and 128, one
logit, batches of 1,024, row-wise Adagrad for the rows, Adam for the rest. Each part (train_parts.py) is a process of
its own on one core and one thread, on the same ids and labels:

- bare_torchrec: TorchRec as it comes, with fbgemm's kernel, on rows that are ready in a KeyedJaggedTensor;
- pure_torch:    the limit: the same model by hand in torch on rows that are ready, no TorchRec in it: a gather,
  `embedding_bag` for the histories, and the rows' step on one sort;
- headrace:      raw 64-bit ids, with the id map and admission, the tracking of touched rows, and commits to a real
  store with the version's bytes, as often as the train worker makes them (COMMIT_SECONDS, COMMIT_SHARE).

All ids have been seen, and a warm-up is over, when the clock starts. Headrace is timed from the end of a commit to the
end of a later one, so that commits have the share that they have in the long run. `share` is of that time; tracking is
part of the look-up and of the forward pass: it is measured once more alone, and taken off there.

Where others use the machine too the clock says little: figures with `cpu` in their names count processor time (of all
threads, RocksDB's too) instead.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from deploy.bench.common import median, run_part

PARTS = ("bare_torchrec", "pure_torch", "headrace")
STAGES = ("id_map", "forward", "backward_and_update", "dense_optimizer", "tracking", "commit")


def bench_train(ids: int, steps: int, runs: int, step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The figures of the command, medians of `runs`; ratios are medians of those of each run.

    ids: of each feature; steps: that are timed, at least. `step` is called after each of the 3 * runs parts.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    for _ in range(runs):
        for name in PARTS:
            with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
                found[name].append(run_part("deploy.bench.train_parts", name, folder=folder, ids=ids, steps=steps))
            step()
    bare, pure, ours = found["bare_torchrec"], found["pure_torch"], found["headrace"]

    def ratio(to: list[dict[str, Any]], key: str) -> float:
        return statistics.median(mine[key] / other[key] for mine, other in zip(ours, to, strict=True))

    return {
        **{f"{name}_{key}": median(part, key) for key in ("per_s", "per_cpu_s") for name, part in found.items()},
        "ratio": ratio(bare, "per_s"),
        "ratio_to_limit": ratio(pure, "per_s"),
        "ratio_cpu": ratio(bare, "per_cpu_s"),
        "ratio_to_limit_cpu": ratio(pure, "per_cpu_s"),
        "share": {stage: statistics.median(run["share"][stage] for run in ours) for stage in STAGES},
        "commits": median(ours, "commits"),
        "rows_a_commit": median(ours, "rows_a_commit"),
        "rows_a_step": median(ours, "rows_a_step"),
    }
