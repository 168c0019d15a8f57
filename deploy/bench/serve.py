"""`headrace bench serve`: a replica under load, beside the bare forward of the same batches and a bare sleeper.

The real serve worker (`headrace serve`) on one core, behind HTTP on the loopback: a model `small`, dim 32, that is made
(serve_parts.Model), loaded from a snapshot, and kept moving: 5 versions a second come through Kafka, each of 2,900 rows
in one transaction, with all dense weights once a second. They touch rows that are there, so that memory that grows
grows for nothing. On the other core: Kafka, the trainer's part, a client in a process of its own, and the sleeper.

A request is `POST /v1/rank` of a user and 500 distinct candidates, drawn uniformly. The load is open: each request is
sent when it is due, whether or not those before were answered, and its latency counts from then to the last byte of the
answer. The knee is the largest rate at which p99 is at most KNEE_MS and nothing fails, in one of two tries, found by
halving; the runs are at a share of it. Before each run the bare forward: the ranker alone, on the core of the replica
and one thread, on what a replica hands to it for such requests (Replica.rank is asked, and the ranker's arguments are
caught).

`cpu_ms_a_request` is the replica's processor time, versions and all, over the requests.
`stall_p99_ms`: by how much a sleep of 1 ms was too long in the sleeper, which does nothing else: what neither replica
nor client can help. The figures are of the best run, that with the smallest p99; `all` has the others.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.bench.common import BenchError, on_cores, part_command, run_part
from deploy.processes import ends_with_parent, free_port, terminate
from deploy.prometheus import histogram, quantile
from deploy.settings import Settings, dump
from deploy.workers import Worker
from streams.topics import create_topics, delete_topics

PARTS = "deploy.bench.serve_parts"
KNEE_MS = 25.0
KNEE_STEPS, KNEE_TRIES = 6, 2
READY_S = 120.0
STEADY_S = 60.0  # memory that is taken after so long has no reason to grow
APPLY_SECONDS = "headrace_replica_apply_seconds"


def apart() -> tuple[list[int], list[int]]:
    """(the replica's core, those of all else): the same one only where there is no other."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[-1:], cores[:-1] or cores


def bench_serve(
    bootstrap: str, core: list[int], items: int, users: int, rate: float, share: float, seconds: float, runs: int,
    arrivals: str, step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of the command. core: the replica's; this process is on the others, and so is the broker. `rate` 0:
    `share` of the knee. `step` is called after the knee and after each run."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        replica = _Replica(bootstrap, Path(folder), core, items, users)
        with replica.running():
            knee = 0.0 if rate else _knee(replica, seconds, arrivals)
            step()
            found = []
            for number in range(runs):
                found.append(replica.measured(seconds, rate or share * knee, arrivals, number))
                step()
    best = min(found, key=lambda run: run["p99_ms"])
    return {
        "candidates": replica.candidates,
        **best,
        "knee_rps": knee or None,
        "arrivals": arrivals,
        "best_of": runs,
        "all": [{key: run[key] for key in ("p50_ms", "p99_ms", "bare_forward_ms", "ratio")} for run in found],
    }


def _knee(replica: _Replica, seconds: float, arrivals: str) -> float:
    """The largest rate that the replica keeps up with, requests/s."""
    stretch = min(seconds, 8.0)
    alone = replica.load(stretch, 0.0, arrivals, 0)
    holds, breaks = 0.0, 1.3e3 / alone["p50_ms"]
    for number in range(KNEE_STEPS):
        rate = (holds + breaks) / 2 if number else 0.75 * breaks
        # Once may be somebody else's doing, and would send the search to rates at which the caches are cold.
        tries = (replica.load(stretch, rate, arrivals, number) for _ in range(KNEE_TRIES))
        if any(seen["p99_ms"] <= KNEE_MS and not seen["errors"] for seen in tries):
            holds = rate
        else:
            breaks = rate
    if not holds:
        raise BenchError(
            f"p99 is above {KNEE_MS:.0f} ms at any rate (one request at a time takes {alone['p50_ms']:.1f} ms): "
            "is the machine busy? --rate measures at a rate without looking for the knee"
        )
    return holds


class _Replica:
    """The serve worker with its snapshot, its versions, and what is asked of it."""

    def __init__(self, bootstrap: str, folder: Path, core: list[int], items: int, users: int) -> None:
        from deploy.bench.serve_parts import CANDIDATES

        self.candidates = CANDIDATES
        self._core, self._sizes, self._folder = core, {"items": items, "users": users}, folder
        self._settings = Settings([]).with_flags({
            "data_dir": folder, "bootstrap": bootstrap, "serve.port": free_port(),
            "topics.prefix": f"bench-{uuid.uuid4().hex[:8]}.", "topics.partitions": 1,
        })  # fmt: skip
        self._snapshots = folder / "snapshots"
        self._worker = Worker("serve", ["serve", "--config", str(folder / "headrace.toml")], folder / "serve.log")

    @contextmanager
    def running(self) -> Iterator[None]:
        """From the snapshot to the end, with versions coming all the time. Raises BenchError."""
        settings = self._settings
        with ExitStack() as stack:
            run_part(PARTS, "snapshot", cores=self._core, folder=self._snapshots, **self._sizes)
            create_topics(settings.bootstrap, settings.topics)
            stack.callback(delete_topics, settings.bootstrap, settings.topics)
            (self._folder / "headrace.toml").write_text(dump(settings))
            with on_cores(self._core):
                self._worker.load()
            stack.callback(self._worker.stop)
            self._worker.go()
            self._until_ready()
            publisher = stack.enter_context(subprocess.Popen(
                part_command(PARTS, "publish", bootstrap=settings.bootstrap, topic=settings.topics.parameters,
                             **self._sizes),
                preexec_fn=ends_with_parent(),
            ))  # fmt: skip
            stack.callback(terminate, publisher)
            applied = self._versions()[0]
            self._until(lambda: self._versions()[0] > applied, "no version comes to the replica")
            yield
            if publisher.poll() is not None or self._worker.state != "up":
                raise BenchError(f"the replica or what it follows ended on the way: {self._worker.last_line()}")

    def measured(self, seconds: float, rate: float, arrivals: str, number: int) -> dict[str, Any]:
        """One run: the bare forward, then the load."""
        bare = run_part(PARTS, "forward", cores=self._core, snapshots=self._snapshots, **self._sizes)
        before, used = self._versions(), self._processor_s()
        seen = self.load(seconds, rate, arrivals, 1_000 + number)
        used = self._processor_s() - used
        if seen.pop("why") and seen["errors"] == seen["requests"]:
            raise BenchError(f"no request was answered: see {self._worker.last_line()}")
        (count, buckets), (count_before, buckets_before) = self._versions(), before
        grown = {bound: n - buckets_before.get(bound, 0.0) for bound, n in buckets.items()}
        return {
            **{key: seen[key] for key in ("rps", "p50_ms", "p99_ms", "max_ms")},
            **bare,
            "ratio": seen["p99_ms"] / bare["bare_forward_ms"],
            **{key: seen[key] for key in ("stall_p99_ms", "errors", "requests")},
            "cpu_ms_a_request": 1e3 * used / seen["requests"],
            "versions": int(count - count_before),
            "apply_p50_ms": 1e3 * quantile(0.50, grown),
            "apply_p99_ms": 1e3 * quantile(0.99, grown),
            **memory(seen["memory"]),
        }

    def load(self, seconds: float, rate: float, arrivals: str, seed: int) -> dict[str, Any]:
        """What the part `load` says."""
        assert self._worker.process is not None
        return run_part(
            PARTS, "load", cores=sorted(os.sched_getaffinity(0)), port=self._settings.serve.port,
            pid=self._worker.process.pid, seconds=seconds, rate=rate, arrivals=arrivals, seed=seed, **self._sizes,
        )  # fmt: skip

    def _processor_s(self) -> float:
        """The replica's processor time so far, s."""
        assert self._worker.process is not None
        return sum(psutil.Process(self._worker.process.pid).cpu_times()[:2])

    def _until_ready(self) -> None:
        self._until(lambda: self._get("/readyz") is not None, "the replica is not ready")

    def _until(self, there: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + READY_S
        while not there():
            if self._worker.state != "up" or time.monotonic() > end:
                raise BenchError(f"{complaint}: {self._worker.last_line()}")
            time.sleep(0.1)  # it is in another process

    def _get(self, path: str) -> str | None:
        """What a GET answers; None where it is refused."""
        url = f"http://127.0.0.1:{self._settings.serve.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # nosec B310 - our own
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def _versions(self) -> tuple[float, dict[float, float]]:
        """(versions applied, of these those that took at most so many seconds), by the replica's metrics."""
        return histogram(self._get("/metrics") or "", APPLY_SECONDS)


def memory(samples: list[list[float]]) -> dict[str, Any]:
    """The replica's resident memory, MB: at the end, growth and slope since STEADY_S (of a short run: its middle)."""
    at, mb = np.array(samples).T
    steady = at >= min(STEADY_S, at[-1] / 2)
    at, mb = at[steady], mb[steady]
    slope = float(np.polyfit(at, mb, 1)[0]) * 3600 if len(at) > 1 else 0.0
    return {"rss_mb": float(mb[-1]), "rss_growth_mb": float(mb[-1] - mb[0]), "rss_slope_mb_per_h": slope}
