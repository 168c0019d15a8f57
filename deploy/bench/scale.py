"""`headrace bench scale`: the trainer on one rank and on two, on the same global batches.

A log of the standard mix goes through the real joiner; its blocks go to a trainer with the settings that everybody
starts from but for whole batches of 1,024 rows of one partition, in float32. Each number of ranks is a process of its
own, with its further ranks as children (online_model/ranks.py) and as many cores as it has ranks, as far as there are.
Timed are the steps, after a warm-up: there is no store and no commit.

`loss_difference` is of the mean loss over all steps, `largest_difference` of that of a single step. They differ at all
because sums of floats over two ranks have another order.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.bench.common import BenchError, finish, median, run_part
from deploy.bench.mix import SHARES, standard_mix

if TYPE_CHECKING:
    from online_model.examples import Block
    from online_model.settings import TrainerSettings

RANKS = (1, 2)
CLOSE = 1e-5  # losses that differ by more are not those of one model
BATCH = 1_024  # rows of a step
WARM_UP = 10  # steps
PAGE, EVENTS_PER_S = 10, 1_000  # items of an impression; events of a second of event time
SLICE = 2_000  # records that become a block


def bench_scale(steps: int, runs: int, step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The figures of the command, medians of `runs`; the losses are the same in each. `step` is called after each of
    the 2 * runs parts."""
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in RANKS}
    for _, size in itertools.product(range(runs), RANKS):
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            found[size].append(run_part(__name__, "train", cores=size, folder=folder, ranks=size, steps=steps))
        step()
    one, two = (found[size][0]["losses"] for size in RANKS)
    return {
        "ranks": {f"{size}": median(found[size], "per_s") for size in RANKS},
        "loss_difference": abs(statistics.fmean(one) - statistics.fmean(two)),
        "largest_difference": max(abs(a - b) for a, b in zip(one, two, strict=True)),
        "loss": statistics.fmean(one),
        "steps": steps,
    }


def _settings() -> TrainerSettings:
    from online_model.settings import TrainerSettings

    return TrainerSettings(batch_size=BATCH)


def _blocks(rows: int) -> Iterator[Block]:
    """What the joiner makes of a log of at least so many rows."""
    from streams.joiner import Joiner, JoinSettings, Record

    joiner, offset = Joiner(JoinSettings(wait_ms=5_000), 0), 0
    events = round(1.5 * rows / SHARES["impression"])
    log = standard_mix(events, PAGE, span_ms=1000 * events // EVENTS_PER_S)
    while values := list(itertools.islice(log, SLICE)):
        yield joiner.process([Record(offset + i, None, value) for i, value in enumerate(values)]).block
        offset += len(values)


def _train(folder: str, ranks: int, steps: int) -> dict[str, Any]:
    import torch

    from embedding_store.ranks import Ranks
    from online_model.ranks import FurtherRanks
    from online_model.trainer import open_trainer

    settings, rows = _settings(), 0
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    further = FurtherRanks(ranks, Path(folder) / "ranks", settings, 1, "cpu", 1) if ranks > 1 else None
    place = Ranks(0, ranks, further.meeting) if further else None
    trainer = open_trainer(settings, None, lambda: 0, partitions=1, ranks=place)
    losses: list[float] = []
    seconds = 0.0
    for number, block in enumerate(_blocks((steps + 1) * settings.batch_size)):
        trainer.offer(block, number)
        while len(losses) < steps:
            began = time.perf_counter()
            learned = trainer.step()
            if not learned:
                break
            if len(losses) >= WARM_UP:
                seconds += time.perf_counter() - began
                rows += learned
            losses.append(trainer.last_loss)
    if further:
        further.end(trainer.ranks)
    if len(losses) < steps or not rows:
        raise BenchError(f"the log has {len(losses)} batches, {steps} steps were wanted: try more than {WARM_UP}")
    return {"per_s": rows / seconds, "losses": losses}


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"train": _train}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
