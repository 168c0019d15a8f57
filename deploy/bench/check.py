"""`headrace bench check`: have ratios become worse than those that were kept (kept.json)?

Ratios to a reference of the same run, never times; most of them of processor time, so that it matters little who else
uses the machine. Of each benchmark with sizes for it (suite.Bench.check) one run; where a ratio is worse than its kept
one by more than its tolerance, the benchmark runs again, up to RUNS times in all, and the best of them counts: what is
really slower is slower each time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.bench.common import run_bench
from deploy.bench.every import about
from deploy.bench.suite import BENCHES, Bench, Row, rows_of
from deploy.processes import write_atomically
from embedding_store.errors import HeadraceError

KEPT = Path(__file__).with_name("kept.json")
RUNS = 5  # a neighbour on the machine may spoil a minute: that of what waits for memory most
CHECKED = tuple(bench for bench in BENCHES.values() if bench.check is not None)


@dataclass(frozen=True)
class Compared:
    """A ratio beside the kept one."""

    name: str
    seen: float | None  # None: it was measured once, and no more
    kept: float | None  # None: nobody kept it
    tolerance: float
    less_is_better: bool
    runs: int  # that it is the best of

    @property
    def limit(self) -> float:
        """What it may just be."""
        assert self.kept is not None
        return self.kept * (1 + self.tolerance if self.less_is_better else 1 - self.tolerance)

    @property
    def worse(self) -> bool:
        if self.kept is None or self.seen is None:
            return True
        return self.seen > self.limit if self.less_is_better else self.seen < self.limit

    def line(self) -> str:
        """For readers, if it is worse."""
        if self.kept is None:
            return f"{self.name}: {self.seen:.3g}, and none is kept: --keep keeps it"
        if self.seen is None:
            return f"{self.name}: not measured; kept {self.kept:.3g}"
        may = f"{'at most' if self.less_is_better else 'at least'} {self.limit:.3g}"
        return f"{self.name}: {self.seen:.3g}, best of {self.runs}; kept {self.kept:.3g}, so {may}"


def measured(bench: Bench) -> dict[str, Any]:
    """One run, by its sizes for this."""
    assert bench.check is not None
    return run_bench([bench.command, *bench.check])


def check(
    kept: dict[str, float], benches: Iterable[Bench],
    measure: Callable[[Bench], dict[str, Any]] = measured, ran: Callable[[Bench, int], None] = lambda bench, run: None,
) -> list[Compared]:  # fmt: skip
    """All ratios beside the kept ones. `ran` is told of each run, from 1 on. Raises BenchError where one fails."""
    every: list[Compared] = []
    for bench in benches:
        best: dict[str, Compared] = {}
        for run in range(1, RUNS + 1):
            for name, row in ratios(bench, measure(bench)):
                seen, before = row.compared, best[name].seen if name in best else None
                if before is not None:
                    seen = min(seen, before) if row.less_is_better else max(seen, before)
                assert row.tolerance is not None
                best[name] = Compared(name, seen, kept.get(name), row.tolerance, row.less_is_better, run)
            ran(bench, run)
            if not any(ratio.worse and ratio.kept is not None for ratio in best.values()):
                break
        every += best.values()
        gone = [name for name in kept if name.startswith(f"{bench.name}: ") and name not in best]
        every += [Compared(name, None, kept[name], 0.0, False, run) for name in gone]
    return every


def ratios(bench: Bench, result: dict[str, Any]) -> list[tuple[str, Row]]:
    """(its name, row) of what is looked at."""
    return [(f"{bench.name}: {row.name}", row) for row in rows_of(bench, result) if row.tolerance is not None]


def keep(
    file: Path, benches: Iterable[Bench], measure: Callable[[Bench], dict[str, Any]] = measured,
    ran: Callable[[Bench, int], None] = lambda bench, run: None,
) -> dict[str, Any]:  # fmt: skip
    """Medians of RUNS runs of each benchmark are the kept ratios from now on. Raises BenchError, HeadraceError."""
    seen: dict[str, list[float]] = {}
    for bench in benches:
        for run in range(1, RUNS + 1):
            for name, row in ratios(bench, measure(bench)):
                seen.setdefault(name, []).append(row.compared)
            ran(bench, run)
    told = {**about(), "ratios": {name: round(statistics.median(values), 4) for name, values in seen.items()}}
    try:
        write_atomically(file, json.dumps(told, indent=1) + "\n")
    except OSError as error:
        raise HeadraceError(f"{file} cannot be written: {error.strerror}; choose another with --kept") from None
    return told


def kept_in(file: Path) -> dict[str, float]:
    """The kept ratios. Raises HeadraceError where there are none."""
    try:
        return json.loads(file.read_text("utf-8"))["ratios"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HeadraceError(f"{file} has no ratios ({error}): `headrace bench check --keep` makes it") from None


def as_json(ratios: list[Compared]) -> dict[str, Any]:
    """For --json."""
    told = {r.name: {k: v for k, v in asdict(r).items() if k != "name"} | {"worse": r.worse} for r in ratios}
    return {"ok": not any(r.worse for r in ratios), "ratios": told}
