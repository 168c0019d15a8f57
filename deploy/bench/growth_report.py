"""What `headrace bench growth` found, as plots and as the tables of docs/scale.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deploy.bench.capacity import NEEDED, Constants, Load, as_rows, breaks, constants_of, needs
from deploy.bench.growth import AXES, Axis
from deploy.bench.plots import growth_svg

FILE = "growth.json"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """The figures and a plot of each axis into `folder`/plots, the tables into `folder`/scale.md where that is there:
    what was written. Axes that were measured on the same machine before, and not now, stay."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    written = [plots / FILE]
    result = _with_earlier(result, written[0])
    written[0].write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["axes"].items():
        written.append(plots / f"growth-{name}.svg")
        written[-1].write_text(plot(AXES[name], found))
    page = folder / "scale.md"
    if page.exists():
        page.write_text(filled(page.read_text(), result))
        written.append(page)
    return written


def _with_earlier(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The figures, with the axes of `file` that are not among them; another machine's are not."""
    try:
        earlier = json.loads(file.read_text())
        same = earlier["machine"] == result["machine"]
        axes = earlier["axes"] | result["axes"] if same else result["axes"]
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or it is another's
        axes = result["axes"]
    return {**result, "axes": {name: axes[name] for name in AXES if name in axes}}


def filled(page: str, result: dict[str, Any]) -> str:
    """The page with its tables between `<!-- NAME:begin -->` and `<!-- NAME:end -->` made anew."""
    parts = {"growth": growth_table(result), "machine": f"On {result['machine']}."}
    if result["axes"].keys() >= NEEDED:  # else what the model says stays as an earlier run had it
        constants = constants_of(result)
        parts |= {"constants": constants_table(constants), "capacity": capacity_table(constants)}
    parts |= {f"axis-{name}": axis_table(AXES[name], found) for name, found in result["axes"].items()}
    for name, text in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        new = f"{begin}\n{text}\n{end}".replace("\\", "\\\\")  # a template, in which a backslash is none
        page = re.sub(f"{begin}.*?{end}", new, page, flags=re.DOTALL)
    return page


def growth_table(result: dict[str, Any]) -> str:
    """An axis a row."""
    rows = []
    for name, found in result["axes"].items():
        points, axis = found["points"], AXES[name]
        first, last = (list(points.items())[at] for at in (0, -1))
        steepest = max(found["slopes"], default=None)
        rows.append((
            name, f"{int(first[0]):,} … {int(last[0]):,} {axis.x}", f"µs per {axis.per}", _number(first[1]["cpu_us"]),
            _number(last[1]["cpu_us"]), ("flat", "in proportion")[axis.expected], _number(found["slope"]),
            _number(steepest), "–" if found["knee"] is None else f"{found['knee']:,}",
            f"{first[1]['rss_mb']:,.0f} … {last[1]['rss_mb']:,.0f}",
        ))  # fmt: skip
    head = ("axis", "from … to", "cost", "first", "last", "wanted", "slope", "steepest", "knee", "memory, MB")
    return table(head, rows)


def axis_table(axis: Axis, found: dict[str, Any]) -> str:
    """A point a row: all its figures."""
    points = found["points"]
    figures = [figure for point in points.values() for figure in point.items()]
    names = list(dict.fromkeys(name for name, value in figures if isinstance(value, int | float)))
    rows = [(f"{int(x):,}", *(_number(point.get(name)) for name in names)) for x, point in points.items()]
    return table((axis.x, *(name.replace("_", " ") for name in names)), rows)


def constants_table(constants: Constants) -> str:
    """The constants of the model."""
    return table(("constant", "value"), [(f"`{name}`", _number(value)) for name, value in as_rows(constants)])


def capacity_table(constants: Constants) -> str:
    """What loads need, and what breaks first."""
    loads = {
        "10 k events/s, 1e7 ids, 2 replicas": Load(1e4, 1e7, replicas=2),
        "100 k events/s, 1e8 ids, 4 replicas": Load(1e5, 1e8, replicas=4),
        "1 M events/s, 1e9 ids, 10 replicas": Load(),
    }
    found = [needs(constants, load) for load in loads.values()]
    rows = [(f"`{name}`", *(_number(need[name]) for need in found)) for name in found[0]]
    first = table(("what breaks, first of all first", "at"), [(w, _whole(n)) for w, n in breaks(constants, Load())])
    return f"{table(('need', *loads), rows)}\n\n{first}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(axis: Axis, found: dict[str, Any]) -> str:
    """Cost, and the axis' other series, over x."""
    points = {int(x): point for x, point in found["points"].items()}
    names = {"cpu_us": f"µs per {axis.per}", **{n: n.removesuffix("_us").replace("_", " ") for n in axis.series}}
    lines = {said: {x: p[name] for x, p in points.items() if p.get(name)} for name, said in names.items()}
    return growth_svg(axis.title, axis.x, lines, found["knee"])


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    if value and abs(value) < 100:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:,.0f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"
