"""What the benchmarks share: measured parts as child processes on one core, medians, and the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from deploy.processes import ends_with_parent
from embedding_store.errors import HeadraceError

CHILD_SECONDS = 900.0  # a part that takes so much longer than it was told to (`seconds`) hangs
STOP_SECONDS = 30.0  # for a benchmark to put away what it started


class BenchError(HeadraceError):
    """A measured part failed, or what it computed is wrong: there is no figure."""


def run_part(module: str, part: str, cores: int | Sequence[int] = 1, **arguments: Any) -> dict[str, Any]:
    """Run `part` of a benchmark in a process of its own, on these cores, or on the last so many that we may use: what
    it returned.

    Raises BenchError with the last line it said if it failed.
    """
    mine = sorted(os.sched_getaffinity(0))[-cores:] if isinstance(cores, int) else cores
    tied = ends_with_parent()

    def in_child() -> None:
        tied()
        os.sched_setaffinity(0, mine)

    command = part_command(module, part, **arguments)
    limit = CHILD_SECONDS + arguments.get("seconds", 0.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, preexec_fn=in_child, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{part} did not end within {limit:.0f} s: try a smaller size") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BenchError(f"the benchmark's part `{part}` failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def part_command(module: str, part: str, **arguments: Any) -> list[str]:
    """What starts a part."""
    return [sys.executable, "-m", module, part, json.dumps(arguments, default=str)]


def run_bench(arguments: Sequence[str]) -> dict[str, Any]:
    """Run `headrace bench …` in a process of its own: what it said with --json. Raises BenchError with its last line.

    It is in a session of its own, so that Ctrl-C comes to us alone; it is then stopped as by Ctrl-C, and has the time
    to put away what it started.
    """
    words = [sys.executable, "-m", "deploy.cli", "bench", *arguments, "--json"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=ends_with_parent(),
    ) as child:  # fmt: skip
        try:
            out, err = child.communicate()
        except BaseException:
            child.send_signal(signal.SIGINT)
            try:
                child.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    if child.returncode:
        said = err.strip().splitlines() or [f"exit code {child.returncode}"]
        raise BenchError(said[-1].removeprefix("headrace: "))
    return json.loads(out.splitlines()[-1])


def plots_folder(folder: Path) -> None:
    """Makes plots/ in a folder for pages. Raises HeadraceError where that cannot be: before an hour is measured."""
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HeadraceError(f"{folder} cannot be used: {error.strerror}; choose another folder with --out") from None


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This thread, and whatever it starts meanwhile, on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def bare_topics(bootstrap: str, partitions: Mapping[str, int]) -> Iterator[None]:
    """Topics of one replica, with a broker's own settings, while they are needed."""
    from kafka import KafkaAdminClient
    from kafka.admin import NewTopic

    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        admin.create_topics([NewTopic(topic, count, 1) for topic, count in partitions.items()])
        try:
            yield
        finally:
            admin.delete_topics(list(partitions))
    finally:
        admin.close()


def finish(result: dict[str, Any]) -> None:
    """The last line of a part: its result for `run_part`."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def rss_mb() -> float:
    """Resident memory of this process, MB."""
    return psutil.Process().memory_info().rss / 1e6


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """The median of one figure over the runs."""
    return statistics.median(run[key] for run in runs)


def machine() -> str:
    """CPU model and number of cores, for the text output."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"
