"""Plots as SVG files, which a browser and GitHub show as they are, drawn by matplotlib.

The same figures give the same bytes, whatever settings of matplotlib are on a machine. Text stays text, in the font
that a reader has; on white, so that it can be read on a dark page too. matplotlib takes half a second to import, so it
is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deploy.bench.suite import Row

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LINE = 10.0, 0.24  # inches: of a plot, and of each bar in it
PANEL, COLUMNS = (3.3, 1.2), 3  # inches; panels beside each other
OURS, THEIRS, MARK, GRID = "#1b6ca8", "#a9b4be", "#b3261e", "#d5dbe1"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "headrace", "text.parse_math": False, "path.simplify_threshold": 1.0,
    "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 8, "lines.linewidth": 1.5,
    "axes.prop_cycle": f"cycler(color=['{OURS}', '#b35900', '#2a7d4f'])",
    "axes.autolimit_mode": "round_numbers", "axes.axisbelow": True, "grid.color": GRID, "axes.edgecolor": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": "black", "ytick.labelcolor": "black",
}  # fmt: skip


def figures_svg(title: str, rows: Sequence[Row]) -> str:
    """Each figure above its reference, on a scale of their own; those of a dict have one scale."""
    alone = [row for row in rows if row.reference_value is None]
    bars: list[tuple[str, float, float, str]] = []  # label, figure, the longest bar's, colour
    for row in rows:
        if row.reference_value is None:
            most = max(abs(other.value) for other in alone if other.pattern == row.pattern)
            bars.append((row.what, row.value, most, OURS))
        else:
            most = max(row.value, row.reference_value)
            bars.append((row.what, row.value, most, OURS))
            bars.append((f"– {row.reference}", row.reference_value, most, THEIRS))
    shares = [max(value, 0.0) / most if most > 0 else 0.0 for _, value, most, _ in bars]
    with _svg(title, (WIDTH, LINE * (len(bars) + 2))) as (figure, file):
        axes = figure.add_subplot()
        axes.barh(range(len(bars)), shares, 0.7, color=[color for *_, color in bars])
        axes.set(xlim=(0, 1), xticks=())
        axes.spines[:].set_visible(False)
        _beside_bars(axes, [label for label, *_ in bars], [said(value) for _, value, *_ in bars])
    return file.getvalue()


def ratios_svg(title: str, rows: Sequence[tuple[str, Row]]) -> str:
    """(benchmark, figure) → all ratios on one logarithmic scale, from 1 on, with a mark at what is wanted."""
    seen = [(name, row, row.ratio) for name, row in rows if row.ratio is not None and row.ratio > 0]
    marks = [(wanted, place) for place, (_, row, _) in enumerate(seen) if (wanted := _wanted(row))]
    with _svg(title, (WIDTH, LINE * (len(seen) + 4))) as (figure, file):
        axes = figure.add_subplot(xscale="log")
        axes.barh(range(len(seen)), [ratio - 1 for *_, ratio in seen], 0.7, left=1, color=OURS)
        axes.plot([at for at, _ in marks], [place for _, place in marks], "|", color=MARK, ms=13, mew=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("times the reference; red: what is wanted")
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g} ×")
        axes.grid(axis="x")
        _beside_bars(axes, [f"{name}: {row.name}" for name, row, _ in seen], [f"{said(ratio)} ×" for *_, ratio in seen])
    return file.getvalue()


def growth_svg(title: str, x: str, lines: Mapping[str, Mapping[int, float]], knee: int | None) -> str:
    """name → {x: y}, on two logarithmic scales, with a line where the knee is."""
    from matplotlib.ticker import EngFormatter, NullLocator

    with _svg(title, (0.7 * WIDTH, 3.4)) as (figure, file):
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel=x)
        axes.set_xticks(sorted({at for points in lines.values() for at in points}))  # and no other decades
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(lambda y, _: said(y))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        for name, points in lines.items():
            axes.plot(list(points), list(points.values()), "o-", ms=4, label=name)
        axes.grid(axis="y")
        if knee is not None:
            axes.axvline(knee, color=MARK, linestyle="--", linewidth=1)
            axes.annotate(
                f"knee: {said(knee)}", (knee, 0.94), (-4, 0), axes.get_xaxis_transform(), "offset points",
                ha="right", color=MARK,
            )  # fmt: skip
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(lines), frameon=False)
    return file.getvalue()


def curves_svg(title: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """name → (seconds [n], values [n]), in a panel each, from 0 to the largest of both. None of what has no values."""
    there = {name: curve for name, curve in curves.items() if len(curve[0])}
    wide, high = PANEL
    rows = max(math.ceil(len(there) / COLUMNS), 1)
    with _svg(title, (wide * COLUMNS, high * rows + 2 * LINE)) as (figure, file):
        for number, (name, (at, values)) in enumerate(there.items(), start=1):
            most, longest = float(values.max()), float(at.max())
            axes = figure.add_subplot(rows, COLUMNS, number, xticks=(), yticks=())
            axes.set(xlim=(0, longest if longest > 0 else 1), ylim=(0, most if most > 0 else 1))
            axes.set_title(f"{name}: up to {said(most)}, {said(longest)} s", loc="left")
            axes.plot(at, values, linewidth=1, clip_on=False)
    return file.getvalue()


def said(value: float) -> str:
    """A figure for readers: three digits that count, at least."""
    if isinstance(value, bool):
        return str(value).lower()
    size = abs(value)
    if value == int(value) or size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


@contextmanager
def _svg(title: str, size: tuple[float, float]) -> Iterator[tuple[Figure, io.StringIO]]:
    """An empty figure of so many inches, and the file that has it as SVG afterwards."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure, file = Figure(size, layout="constrained"), io.StringIO()
        figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
        yield figure, file
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None, "Creator": None})


def _beside_bars(axes: Axes, labels: Sequence[str], texts: Sequence[str]) -> None:
    """What is left and right of each bar, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    for place, text in enumerate(texts):
        axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center")


def _wanted(row: Row) -> float | None:
    return None if row.wanted is None or row.wanted.of_value or row.wanted.bound <= 0 else row.wanted.bound
