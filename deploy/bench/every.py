"""`headrace bench all`: every benchmark, and what they say as JSON, Markdown and plots.

Each is a process of its own (`headrace bench NAME --json`). What it found is written at once: into benchmarks.json,
into its block of benchmarks.md, between `<!-- figures NAME -->` and `<!-- end -->`, and into plots/NAME.svg. All else
in benchmarks.md is written by people, and stays; a block that is not there yet is put at the end. One that fails
leaves what was there before.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from deploy.bench.common import BenchError, machine, plots_folder, run_bench
from deploy.bench.plots import figures_svg, ratios_svg, said
from deploy.bench.suite import BENCHES, Bench, Limit, Row, rows_of
from deploy.processes import write_atomically
from embedding_store.errors import HeadraceError, UsageError

PACKAGES = (
    "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "faust-streaming", "aiokafka", "rocksdict", "numba", "numpy",
    "river", "vowpalwabbit",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
RATIOS = "ratios"  # the block of all of them
_BEGIN, _END = "<!-- figures {} -->", "<!-- end -->"


def chosen(only: Sequence[str], quick: bool) -> list[Bench]:
    """The benchmarks of these names, or all, in the order of BENCHES. Raises UsageError."""
    there = {name: bench for name, bench in BENCHES.items() if not quick or bench.quick is not None}
    unknown = [name for name in only if name not in there]
    if unknown:
        kind = "quick benchmark" if quick else "benchmark"
        raise UsageError(f"no {kind} is named {', '.join(unknown)}; there are {', '.join(there)}")
    return [bench for name, bench in there.items() if not only or name in only]


def bench_all(
    benches: Sequence[Bench], out: Path, quick: bool, bootstrap: str | None,
    begins: Callable[[Bench], None], ended: Callable[[Bench, float, str], None],
) -> dict[str, Any]:  # fmt: skip
    """Run them, and write what they found as it comes: {"benchmarks": {name: entry}, "failed": {name: why}}.

    `ended` is told of each how many seconds it took and why it failed ("" if it did not). Raises HeadraceError where
    `out` cannot be written.
    """
    report, stamp = Report(out), about()
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for bench in benches:
        begins(bench)
        began, load = time.monotonic(), os.getloadavg()[0]
        arguments = bench.arguments(quick, bootstrap)
        try:
            result = run_bench(arguments)
        except BenchError as error:
            failed[bench.name] = str(error)
        else:
            versions = stamp["versions"] | ({} if bootstrap or not bench.broker else {"kafka": _kafka()})
            seconds = round(time.monotonic() - began, 1)
            command = " ".join(["headrace bench", *bench.arguments(quick)])
            found[bench.name] = {**stamp, "versions": versions, "date": _now(), "command": command,
                                 "seconds": seconds, "load_before": round(load, 2), "result": result}  # fmt: skip
            report.add(bench.name, found[bench.name])
        ended(bench, time.monotonic() - began, failed.get(bench.name, ""))
    return {"benchmarks": found, "failed": failed}


def about() -> dict[str, Any]:
    """Where and of what figures are: machine, versions of what is installed, commit."""
    versions = {"python": platform.python_version()}
    for name in ("headrace", *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of fbgemm's two
    commit, clean = _commit()
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    return {"machine": f"{machine()}, {memory}", "versions": versions, "commit": commit, "clean": clean}


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this checkout, and whether nothing but docs/ differs from it; None where it is none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") != str(ROOT):
        return None, None  # installed somewhere inside another repository
    return git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain", "--", ".", ":!docs") == ""


def _kafka() -> str:
    from deploy.kafka_jars import KAFKA_VERSION

    return KAFKA_VERSION


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


class Report:
    """benchmarks.json, benchmarks.md and plots/ in a folder: what is there stays, but for what is added."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._json, self._page = folder, folder / "benchmarks.json", folder / "benchmarks.md"
        plots_folder(folder)
        try:
            self.entries: dict[str, Any] = json.loads(self._json.read_text("utf-8")) if self._json.exists() else {}
            if not all("result" in entry for entry in self.entries.values()):
                raise ValueError("it is of something else")
        except OSError as error:
            raise HeadraceError(
                f"{folder} cannot be used: {error.strerror}; choose another folder with --out"
            ) from None
        except (ValueError, TypeError, AttributeError):
            raise HeadraceError(f"{self._json} is not JSON of benchmarks: put it right, or remove it") from None

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """An entry of bench_all: its figures are in all files afterwards."""
        self.entries[name] = entry
        self.entries = {key: self.entries[key] for key in [*BENCHES, *self.entries] if key in self.entries}
        rows = rows_of(BENCHES[name], entry["result"])
        every = list(self._all_rows())
        text = self._page.read_text("utf-8") if self._page.exists() else "# Benchmarks\n"
        text = with_block(text, RATIOS, ratios_block(every))
        text = with_block(text, name, block(name, entry, rows))
        write_atomically(self._json, json.dumps(self.entries, indent=1) + "\n")
        write_atomically(self._folder / "plots" / f"{name}.svg", figures_svg(entry["command"], rows))
        write_atomically(self._folder / "plots" / f"{RATIOS}.svg", ratios_svg("Ratios to the references", every))
        write_atomically(self._page, text)

    def _all_rows(self) -> Iterator[tuple[str, Row]]:
        """(benchmark, figure) of all entries whose benchmark is known."""
        for name, entry in self.entries.items():
            if name in BENCHES:
                for row in rows_of(BENCHES[name], entry["result"]):
                    yield name, row


