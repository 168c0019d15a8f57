"""The report of `headrace estimate`: the verdict in words, the estimates, what the weights look like, how it was
done."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from embedding_store.errors import HeadraceError
from replay.html_report import drawn, number, page, settings, table, text, titled

TITLES = {"ips": "IPS", "snips": "self-normalised IPS", "dm": "direct method", "dr": "doubly robust"}


def render(result: Mapping[str, Any]) -> str:
    """The HTML of what `estimate` found."""
    about, support = result["about"], result["support"]
    title = f"What {about['policy']} would have earned on {about['log']}"
    parts = [
        f"<h1>{text(title)}</h1>", f"<p><b>{text(verdict(result))}</b></p>", "<h2>Estimates</h2>", _estimates(result),
        f"<p class=note>Mean {text(about['reward'])} of a decision (one item in one place). Intervals: 95 %; what is of"
        f" one {text(about['clustered_by'])} hangs together.</p>",
    ]  # fmt: skip
    plots = [_intervals(result)]
    if support is not None:
        parts += ["<h2>What the log can say of the policy</h2>", settings(support)]
        plots += [_weights(result["weights"]), _sample(result)]
    parts += ["<h2>Plots</h2>", *drawn(plots), "<h2>How it was done</h2>", settings(about)]
    return page(f"headrace estimate: {title}", parts)


def write(result: Mapping[str, Any], path: Path) -> None:
    """The report as a file; its folder is made if need be. Raises HeadraceError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(result), "utf-8")
    except OSError as error:
        raise HeadraceError(f"{path}: cannot write the report ({error.strerror}); choose another --report") from None


def verdict(result: Mapping[str, Any]) -> str:
    """One line: the doubly robust estimate beside the log's own mean, or why there is none."""
    best, logged = result["estimates"]["dr"], result["logged"]
    if not best["estimable"]:
        return f"Not estimable: {best['why']}."
    where = "not to be told from"
    if best["low"] > logged["value"]:
        where = "higher than"
    elif best["high"] < logged["value"]:
        where = "lower than"
    found = f"{best['value']:.5g} ({best['low']:.5g} to {best['high']:.5g})"
    return f"{found}, {where} the {logged['value']:.5g} that was logged."


def _estimates(result: Mapping[str, Any]) -> str:
    rows = [("what was logged", *_cells(result["logged"]), f"{result['logged']['n']:,}", "")]
    for name, found in result["estimates"].items():
        ess = "–" if found["ess"] is None else f"{found['ess']:,.0f}"
        why = f"not estimable: {found['why']}" if found["why"] else ""
        rows.append((TITLES[name], *_cells(found), ess, why))
    return f"<div class=words>{table(('', 'value', 'low', 'high', 'effective sample', ''), rows)}</div>"


def _cells(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return number(found["value"], 5), number(found["low"], 5), number(found["high"], 5)


def _intervals(result: Mapping[str, Any]) -> go.Figure:
    plot = go.Figure()
    rows = {"logged": result["logged"]} | {TITLES[name]: found for name, found in result["estimates"].items()}
    for name, found in rows.items():
        if found["value"] is None:
            continue
        spread = None
        if found["low"] is not None:
            spread = {
                "type": "data",
                "array": [found["high"] - found["value"]],
                "arrayminus": [found["value"] - found["low"]],
            }
        plot.add_scatter(x=[name], y=[found["value"]], error_y=spread, mode="markers", name=name, marker={"size": 10})
    plot.add_hline(y=result["logged"]["value"], line={"dash": "dot", "color": "#888"})
    return titled(plot, "Estimates, with 95 % intervals where one can be given", "", result["about"]["reward"])


def _weights(found: Mapping[str, Any]) -> go.Figure:
    edges = found["edges"]
    middle = [(low + high) / 2 for low, high in pairwise(edges)]
    plot = go.Figure()
    plot.add_bar(x=middle, y=found["counts"], width=[high - low for low, high in pairwise(edges)])
    plot.update_yaxes(type="log")
    return titled(plot, "Weights of the decisions", "probability by the policy / propensity", "decisions")


def _sample(result: Mapping[str, Any]) -> go.Figure:
    support, n = result["support"], result["logged"]["n"]
    plot = go.Figure()
    plot.add_bar(x=["logged", "effective"], y=[n, support["ess"]])
    return titled(plot, "Decisions, and as many of the policy's own as would say as much", "", "decisions")
