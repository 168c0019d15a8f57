"""Worker processes: started, watched, started again when they die, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.processes import ends_with_parent, terminate
from embedding_store.errors import HeadraceError

MAX_DEATHS, DEATHS_WITHIN_S = 5, 60.0
LAUNCHER = (sys.executable, "-m", "deploy.cli")


class WorkerFailed(HeadraceError):
    """A worker ended with an error of its own, or dies again and again."""


@dataclass
class Worker:
    """One `headrace` worker in a process of its own; its stderr goes to `log`."""

    name: str
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen | None = None
    launcher: Sequence[str] = LAUNCHER  # what the arguments are for
    environment: dict[str, str] = field(default_factory=dict)  # beside our own
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)

    def load(self) -> None:
        """Start the process: it loads what it needs (seconds, for torch), then waits for `go`."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.launcher, *self.arguments, "--after-stdin"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment,
                start_new_session=True,  # a Ctrl-C is for the demo, which then drains its workers in order
                preexec_fn=ends_with_parent(),  # hence: started from the main thread only
            )

    def go(self) -> None:
        """Settings and broker are there now."""
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `revive` will say why
            self.process.stdin.close()

    @property
    def state(self) -> str:
        return "up" if self.process is not None and self.process.poll() is None else "down"

    def report(self) -> dict:
        """{name, pid, state, restarts} for the page."""
        pid = self.process.pid if self.process is not None else None
        return {"name": self.name, "pid": pid, "state": self.state, "restarts": self.restarts}

    def revive(self) -> str | None:
        """Start the worker again if it was killed, and say so. Raises WorkerFailed if that cannot help.

        A worker that was killed from outside (a negative return code) is started again: all it needs is in its store.
        One that ended by itself has said why, and would say it again.
        """
        if self.process is None or self.process.poll() is None:
            return None
        code, now = self.process.returncode, time.monotonic()
        if code >= 0:
            raise WorkerFailed(f"the {self.name} worker ended (exit {code}): {self.last_line()} [log: {self.log}]")
        self.deaths.append(now)
        while self.deaths and now - self.deaths[0] > DEATHS_WITHIN_S:
            self.deaths.popleft()
        if len(self.deaths) > MAX_DEATHS:
            raise WorkerFailed(
                f"the {self.name} worker was killed {len(self.deaths)} times within {DEATHS_WITHIN_S:.0f} s; "
                f"look for the reason in {self.log}"
            )
        self.restarts += 1
        self.load()
        self.go()
        return f"the {self.name} worker was killed by {signal.Signals(-code).name}; started again"

    def last_line(self) -> str:
        """The last line of the log that says something."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1].strip() if lines else "it said nothing"

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, wait for it to drain, SIGKILL if it does not. Gives the return code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            terminate(self.process, timeout_s)
        return self.process.returncode
