"""The live summary of the demo and of `headrace monitor` in the terminal, from the same samples as the page."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 5.0


class Summary:
    """Shows the newest sample on stderr: a table that renews itself on a terminal, else a line every five seconds."""

    def __init__(
        self, url: str | None = None, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url, self._clock = url, clock
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._live: Live | None = None
        self._next_line = 0.0

    def start(self) -> None:
        """Begin to draw; says where the page is."""
        if self._url:
            self._console.print(f"live page: {self._url}", soft_wrap=True)
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, soft_wrap=True)

    def publish(self, sample: Mapping[str, Any]) -> None:
        """Show a sample; the same dict as the page's."""
        if self._live is not None:
            self._live.update(_table(sample), refresh=True)
        elif self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_EVERY_S
            self._console.print(line(sample), soft_wrap=True, markup=False)

    def stop(self) -> None:
        """Leave the last state on the screen."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __enter__(self) -> Summary:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def line(sample: Mapping[str, Any]) -> str:
    """One plain line that says how it goes."""
    parts = [
        f"{_number(sample.get('t'))} s",
        f"events {_number(sample.get('events_in'))} ({_number(sample.get('events_per_s'))}/s)",
        f"trained {_number(sample.get('trained_examples'))}",
        f"version {sample.get('trainer_version') or '–'}, replica {sample.get('replica_version') or '–'}",
        f"freshness p99 {_number(_fresh(sample).get('p99'))} ms",
    ]
    if sample.get("ctr") is not None:
        parts.append(f"CTR {_percent(sample['ctr'])} (frozen {_percent(sample.get('ctr_frozen'))})")
    down = [f"{p['name']} {p['state']}" for p in sample.get("processes") or [] if p.get("state") != "up"]
    note = [sample["note"]] if sample.get("note") else []
    return " · ".join([*parts, *note, *down, *(sample.get("problems") or [])])


def _table(sample: Mapping[str, Any]) -> Group:
    fresh = _fresh(sample)
    grid = Table.grid(padding=(0, 3))
    for justify in ("left", "right", "left", "right"):
        grid.add_column(justify=justify, style="dim" if justify == "left" else "")
    get = sample.get
    grid.add_row("events in", _number(get("events_in")), "per second", _number(get("events_per_s")))
    grid.add_row("trained examples", _number(get("trained_examples")), "per second", _number(get("trained_per_s")))
    grid.add_row("version, trainer", get("trainer_version") or "–", "replica", get("replica_version") or "–")
    grid.add_row("freshness p50", f"{_number(fresh.get('p50'))} ms", "p99", f"{_number(fresh.get('p99'))} ms")
    if sample.get("ctr") is not None:
        grid.add_row("CTR, learned", _percent(sample["ctr"]), "frozen", _percent(sample.get("ctr_frozen")))
    for task, measured in (sample.get("prequential") or {}).items():
        grid.add_row(
            f"AUC, {task}", _number(measured.get("auc"), 3), "normalised entropy", _number(measured.get("ne"), 3)
        )
    counts = ("rejected", "duplicates", "late", "open")
    said = "   ".join(f"{name} {_number(sample.get(name))}" for name in counts if sample.get(name) is not None)
    workers = Text("   ").join(
        Text(f"{p['name']} {p['state']}" + (f" ({p['restarts']} restarts)" if p.get("restarts") else ""),
             "green" if p.get("state") == "up" else "bold red")
        for p in sample.get("processes") or []
    )  # fmt: skip
    head = Text(f"{_number(sample.get('t'))} s  ", "bold").append(str(sample.get("note") or ""), "not bold dim")
    wrong = [Text(problem, "bold red") for problem in sample.get("problems") or []]
    return Group(head, *wrong, grid, Text(said, "dim"), workers)


def _fresh(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    return sample.get("freshness_ms") or {}


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
