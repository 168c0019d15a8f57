"""The twin that never learns, as the demo sees it: a process (`deploy.demo.frozen`) and what it says of itself.

It is told two things, each a line: when the shop opens (ms UTC), and that it has closed (any line).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import msgspec
import orjson

from deploy.demo.clicks import CLICKS_COME_S, ClickRate
from deploy.processes import ends_with_parent, terminate
from embedding_store.errors import HeadraceError
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings
from replay.simulator import SimulatorSettings


class TwinSettings(msgspec.Struct, frozen=True):
    """What the twin shares with the learning shop."""

    simulator: SimulatorSettings
    replica: ReplicaSettings
    features: FeatureSettings
    ranker: RankerSettings


class TwinProcess:
    """The twin in a process of its own, and what it has said of itself. A context manager, for the main thread."""

    def __init__(self, settings: TwinSettings, log: Path) -> None:
        self.clicks = ClickRate()
        self._settings, self._log = settings, log
        self._said = asyncio.Event()
        self._seconds = 0  # reported

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.demo.frozen", msgspec.json.encode(self._settings).decode()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                preexec_fn=ends_with_parent(), env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, name="twin", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        terminate(self._process, grace_s=5)
        self._listener.join()  # what it still reads is for a loop that has not ended
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()

    def open(self, start_ms: int) -> None:
        """Both worlds open at `start_ms` (ms UTC)."""
        self._tell(start_ms)

    async def reached(self, second: int) -> None:
        """The other world has ended: this one lives through all seconds before `second` as fast as it can.

        Raises HeadraceError if it has ended before.
        """
        self._tell("closed")
        while self._seconds < second:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise HeadraceError(f"the twin that does not learn ended (exit {code}): see {self._log}")
            self._said.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._said.wait()

    def recent(self, second: int) -> float | None:
        """As `ClickRate.recent`, of its own last window where it lives behind the other world: it leaves that the
        processor, and its rate hardly changes."""
        return self.clicks.recent(min(second, self._seconds + CLICKS_COME_S))

    def _tell(self, what: object) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: `reached` says so
            self._process.stdin.write(f"{what}\n".encode())
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            said = orjson.loads(line)
            self.clicks.add(said["second"], said["shown"], said["clicked"])
            self._seconds = said["second"] + 1
            self._loop.call_soon_threadsafe(self._said.set)
