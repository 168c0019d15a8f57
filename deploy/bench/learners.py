"""`headrace bench learners`: Headrace's step beside other online learners, on the same examples, one core, one thread.

The standard mix goes through the real joiner; its batches of joined examples are those of `headrace compare`
(replay/comparison/stream.py), and all learners of a run are in one process, on the very same ones.

- headrace:       the trainer with the settings that everybody starts from, no store: from joined rows to a model that
  has learned them. Features, the history among them, the id map, scoring and measuring before learning, all tasks.
- river_logistic, river_fm, vw: those of `headrace compare`, and of each only its own learning: features are made, and
  for Vowpal Wabbit written as text, before the clock starts. river's factorization machine is the faster one of
  replay/comparison/peers.py.

The first batches are learned, and not timed. Examples are the same count for all: what says something about a click.
Where others use the machine too the clock says little: figures with `cpu` in their names count processor time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploy.bench.common import BenchError, finish, run_part
from deploy.bench.mix import standard_mix

if TYPE_CHECKING:
    from replay.comparison.stream import Batch

NAMES = ("headrace", "river_logistic", "river_fm", "vw")
PEERS = NAMES[1:]
WARM_UP = 4  # batches
PAGE, EVENTS_PER_S = 10, 1_000  # items of an impression; events of a second of event time


def bench_learners(events: int, batch: int, runs: int, step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The figures of the command, medians of `runs`; ratios are medians of those of each run. `step` is called after
    each of the `runs`."""
    found = []
    for _ in range(runs):
        found.append(run_part(__name__, "learners", events=events, batch=batch))
        step()

    def middle(name: str, key: str) -> float:
        return statistics.median(run[name][key] for run in found)

    def ratio(to: str, key: str) -> float:
        return statistics.median(run["headrace"][key] / run[to][key] for run in found)

    return {
        **{f"{name}_{key}": middle(name, key) for key in ("per_s", "per_cpu_s") for name in NAMES},
        **{f"ratio_to_{name}": ratio(name, "per_s") for name in PEERS},
        **{f"ratio_to_{name}_cpu": ratio(name, "per_cpu_s") for name in PEERS},
        "examples": found[0]["examples"],
        "batch": batch,
    }


def _batches(events: int, batch: int) -> list[Batch]:
    from online_model.settings import TrainerSettings
    from replay.comparison.stream import read_stream
    from streams.events import decode
    from streams.joiner import JoinSettings

    log = standard_mix(events, PAGE, span_ms=1000 * events // EVENTS_PER_S)
    stream = read_stream(map(decode, log), JoinSettings(wait_ms=5_000), TrainerSettings(batch_size=batch), partitions=1)
    if len(stream.batches) <= WARM_UP:
        raise BenchError(
            f"{events:,} events are {len(stream.batches)} batches, and {WARM_UP} warm up: try more --events"
        )
    return stream.batches


def _learners(events: int, batch: int) -> dict[str, Any]:
    import torch

    from online_model.settings import TrainerSettings
    from replay.comparison.ours import Model
    from replay.comparison.peers import RiverFm, RiverLogistic, VowpalWabbit

    torch.set_num_threads(1)
    batches = _batches(events, batch)
    examples = sum(len(b.lessons.label) for b in batches[WARM_UP:])
    model = Model(TrainerSettings(batch_size=batch))
    found = {"headrace": _timed([b.rows for b in batches], examples, model.learn)}
    peers: dict[str, Any] = {"river_logistic": RiverLogistic(), "river_fm": RiverFm(0), "vw": VowpalWabbit(0)}
    for name, peer in peers.items():
        found[name] = _timed([peer.ready(b) for b in batches], examples, peer.learn_ready)
    return {**found, "examples": examples}


def _timed(batches: list[Any], examples: int, learn: Callable[[Any], None]) -> dict[str, float]:
    """Examples a second of `learn`, after the warm-up."""
    for batch in batches[:WARM_UP]:
        learn(batch)
    began, began_cpu = time.perf_counter(), time.process_time()
    for batch in batches[WARM_UP:]:
        learn(batch)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return {"per_s": examples / seconds, "per_cpu_s": examples / cpu}


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"learners": _learners}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
