"""Figures of the streams: intake, joiner, delayed purchases; and the long runs of what the tests prove."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.figures import feedback
from tests.figures.common import ROOT, Bench, FigureError, Line, Row, at_least, at_most, environment, headrace, say

SEEDS = (1, 2, 3)
OUTAGE_S = 20


def intake(bench: Bench) -> list[Row]:
    """Whole batches through Faust, beside stock Faust and the bare client"""
    found = headrace(bench.empty("intake"), "bench", "intake")
    per_s = {name: f"{found[name]:,.0f} events/s" for name in found if name.endswith("per_s")}
    return [
        *(Row(name, seen, "for the ratios", True) for name, seen in per_s.items()),
        at_least("to Faust, an event at a time", found["ratio_to_faust"], 20, " ×"),
        at_least("to the bare client on the same topic", found["ratio_to_limit"], 0.5, " ×"),
    ]


def join(bench: Bench) -> list[Row]:
    """The joiner with its store on one core, standard mix"""
    found = headrace(bench.empty("join"), "bench", "join")
    few, many = found["rss_growth_mb"], found["rss_growth_mb_10x_open"]
    return [
        at_least("events/s, features, store and blocks included", found["events_per_s"], 60_000),
        Row("events/s of the plain reference, without any of these", f"{found['reference_per_s']:,.0f}", "", True),
        Row(f"events/s with {found['open_10x']:,} open", f"{found['events_per_s_10x_open']:,.0f}", "", True),
        Row(f"memory above the start, {found['open']:,} examples open", f"{few:.0f} MB", "", True),
        at_most(f"the same with {found['open_10x']:,}, to that", many / few, 1.2, " ×"),
        Row("rows as the reference has them", str(found["digest_equal"]), "True", found["digest_equal"]),
    ]


def delays(bench: Bench) -> list[Row]:
    """Predicted over actual purchase rate on a stream with known delays"""
    rows = []
    for name in feedback.STRATEGIES:
        say(f"feedback {name}")
        ratios = [feedback.measure(name, seed).ratio for seed in SEEDS]
        low, high = min(ratios), max(ratios)
        corrected = name != "none"
        holds = not corrected or 0.95 <= low <= high <= 1.05
        rows.append(Row(name, f"{low:.3f} to {high:.3f}", "0.95 to 1.05" if corrected else "(uncorrected)", holds))
    return rows


def mutations(bench: Bench) -> list[Row]:
    """100,000 mutated records: each is refused and kept, or rightly accepted, and all between them are joined"""
    files = "tests/streams/test_dead_letters.py", "tests/streams/test_joiner.py"
    return [passed(*files, "-k", "mutated", MUTATED_RECORDS="100000")]


def moves(bench: Bench) -> list[Row]:
    """Two join workers, one killed, one added, partitions that move away and back, a broker that stops"""
    name = "workers_come_and_go"
    return [passed("tests/streams/test_join_moves.py", "-k", name, BROKER_OUTAGE_S=str(OUTAGE_S))]


def properties(bench: Bench) -> list[Row]:
    """Any shuffle, duplication, batching and crash gives the multiset of the reference"""
    return [passed("tests/streams/test_joiner.py", "tests/streams/test_join_store.py", "tests/replay/test_faults.py")]


def skew(bench: Bench) -> list[Row]:
    """Replayed with served impressions, features differ nowhere"""
    return [passed("tests/replay/test_skew.py")]


def passed(*arguments: str, **variables: str) -> Row:
    """Tests that must pass: how many did."""
    words = [sys.executable, "-m", "pytest", "-q", "--timeout", "600", *arguments]
    done = subprocess.run(words, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, check=False)
    counted = re.search(r"(\d+) passed.*", done.stdout)
    if counted is None:
        raise FigureError(f"no test ran: {done.stdout[-300:]} {done.stderr[-300:]}")
    return Row(" ".join(arguments), counted[0], "all pass", done.returncode == 0)


LINES: dict[str, Line] = {
    "properties": properties, "intake": intake, "join": join, "delays": delays, "mutations": mutations, "moves": moves,
    "skew": skew,
}  # fmt: skip
