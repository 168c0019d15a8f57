"""Figures of the comparison: Headrace against its peers on five logs, three seeds, with one set of hyper-parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.figures.common import Bench, Line, Row, at_least, headrace, public, say
from tests.figures.replay import KUAIRAND, TAOBAO_BY_USER

LOGS = {
    "taobao": TAOBAO_BY_USER, "kuairand": KUAIRAND, "movielens": "ml-100k/ml-100k.inter.gz",
    "yoochoose": "yoochoose/yoochoose-clicks-100k_train_full.tsv.gz",
}  # fmt: skip
SIMULATED = "simulated"
EVENTS, WORLD_SEED = 150_000, 1
# Four days, in which tastes turn right round and every item is replaced.
WORLD = """[simulator]
requests_per_s = 0.05
item_life_s = 100000.0
taste_turn_s = 300000.0
time_scale = 1.0
restock_s = 20000.0
"""
SEEDS = int(os.environ.get("SEEDS", "3"))
WANTED = {"auc": "AUC", "ne": "normalised entropy", "ndcg_at_10": "NDCG@10"}
# Strategies of feedback that say a click before it is known whether it was bought, with what else they need.
EARLY = {
    "calibrated": "", "weighted": '[model]\nfeedback = "weighted"\n',
    "elapsed": '[model]\nfeedback = "elapsed"\n[join]\npurchase_wait_ms = 3600000\n',
}  # fmt: skip
CALIBRATED, ENOUGH = (0.97, 1.03), 5_000  # of the last half, from so many positives on


def _compared(bench: Bench, name: str) -> dict[str, Any]:
    """The JSON of `headrace compare` on a log, with intervals."""
    return bench.once(("compare", name), lambda: _compare(bench, name))


def log_of(bench: Bench, name: str) -> Path:
    """The path of a log."""
    return bench.once(("log", name), lambda: _simulated(bench) if name == SIMULATED else public(LOGS[name]))


def _simulated(bench: Bench) -> Path:
    folder = bench.empty("compare-world")
    (folder / "headrace.toml").write_text(WORLD, "utf-8")
    headrace(folder, "simulate", "--events", EVENTS, "--seed", WORLD_SEED, "--out", "log.jsonl.gz")
    return folder / "log.jsonl.gz"


def _compare(bench: Bench, name: str) -> dict[str, Any]:
    folder, path = bench.empty(f"compare-{name}"), log_of(bench, name)
    say(f"{name}: {SEEDS} seeds")
    found = headrace(folder, "compare", name, path, "--seeds", SEEDS, "--intervals")
    for line in _table(found):
        say(line)
    return found


def _table(found: dict[str, Any]) -> list[str]:
    """The means over the seeds, as a table in Markdown."""
    columns = ("auc", "ne", "calibration", "hr_at_10", "ndcg_at_10", "mrr")
    lines = [f"| system | {' | '.join(columns)} | auc, known items | ndcg_at_10, known items |", "|---" * 9 + "|"]
    for name, figures in found["systems"].items():
        cells = [figures[column] for column in columns]
        cells += [figures["known_items"][column] for column in ("auc", "ndcg_at_10")]
        lines.append(f"| {name} | " + " | ".join("–" if cell is None else f"{cell:.4f}" for cell in cells) + " |")
    return lines


def _beats(bench: Bench, name: str) -> list[Row]:
    """A row for each other system and figure: the worst end of the seeds' intervals of the difference."""
    found = _compared(bench, name)
    rows = []
    for other in found["runs"][0]["differences"]:
        for figure, title in WANTED.items():
            intervals = [run["differences"][other][figure] for run in found["runs"]]
            if None in intervals:
                continue
            ahead = [-high if figure == "ne" else low for low, high in intervals]
            own, theirs = (found["systems"][system][figure] for system in ("headrace", other))
            what = f"{name}, {title} {own:.4f}, {other} {theirs:.4f}: least lead of {SEEDS} seeds, 95 %"
            rows.append(Row(what, f"{min(ahead):+.4f}", "above 0", min(ahead) > 0))
    return rows + _calibration(name, found)


def _calibration(name: str, found: dict[str, Any]) -> list[Row]:
    """Predicted over actual clicks of the last half: in bounds where clicks are many and true, else with 1 inside."""
    if found["about"]["implicit"]:
        return []  # no click rate is claimed
    rows, (least, most) = [], CALIBRATED
    for run in found["runs"]:
        half = run["systems"]["headrace"]["last_half"]
        low, high = run["systems"]["headrace"]["intervals"]["calibration_last_half"]
        if half["positives"] >= ENOUGH:
            holds, wanted = least <= half["calibration"] <= most, f"{least} to {most}"
        else:
            holds, wanted = low <= 1 <= high, "1 in the interval"
        seen = f"{half['calibration']:.4f} ({low:.4f} to {high:.4f})"
        rows.append(Row(f"{name}, predicted / actual, last half, seed {run['seed']}", seen, wanted, holds))
    return rows


def _fresher(bench: Bench, name: str) -> list[Row]:
    """A serving copy that is fresher is better."""
    found = _compared(bench, name)["intervals"]
    seen = {interval: figures["auc"] for interval, figures in found.items()}
    lead = seen["1 s"] - seen["never"]
    said = ", ".join(f"{interval} {auc:.4f}" for interval, auc in seen.items())
    return [at_least(f"{name}, AUC brought up to date every: {said}; every second less never", lead, 0.0)]


def _early(bench: Bench, name: str, feedback: str) -> list[Row]:
    folder, path = bench.empty(f"early-{name}"), log_of(bench, name)
    (folder / "headrace.toml").write_text(EARLY[feedback], "utf-8")
    found = headrace(folder, "compare", name, path, "--systems", "headrace", "--seeds", SEEDS)
    return _calibration(f"{name}, {feedback}", found)


def early(bench: Bench) -> list[Row]:
    """Clicks, predicted over actual, by the strategies that learn a purchase's click at once"""
    logs = ("kuairand", "movielens", SIMULATED)  # those with impressions
    return [row for name in logs for feedback in EARLY for row in _early(bench, name, feedback)]


def taobao(bench: Bench) -> list[Row]:
    """Taobao, 983 users in time order: Headrace and its peers"""
    return _beats(bench, "taobao")


def kuairand(bench: Bench) -> list[Row]:
    """KuaiRand, short videos: Headrace and its peers"""
    return _beats(bench, "kuairand")


def movielens(bench: Bench) -> list[Row]:
    """MovieLens 100K, a rating of 4 and more is a click: Headrace and its peers"""
    return _beats(bench, "movielens")


def yoochoose(bench: Bench) -> list[Row]:
    """YooChoose, sessions of a shop: Headrace and its peers"""
    return _beats(bench, "yoochoose")


def simulator(bench: Bench) -> list[Row]:
    """The simulator, tastes that drift: Headrace and its peers"""
    return _beats(bench, SIMULATED)


def freshness(bench: Bench) -> list[Row]:
    """The interval at which a serving copy is brought up to date, against AUC"""
    return [row for name in ("taobao", SIMULATED) for row in _fresher(bench, name)]


LINES: dict[str, Line] = {
    "taobao": taobao, "kuairand": kuairand, "movielens": movielens, "yoochoose": yoochoose, "simulator": simulator,
    "freshness": freshness, "early": early,
}  # fmt: skip
