"""A demo in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.public_logs import DATA, TAOBAO_BY_TIME

TAOBAO = DATA / TAOBAO_BY_TIME


@dataclass
class Demo:
    """A demo that was started; `result` is its JSON once it has ended."""

    process: subprocess.Popen
    data_dir: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What its workers were started with; waits until they are."""
        file = self.data_dir / "demo" / "headrace.toml"
        self.until(file.exists)
        return tomllib.loads(file.read_text("utf-8"))

    def until(self, condition: Callable[[], Any], timeout_s: float = 90) -> Any:
        """What `condition` gives once that is true. The demo must live so long."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the demo ended (exit {self.process.returncode}): {self.stderr()}"
            assert time.monotonic() < end, f"waited {timeout_s} s in vain: {self.stderr()}"
            time.sleep(0.05)  # what is waited for is in another process
        return value

    def worker(self, name: str) -> psutil.Process | None:
        """The running worker `name` of this demo."""
        for child in psutil.Process(self.process.pid).children():
            try:
                if child.cmdline()[1:4] == ["-m", "deploy.cli", name]:
                    return child
            except psutil.Error:
                pass
        return None

    def kill(self, name: str) -> int:
        """kill -9 of a worker. Returns the pid it had."""
        child = self.until(lambda: self.worker(name))
        child.send_signal(signal.SIGKILL)
        return child.pid

    def result(self, timeout_s: float = 150) -> dict[str, Any]:
        """Its figures, after exit 0."""
        out, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, self.stderr()
        return json.loads(out.strip().splitlines()[-1])

    def stderr(self) -> str:
        return (self.data_dir / "stderr").read_text("utf-8")


@contextmanager
def demo(data_dir: Path, *arguments: object) -> Iterator[Demo]:
    """`headrace demo --json` with these arguments; whatever is left of it at the end is ended."""
    data_dir.mkdir(exist_ok=True)
    with (data_dir / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "demo", "--json", "--data-dir", str(data_dir), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield Demo(process, data_dir)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def headrace(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=90, env=os.environ | environment,
    )  # fmt: skip
