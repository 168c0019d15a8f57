"""Figures of the ranker's parts: each against the ranker without it, on the logs of the comparison."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from tests.figures import compare
from tests.figures.common import Bench, Line, Row, headrace, say

# What [model] and [model.ranker] say where a part is left out …
PARTS = {
    "matches": {"ranker.matches": "false"},
    "neighbours": {"ranker.neighbours": "false"},
    "entire_space": {"ranker.entire_space": "false"},
    "watch_quantiles": {"ranker.watch_quantiles": "false"},
    "retrieval": {"retrieval": "0.0"},
}
# … and where one is taken in that is out of the defaults.
OUT = {"gates": {"ranker.gates": "true"}, "attention": {"ranker.attention": "true"}, "experts": {"ranker.experts": "3"}}
TASKS = {"kuairand": ("watch",), "taobao": ("purchase",), compare.SIMULATED: ("watch", "purchase")}
LOGS = (*compare.LOGS, compare.SIMULATED)


def _settings(changed: dict[str, str]) -> str:
    sections: dict[str, list[str]] = {}
    for name, value in changed.items():
        section, _, key = f"model.{name}".rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    return "".join(f"[{section}]\n" + "\n".join(lines) + "\n" for section, lines in sections.items())


def _figures(bench: Bench, log: str, changed: dict[str, str]) -> dict[str, Any]:
    """The means over the seeds of the ranker with these settings."""
    return bench.once((log, *changed.items()), lambda: _run(bench, log, changed))


def _run(bench: Bench, log: str, changed: dict[str, str]) -> dict[str, Any]:
    folder = bench.empty(f"ablation-{log}")
    path = compare.log_of(bench, log)
    (folder / "headrace.toml").write_text(_settings(changed), "utf-8")
    say(f"{log}: {', '.join(f'{name} = {value}' for name, value in changed.items()) or 'as it is'}")
    found = headrace(folder, "compare", log, path, "--systems", "headrace", "--seeds", compare.SEEDS)
    clicks = found["systems"]["headrace"]
    figures = {"AUC": clicks["auc"], "NE": clicks["ne"], "NDCG@10": clicks["ndcg_at_10"]}
    for task in TASKS.get(log, ()):  # the comparison is of clicks
        runs = [_prequential(folder, log, path, seed)[task] for seed in range(compare.SEEDS)]
        figures |= {f"{task} {name.upper()}": fmean(run[name] for run in runs) for name in ("auc", "ne")}
    return figures


def _prequential(folder: Path, log: str, path: Path, seed: int) -> dict[str, Any]:
    name = "events" if log == compare.SIMULATED else log
    return headrace(folder, "replay", name, path, "--direct", "--deterministic", "--seed", seed)["prequential"]


def _gained(with_it: dict[str, Any], without: dict[str, Any]) -> dict[str, float]:
    """What a part gains by figure (a smaller NE is a gain)."""
    return {
        name: without[name] - value if name.endswith("NE") else value - without[name]
        for name, value in with_it.items()
    }


def _row(what: str, gained: dict[str, float], wanted: str, holds: bool) -> Row:
    row = Row(what, ", ".join(f"{name} {value:+.4f}" for name, value in gained.items()), wanted, holds)
    say(f"{row.what}: {row.seen}")
    return row


def _pays(bench: Bench, log: str, part: str) -> list[Row]:
    """What a part gains, or what one that is out of the defaults would gain."""
    default = _figures(bench, log, {})
    if part in PARTS:
        gained = _gained(default, _figures(bench, log, PARTS[part]))
        return [_row(f"{log}, gained by {part}", gained, "one of them above 0", max(gained.values()) > 0)]
    gained = _gained(_figures(bench, log, OUT[part]), default)
    what = f"{log}, would be gained by {part}, which is out of the defaults"
    return [_row(what, gained, "0.002 at most", max(gained.values()) <= 0.002)]


def _line(log: str, part: str) -> Line:
    def line(bench: Bench) -> list[Row]:
        return _pays(bench, log, part)

    line.__doc__ = f"The ranker with and without {part}, {log}, means of {compare.SEEDS} seeds"
    return line


LINES: dict[str, Line] = {f"{log}.{part}": _line(log, part) for log in LOGS for part in (*PARTS, *OUT)}
