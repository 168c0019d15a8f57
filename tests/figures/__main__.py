"""Prints the figures that Headrace promises: `make figures`, or `make figures ONLY=replay` or `ONLY=replay.kills`.

One Markdown table for each line on stdout, all of it as JSON in a file, progress on stderr. Exit 1 if a figure that is
expected to hold does not; the ones that are known to fall short are named with their limit. Modules are those of
MODULES, each with its LINES.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.figures import (
    ablation,
    backfill,
    compare,
    off_policy,
    operations,
    proof,
    publish,
    replay,
    replica,
    retrieval,
    serve,
    store,
    streams,
    train,
)
from tests.figures.common import Bench, FigureError, Line, Row, say

MODULES: dict[str, dict[str, Line]] = {
    "ablation": ablation.LINES, "backfill": backfill.LINES, "compare": compare.LINES, "offpolicy": off_policy.LINES,
    "operations": operations.LINES, "proof": proof.LINES, "publish": publish.LINES, "replay": replay.LINES,
    "replica": replica.LINES, "retrieval": retrieval.LINES, "serve": serve.LINES, "store": store.LINES,
    "streams": streams.LINES, "train": train.LINES,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="figures", description=__doc__)
    parser.add_argument("only", nargs="*", help="modules or lines: replay, replay.kills; without any: all")
    parser.add_argument("--out", type=Path, default=Path(".headrace/figures.json"), help="the JSON file")
    given = parser.parse_args()
    lines = {f"{module}.{name}": line for module, some in MODULES.items() for name, line in some.items()}
    unknown = [name for name in given.only if not any(_is_of(line, name) for line in lines)]
    if unknown:
        parser.error(f"no figures are named {', '.join(unknown)}; there are {', '.join([*MODULES, *lines])}")
    chosen = {n: line for n, line in lines.items() if not given.only or any(_is_of(n, name) for name in given.only)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    python = platform.python_version()
    machine = f"{os.cpu_count()} processors, {platform.system()} {platform.machine()}, Python {python}"
    sys.stdout.write(f"On {machine}.\n")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-figures-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder))
        for number, (name, line) in enumerate(chosen.items(), 1):
            say(f"{name}, {number} of {len(chosen)}")
            results[name] = _measured(name, line, bench)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine, "lines": results}, indent=1), "utf-8")
    short = [f"{name}: {row['what']}" for name, found in results.items() for row in found["rows"] if row["known_short"]]
    failed = [f"{name}: {row['what']}" for name, found in results.items() for row in found["rows"] if row["fails"]]
    for title, rows in (("Known to fall short", short), ("Do not hold", failed)):
        sys.stdout.write(f"\n{title}: {len(rows)}\n" + "".join(f"- {row}\n" for row in rows))
    say(f"written to {given.out}")
    return 1 if failed else 0


def _is_of(line: str, name: str) -> bool:
    """Whether it is this line, or one of several that begin with this name."""
    return f"{line}.".startswith(f"{name}.")


def _measured(name: str, line: Line, bench: Bench) -> dict[str, Any]:
    """The figures of a line, printed as they are found."""
    start = time.monotonic()
    try:
        rows = line(bench)
    except FigureError as error:
        rows = [Row("the line itself", str(error).replace("\n", " "), "figures", False)]
    seconds = round(time.monotonic() - start, 1)
    title = (line.__doc__ or name).strip().splitlines()[0]
    cells = [("figure", "seen", "wanted", "verdict"), ("---",) * 4]
    cells += [(row.what, row.seen, row.wanted, row.verdict) for row in rows]
    table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in cells)
    sys.stdout.write(f"\n### {name}: {title} ({seconds} s)\n\n{table}")
    sys.stdout.flush()
    found = [asdict(row) | {"fails": row.fails, "known_short": not row.holds and not row.fails} for row in rows]
    return {"title": title, "seconds": seconds, "holds": not any(row.fails for row in rows), "rows": found}


if __name__ == "__main__":
    sys.exit(main())
