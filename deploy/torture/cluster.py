"""The processes of a torture run: two join workers, a train worker, two replicas, and the broker they share."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from deploy.broker import Broker
from deploy.processes import free_port, write_atomically
from deploy.prometheus import get, samples
from deploy.settings import Settings, dump
from deploy.workers import Worker, WorkerFailed
from streams.topics import create_topics

JOINERS, REPLICAS = 2, 2
READY_S = 240.0
PATIENCE_S = 60.0  # after the broker was away a worker may end by itself


@dataclass
class Replica:
    """A serve worker and where it listens."""

    worker: Worker
    port: int

    @property
    def sequence(self) -> int | None:
        """Of the version that it has, -1 for none; None while it does not answer."""
        answer = get(self.port, "/v1/model")
        return None if answer is None else msgspec.json.decode(answer)["sequence"]


@dataclass
class Cluster:
    """All processes of one run. To be used from the thread that made it (they end with it).

    Settings file and logs are beside the data directory, which may be full.
    """

    settings: Settings
    broker: Broker
    launcher: Sequence[str]  # what runs a worker: followed by its kind and options
    workers: dict[str, Worker] = field(default_factory=dict)
    replicas: list[Replica] = field(default_factory=list)
    broker_hurt: float = -1e9  # when the broker was away last (monotonic)
    restarts: int = 0
    gave_up: Counter[str] = field(default_factory=Counter)  # last lines of those that ended as the broker was away
    mend: Callable[[Worker], bool] = lambda worker: False  # whether one that ended by itself may be started again
    _learned: float = 0.0

    @property
    def config(self) -> Path:
        return self.settings.data_dir.with_name("headrace.toml")

    def start(self) -> None:
        """Topics, settings file, workers; returns when all have been started."""
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        create_topics(self.settings.connection, self.settings.topics)
        write_atomically(self.config, dump(self.settings))
        for number in range(JOINERS):
            self._start(f"join-{number}", "join")
        self._start("train", "train")
        for number in range(REPLICAS):
            port = free_port()
            worker = self._start(f"serve-{number}", "serve", "--port", str(port))
            self.replicas.append(Replica(worker, port))

    def wait_until_ready(self) -> None:
        """Returns when every replica has a model. Raises WorkerFailed."""
        deadline = time.monotonic() + READY_S
        for replica in self.replicas:
            while replica.sequence in (None, -1):
                self.revive()
                if time.monotonic() > deadline:
                    raise WorkerFailed(f"no model within {READY_S:.0f} s at {replica.worker.name}: see its log")
                time.sleep(0.1)

    def training(self) -> dict[str, float] | None:
        """The train worker's gauges and counters, by name without prefix; None while it does not answer."""
        found = samples(self.settings.train.metrics_port)
        if found is None:
            return None
        return {s.name.removeprefix("headrace_train_"): s.value for s in found if not s.labels}

    def wait_until_it_learns(self) -> None:
        """Returns when the trainer has learned more than the last time. Raises WorkerFailed."""
        deadline = time.monotonic() + READY_S
        while not ((now := self.training()) and now["rows_total"] > self._learned):
            self.revive()
            if time.monotonic() > deadline:
                raise WorkerFailed(f"nothing was learned within {READY_S:.0f} s: see {self.workers['train'].log}")
            time.sleep(0.1)
        self._learned = now["rows_total"]

    def kill(self, name: str) -> None:
        """kill -9, and a new one in its place."""
        self.halt(name)
        self.again(name)

    def halt(self, name: str) -> Worker:
        """kill -9."""
        worker = self.workers[name]
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        return worker

    def again(self, name: str, **environment: str) -> None:
        """Starts one that has ended."""
        worker = self.workers[name]
        worker.environment = environment
        self.restarts += 1
        worker.load()
        worker.go()

    def lose_rank(self) -> None:
        """kill -9 of rank 1. The train worker must end by itself; a new one takes its place. Raises WorkerFailed."""
        worker, deadline = self.workers["train"], time.monotonic() + READY_S
        assert worker.process is not None
        while worker.process.poll() is None and not (ranks := further_ranks(worker.process.pid)):
            _wait(deadline, f"the train worker has no rank 1: see {worker.log}")
        if worker.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                ranks[0].kill()
        while worker.process.poll() is None:
            _wait(deadline, f"the train worker goes on without its rank 1: see {worker.log}")
        self.again("train")

    def freeze(self, name: str, frozen: bool) -> None:
        """SIGSTOP or SIGCONT."""
        process = self.workers[name].process
        assert process is not None
        process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def stop_broker(self, kill: bool) -> None:
        """With `kill` by kill -9."""
        self.broker_hurt = time.monotonic()
        if kill:
            os.kill(self.broker.pid, signal.SIGKILL)
        self.broker.stop()

    def start_broker(self) -> None:
        self.broker = Broker.start(self.broker.data_dir)
        self.broker_hurt = time.monotonic()

    def revive(self, besides: str = "") -> None:
        """Starts again what ended because the broker was away, or what `mend` says; not the worker `besides`.

        Raises WorkerFailed for any other end.
        """
        for name, worker in self.workers.items():
            assert worker.process is not None
            if worker.process.poll() is None or name == besides:
                continue
            if not self.mend(worker):
                code, said = worker.process.returncode, worker.last_line()
                if code != 1 or time.monotonic() - self.broker_hurt > PATIENCE_S:
                    raise WorkerFailed(f"{name} ended by itself (exit {code}): {said}")
                self.gave_up[said] += 1
            self.again(name)

    def stop(self, *kinds: str) -> None:
        """SIGTERM to the workers of these kinds; WorkerFailed where one does not end well."""
        for name, worker in self.workers.items():
            if name.split("-")[0] in kinds and worker.stop(60.0):
                raise WorkerFailed(f"{name} did not stop well: {worker.last_line()} [log: {worker.log}]")

    def end(self) -> None:
        """Whatever still runs, ends."""
        for worker in self.workers.values():
            if worker.process is not None and worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()

    def _start(self, name: str, kind: str, *options: str) -> Worker:
        arguments = [kind, "--config", str(self.config), *options]
        worker = Worker(name, arguments, self.config.with_name(f"{name}.log"), launcher=self.launcher)
        self.workers[name] = worker
        worker.load()
        worker.go()
        return worker


def further_ranks(pid: int) -> list[psutil.Process]:
    """Those that a train worker has started (beside them it has Python's tracker of what they share)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(pid).children() if "online_model.further_rank" in child.cmdline()]
    return []


def _wait(deadline: float, otherwise: str) -> None:
    if time.monotonic() > deadline:
        raise WorkerFailed(otherwise)
    time.sleep(0.05)