def with_block(text: str, name: str, inside: str) -> str:
    """The page with this between the marks of `name`; where there are none, at its end below a heading."""
    begin = _BEGIN.format(name)
    whole = f"{begin}\n{inside}{_END}"
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(_END), re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: whole, text, count=1)
    return f"{text.rstrip()}\n\n## {name}\n{whole}\n"


def block(name: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The table of a benchmark, with where and of what it is, and its plot."""
    cells = [
        ("figure", "value", "reference", "its value", "ratio", "wanted"),
        ("---", "---:", "---", "---:", "---:", "---"),
    ]
    for row in rows:
        reference = "" if row.reference_value is None else said(row.reference_value)
        ratio = "" if row.ratio is None else said(row.ratio)
        wanted = _wanted(row.wanted, row.seen)
        if row.wanted is not None and row.wanted.of_value and row.ratio is not None:
            wanted += " (the value)"
        cells.append((row.what, said(row.value), row.reference, reference, ratio, wanted))
    versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
    state = "no checkout" if entry["commit"] is None else entry["commit"] + ("" if entry["clean"] else ", with changes")
    return (
        f"`{entry['command']}`, {entry['date']}, {entry['seconds']:.0f} s; load before it {entry['load_before']}\n\n"
        f"{_table(cells)}\n![{name}](plots/{name}.svg)\n\n"
        f"On {entry['machine']}. Commit: {state}. {versions}.\n"
    )


def ratios_block(rows: Sequence[tuple[str, Row]]) -> str:
    """All ratios, and whatever else something is wanted of."""
    cells = [("benchmark", "figure", "seen", "wanted"), ("---", "---", "---:", "---")]
    for name, row in rows:
        if row.ratio is not None:
            wanted = None if row.wanted is not None and row.wanted.of_value else row.wanted
            cells.append((name, row.name, f"{said(row.ratio)} ×", _wanted(wanted, row.ratio)))
        if row.wanted is not None and (row.ratio is None or row.wanted.of_value):
            cells.append((name, row.what, said(row.value), _wanted(row.wanted, row.value)))
    return f"{_table(cells)}\n![{RATIOS}](plots/{RATIOS}.svg)\n"


def _wanted(limit: Limit | None, seen: float) -> str:
    if limit is None:
        return ""
    text = f"{'at most' if limit.most else 'at least'} {said(limit.bound)}"
    return text if limit.holds(seen) else f"**{text}: falls short**"


def _table(cells: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in cells)
