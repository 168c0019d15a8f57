"""Figures of the trainer's store, and of the whole system under torture."""

from __future__ import annotations

from tests.figures.common import Bench, Line, Row, at_least, at_most, headrace
from tests.figures.streams import passed
from tests.figures.torture import torture

KILLS, SEED = 50, 1


def bench(bench: Bench) -> list[Row]:
    """The row map, commits, restores and tiers on one core"""
    found = headrace(bench.empty("store"), "bench", "store")
    flat = found["checkpoint_flatness"]
    others = [name for name in found if name not in ("lookup_per_s", "admit_per_s", "restore_rows_per_s")]
    return [
        at_least("look-ups a second", found["lookup_per_s"], 30e6),
        at_least("admissions a second", found["admit_per_s"], 3e6),
        at_most("a commit with 1e5 to 1e7 rows in the table, largest to smallest", flat, 1.5, " ×"),
        at_least("rows restored a second", found["restore_rows_per_s"], 500_000),
        *(Row(name, str(found[name]), "", True) for name in others),
    ]


def planted(bench: Bench) -> list[Row]:
    """The torture finds each of six planted bugs"""
    return [passed("tests/deploy/test_torture.py", "-m", "nightly")]


def properties(bench: Bench) -> list[Row]:
    """Any sequence of admit, touch, expire, evict, reload, checkpoint, crash and restore is that of a dict; a crash at
    every fault point"""
    return [
        passed("tests/embedding_store"),
        passed("tests/online_model/test_crashes.py", "tests/end_to_end/test_fault_points.py"),
    ]


LINES: dict[str, Line] = {"bench": bench, "torture": torture(KILLS, SEED), "planted": planted, "properties": properties}
