"""Figures of the whole system under torture.

Stores, snapshots and torture.log (what was done when) of the latest run are left in .headrace/torture-KILLS-SEED, or
below TORTURE_OUT, for whoever wants to know why.
"""

from __future__ import annotations

import os
from pathlib import Path

from deploy.torture import WRONG
from tests.figures.common import ROOT, Bench, Line, Row, equal, headrace

TOLD = (
    "faults", "damages", "events", "examples", "left_out", "answers", "answers_compared", "versions_checked",
    "ends_without_broker", "seconds", "digest",
)  # fmt: skip


def torture(kills: int, seed: int) -> Line:
    """The line of `headrace torture --kills N --seed S`."""

    def line(bench: Bench) -> list[Row]:
        folder = Path(os.environ.get("TORTURE_OUT", ROOT / ".headrace")) / f"torture-{kills}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "torture.log"
        found = headrace(folder, "torture", "--kills", kills, "--seed", seed, "--data-dir", folder / "data", log=log)
        return [
            *(equal(name, found[name], 0) for name in WRONG),
            equal("the checkpoint has the digest of the undisturbed run", found["digest_equal"], True),
            *(Row(name, str(found[name]), "", True) for name in TOLD),
        ]

    line.__doc__ = f"Real workers under a real broker, {kills} kills and the other faults between them, seed {seed}"
    return line
