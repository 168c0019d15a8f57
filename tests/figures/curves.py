"""Curves over time as an SVG that needs nothing else: a panel each, in columns."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

WIDTH, HEIGHT, COLUMNS, MARGIN = 320, 120, 3, 22


def drawing(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """name → (seconds [n], values [n]) → SVG text. Each panel begins at 0 and ends at its largest value."""
    panels = [_panel(name, *curve, number) for number, (name, curve) in enumerate(curves.items()) if len(curve[0])]
    rows = -(-len(curves) // COLUMNS)
    size = f'width="{COLUMNS * WIDTH}" height="{rows * HEIGHT}"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">'
    return "".join([start, paper, *panels, "</svg>\n"])


def _panel(name: str, at: np.ndarray, values: np.ndarray, number: int) -> str:
    left, top = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
    most, longest = max(float(values.max()), 1e-9), max(float(at.max()), 1e-9)
    wide, high = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    points = " ".join(
        f"{MARGIN + wide * t / longest:.1f},{MARGIN + high * (1 - v / most):.1f}"
        for t, v in zip(at.tolist(), values.tolist(), strict=True)
    )
    return (
        f'<g transform="translate({left},{top})"><text x="{MARGIN}" y="14">{escape(name)}: up to {most:,.4g}, '
        f'{longest:,.0f} s</text><rect x="{MARGIN}" y="{MARGIN}" width="{wide}" height="{high}" fill="none" '
        f'stroke="#ccc"/><polyline points="{points}" fill="none" stroke="#1f5fa8"/></g>'
    )
