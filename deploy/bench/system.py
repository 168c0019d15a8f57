"""The real system for a benchmark: topics of its own at a Kafka that is there, and a worker of each kind.

The settings are those that everybody starts from, but for the guard: clicks of the standard mix are drawn, no model is
better than none there, and a guard that knows its trade holds versions back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from deploy.bench.common import BenchError
from deploy.freshness import PROBE_S
from deploy.processes import free_port, listening
from deploy.prometheus import samples
from deploy.settings import Settings, dump
from deploy.workers import Worker
from streams.topics import create_topics, delete_topics

READY_S = 120.0
PATIENCE_S = 10.0  # for metrics of a worker that has both cores to do


class System:
    """Join, train and serve worker."""

    def __init__(self, bootstrap: str, folder: Path, **more: object) -> None:
        """folder: an empty one, for all that it keeps; more: settings."""
        self.folder = folder
        self.settings = Settings([]).with_flags({
            "data_dir": folder, "bootstrap": bootstrap, "serve.port": free_port(),
            "topics.prefix": f"bench-{folder.name.removeprefix('headrace-bench-')}.", "model.guard.tasks": [],
            "train.metrics_port": free_port(), **more,
        })  # fmt: skip
        self.url = f"http://127.0.0.1:{self.settings.serve.port}"
        config = str(folder / "headrace.toml")
        self.workers = [
            Worker(name, [name, "--config", config], folder / f"{name}.log") for name in ("train", "serve", "join")
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Topics and workers, to be left only when nothing is asked of them any more."""
        settings = self.settings
        with contextlib.ExitStack() as stack:
            create_topics(settings.bootstrap, settings.topics)
            stack.callback(delete_topics, settings.bootstrap, settings.topics)
            (self.folder / "headrace.toml").write_text(dump(settings))
            for worker in self.workers:
                worker.load()
                stack.callback(worker.stop, 5.0)
                worker.go()
            yield

    def all_up(self) -> None:
        """Raises WorkerFailed or BenchError where a worker is not what it was at the start."""
        for worker in self.workers:
            worker.revive()  # raises where it has ended by itself
            if worker.restarts:
                raise BenchError(f"the {worker.name} worker was killed from outside: there is no figure")

    async def until(self, there: Callable[[], object], seconds: float = READY_S) -> None:
        """`there()`: something has come to the replica. Raises BenchError with what the workers say."""
        end = time.monotonic() + seconds
        while not there():
            self.all_up()
            if time.monotonic() > end:
                last = "; ".join(f"{worker.name}: {worker.last_line()}" for worker in self.workers)
                raise BenchError(f"nothing comes to the replica within {seconds:.0f} s ({last})")
            await asyncio.sleep(PROBE_S)

    def trainer_s(self) -> dict[str, float]:
        """What the trainer's thread has done since its start, s by the clock: stages of steps (stages.py), commits.

        Raises BenchError where the worker does not answer.
        """
        answer = samples(self.settings.train.metrics_port, PATIENCE_S)
        if answer is None:
            raise BenchError("the train worker does not say what it did: its metrics do not answer")
        found = {}
        for sample in answer:
            if sample.name == "headrace_train_stage_seconds_total":
                found[sample.labels["stage"]] = sample.value
            elif sample.name == "headrace_train_commit_seconds_sum":
                found["commit"] = sample.value
        return found

    def processes(self, **others: int) -> dict[str, psutil.Process]:
        """The workers, `others` by their pids, and Kafka where it can be seen."""
        workers = {worker.name: worker.process.pid for worker in self.workers if worker.process is not None}
        return with_kafka(self.settings.bootstrap, **workers, **others)


def with_kafka(bootstrap: str, **pids: int) -> dict[str, psutil.Process]:
    """Processes by name, and Kafka where it can be seen."""
    found = {name: psutil.Process(pid) for name, pid in pids.items()}
    broker = listening(int(bootstrap.rpartition(":")[2]))
    return found if broker is None else found | {"kafka": broker}


def processor_s(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Processor time of each so far, s, all threads."""
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
