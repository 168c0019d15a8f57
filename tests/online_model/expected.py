"""What a run must have come to, from its log and its marks alone. Imports nothing of the system.

A deterministic run learns the rows of its log in one order: (closing time, example id, part). So what it has learned
is a prefix of that order, and counts and sums follow from its length. The marks (as RocksDB's db_stress keeps an
expected state) say which lengths are possible: that of the last commit that was done, or, if it was killed in a
commit, of the one that was pending.
"""

from __future__ import annotations

import json
from pathlib import Path

WRAP = 2**64


class Expected:
    """`log`: JSON lines {"partition", "closed", "example_id", "part", "row_id"}."""

    def __init__(self, log: Path) -> None:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        self._rows = sorted(rows, key=lambda row: (row["closed"], row["example_id"], row["part"]))

    def after(self, count: int) -> dict[int, list[int]]:
        """partition → [rows, sum of their ids] once the first `count` rows are learned."""
        told: dict[int, list[int]] = {}
        for row in self._rows[:count]:
            at = told.setdefault(row["partition"], [0, 0])
            at[0] += 1
            at[1] = (at[1] + row["row_id"]) % WRAP
        return told

    def check(self, marks: Path) -> None:
        """Raises AssertionError unless every start found what the marks before it allow, and learned only prefixes."""
        possible: list[int] = [0]
        for line in marks.read_text().splitlines():
            mark = json.loads(line)
            told = {int(p): rows for p, rows in mark["rows"].items() if rows[0]}
            count = sum(rows for rows, _ in told.values())
            assert told == self.after(count), f"{line}: not the first {count} rows of the log"
            if mark["mark"] == "opened":
                assert count in possible, f"opened with {count} rows, but {possible} were committed or pending"
                possible = [count]
            elif mark["mark"] == "pending":
                possible = [*possible, count]
            else:
                assert count == possible[-1]
                possible = [count]

    def all(self) -> dict[int, list[int]]:
        """After the whole log."""
        return self.after(len(self._rows))
