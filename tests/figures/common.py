"""What the figures of all issues share: rows of a table, commands in processes of their own, and their folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tests.public_logs import DATA

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 30  # for a worker to drain after SIGTERM
READY_SECONDS = 120  # for a worker to say that it has joined its group; torch alone takes seconds to load


class FigureError(Exception):
    """A command failed, or a file is missing: the line that needs it has no figures."""


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, what was seen, what is wanted, and whether that holds.

    `short`: the limit for which this figure is known to fall short of what is wanted; it then fails no line.
    """

    what: str
    seen: str
    wanted: str
    holds: bool
    short: str = ""

    @property
    def verdict(self) -> str:
        if self.holds:
            return "holds"
        return f"falls short, as known: {self.short}" if self.short else "DOES NOT HOLD"

    @property
    def fails(self) -> bool:
        return not self.holds and not self.short


@dataclass
class Bench:
    """The folder in which everything is done, and what lines may use of each other's work."""

    folder: Path
    kept: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def empty(self, name: str) -> Path:
        """A folder that no other caller has."""
        folder = self.folder / f"{len(list(self.folder.iterdir())):03}-{name}"
        folder.mkdir()
        return folder


Line: TypeAlias = Callable[[Bench], list[Row]]


def equal(what: str, seen: Any, wanted: Any) -> Row:
    """A figure that must be exactly so."""
    return Row(what, str(seen), str(wanted), seen == wanted)


def at_most(what: str, seen: float, most: float, unit: str = "", short: str = "") -> Row:
    """A figure with a greatest value."""
    return Row(what, f"{seen:.4g}{unit}", f"at most {most:g}{unit}", seen <= most, short)


def at_least(what: str, seen: float, least: float, unit: str = "", short: str = "") -> Row:
    """A figure with a smallest value."""
    return Row(what, f"{seen:.4g}{unit}", f"at least {least:g}{unit}", seen >= least, short)


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"figures: {time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def public(name: str) -> Path:
    """The path of a public log by its place in HEADRACE_DATA. Raises FigureError."""
    if not (DATA / name).is_file():
        raise FigureError(f"{name} is not in {DATA}: set HEADRACE_DATA to the folder of the public logs")
    return DATA / name


def environment() -> dict[str, str]:
    """This checkout's code, and no settings but those of the figure."""
    kept = {"HEADRACE_CACHE"}  # where Kafka is
    ours = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("HEADRACE_")}
    return ours | {"PYTHONPATH": str(ROOT)}


def command(*arguments: object) -> list[str]:
    """The `headrace` command, wherever the checkout is."""
    return [sys.executable, "-m", "deploy.cli", *map(str, arguments)]


def headrace(folder: Path, *arguments: object, log: Path | None = None) -> dict[str, Any]:
    """The JSON of a command that must succeed, run in `folder`; `log` gets its stderr. Raises FigureError."""
    return _last_json(command(*arguments, "--json"), folder, log)


def program(text: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a Python program of its own process prints. Raises FigureError."""
    return _last_json([sys.executable, "-c", text, *map(str, arguments)], ROOT)


def _last_json(words: list[str], folder: Path, log: Path | None = None) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") if log is None else log.open("w+") as stderr:
        done = subprocess.run(
            words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
        )
        if done.returncode != 0:
            stderr.seek(0)
            said = f"{done.stdout.strip()[-1500:]} {stderr.read().strip()[-500:]}"
            raise FigureError(f"exit {done.returncode} of {' '.join(words[1:8])}: {said}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def started(folder: Path, *arguments: object, says: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A `headrace` command that goes on, once its stderr has `says`; at the end it is stopped by its own pid."""
    log = folder / f"{arguments[0]}.stderr"
    with log.open("wb") as stderr, subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), stdout=stderr, stderr=stderr
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + READY_SECONDS
            while says not in log.read_text("utf-8", "replace"):
                if process.poll() is not None or time.monotonic() > end:
                    raise FigureError(f"headrace {arguments[0]} did not come up: {log.read_text()[-500:]}")
                time.sleep(0.05)  # what is waited for is in another process
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
