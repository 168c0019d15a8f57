"""The frame of our reports: one HTML file that needs nothing else, with tables and plots."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2733; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #1b2733; }
.settings td, .words td { text-align: left; overflow-wrap: anywhere; }
td { border-bottom: 1px solid #dde3e9; font-variant-numeric: tabular-nums; } .worse { color: #b3261e; }
h1, h2 { line-height: 1.2; } p.note { color: #55636f; } .plot { margin: 1.5rem 0; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML parts; the title is text."""
    body = "\n".join(parts)
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>{text(title)}</title>\n<style>{STYLE}</style>\n{body}\n"


def drawn(plots: Iterable[go.Figure]) -> list[str]:
    """The plots as parts of one page, the first with plotly's own program in it."""
    return [
        f"<div class=plot>{plot.to_html(full_html=False, include_plotlyjs=number == 0, div_id=f'plot-{number}')}</div>"
        for number, plot in enumerate(plots)
    ]


def titled(plot: go.Figure, title: str, x: str, y: str) -> go.Figure:
    """The plot with its title and the names of its axes."""
    plot.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=420)
    return plot


def table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: bool = False) -> str:
    """`raw`: the cells after the first are HTML."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if raw and n else text(cell)}</td>" for n, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def settings(about: Mapping[str, object]) -> str:
    """A table of names and values."""
    rows = [(name.replace("_", " "), str(value)) for name, value in about.items()]
    return f"<div class=settings>{table(('setting', 'value'), rows)}</div>"


def number(value: float | None, digits: int = 4) -> str:
    """A figure, – where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def text(value: object) -> str:
    """Any value, escaped."""
    return html.escape(str(value))
