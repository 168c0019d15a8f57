"""Plots of the benchmarks as SVG files, which a browser and GitHub show as they are. Bars, and nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bench.suite import Row

WIDTH, LEFT, RIGHT, LINE = 860, 400, 120, 22  # px
OURS, THEIRS, MARK = "#1b6ca8", "#a9b4be", "#b3261e"


@dataclass(frozen=True)
class Bar:
    """`share` of the width is filled, from `start` on (both 0 … 1); `mark`: a line there, what is wanted."""

    label: str
    text: str
    share: float
    start: float = 0.0
    color: str = OURS
    mark: float | None = None


def figures_svg(title: str, rows: Sequence[Row]) -> str:
    """Each figure above its reference, on a scale of their own; those of a dict have one scale."""
    bars = []
    alone = [row for row in rows if row.reference_value is None]
    for row in rows:
        if row.reference_value is None:
            like = max(abs(other.value) for other in alone if other.pattern == row.pattern)
            bars.append(Bar(row.what, said(row.value), _share(row.value, like)))
            continue
        most = max(row.value, row.reference_value)
        bars.append(Bar(row.what, said(row.value), _share(row.value, most)))
        theirs = _share(row.reference_value, most)
        bars.append(Bar(f"– {row.reference}", said(row.reference_value), theirs, color=THEIRS))
    return svg(title, bars)


def ratios_svg(title: str, rows: Sequence[tuple[str, Row]]) -> str:
    """(benchmark, figure) → all ratios on one logarithmic scale, from 1 on, with a line at what is wanted."""
    seen = [(name, row, row.ratio) for name, row in rows if row.ratio is not None and row.ratio > 0]
    places = [math.log(ratio) for _, _, ratio in seen] + [math.log(w) for _, row, _ in seen if (w := _wanted(row))]
    low, high = min([*places, 0.0]), max([*places, 0.0])
    span = (high - low) or 1.0

    def at(ratio: float) -> float:
        return (math.log(ratio) - low) / span

    bars = []
    for name, row, ratio in seen:
        ends, wanted = sorted((at(ratio), at(1.0))), _wanted(row)
        mark = at(wanted) if wanted else None
        bars.append(Bar(f"{name}: {row.name}", f"{said(ratio)} ×", ends[1] - ends[0], ends[0], mark=mark))
    return svg(title, bars)


def svg(title: str, bars: Sequence[Bar]) -> str:
    """A horizontal bar a line. On white, so that it can be read on a dark page too."""
    height = LINE * (len(bars) + 2)
    room = WIDTH - LEFT - RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="12" fill="#1b2733">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="{LINE}" font-size="15" font-weight="600">{html.escape(title)}</text>',
    ]
    for number, bar in enumerate(bars):
        y = LINE * (number + 1.5)
        x, wide = LEFT + room * bar.start, max(room * bar.share, 1.0)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 14:.1f}" text-anchor="end">{html.escape(_short(bar.label))}</text>')
        lines.append(f'<rect x="{x:.1f}" y="{y + 3:.1f}" width="{wide:.1f}" height="{LINE - 7}" fill="{bar.color}"/>')
        lines.append(f'<text x="{LEFT + room + 8}" y="{y + 14:.1f}">{html.escape(bar.text)}</text>')
        if bar.mark is not None:
            mark = LEFT + room * bar.mark
            lines.append(f'<path d="M{mark:.1f} {y:.1f}v{LINE}" stroke="{MARK}" stroke-width="2"/>')
    return "\n".join([*lines, "</svg>", ""])


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


def _share(value: float, most: float) -> float:
    return max(value, 0.0) / most if most > 0 else 0.0


def _wanted(row: Row) -> float | None:
    return None if row.wanted is None or row.wanted.of_value or row.wanted.bound <= 0 else row.wanted.bound


def _short(label: str) -> str:
    return label if len(label) <= 62 else label[:61] + "…"
