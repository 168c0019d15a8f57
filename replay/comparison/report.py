"""The report: one HTML file that needs nothing else, tables first, then plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go

from replay.comparison.harness import COMPARED, HEADRACE, LESS_IS_BETTER
from replay.comparison.stream import OTHERS
from replay.html_report import drawn, number, page, settings, table, text, titled


def render(result: Mapping[str, Any]) -> str:
    """The HTML of what `headrace compare` found (the JSON beside it)."""
    about, runs = result["about"], result["runs"]
    if "settings" in result:
        parts = _sides(result)
    else:
        parts = [
            f"<h1>Headrace and its peers on {text(about['log'])}</h1>",
            f"<p>{text(_drawn(about))}</p>",
            "<h2>Figures</h2>", _figures(result), "<h2>Headrace less the others</h2>", _differences(result),
            _words(result["shortfalls"]),
        ]  # fmt: skip
    if result.get("intervals"):
        parts += ["<h2>Freshness against quality</h2>", _intervals(result["intervals"])]
    plots = [_curve(runs[0], "auc"), _curve(runs[0], "ne"), _calibration(runs[0])]
    if result.get("intervals"):
        plots.append(_freshness(result["intervals"]))
    parts += ["<h2>Plots</h2>", f"<p class=note>Of the first seed, {runs[0]['seed']}.</p>"]
    parts += drawn(plots)
    own = {f"settings of {name}": value for name, value in result.get("settings", {}).items()}
    parts += ["<h2>How it was measured</h2>", settings(about | own)]
    return page(f"headrace compare: {about['log']}", parts)


def _sides(result: Mapping[str, Any]) -> list[str]:
    """Several settings side by side: what differs, what came of it, then the figures."""
    about, names = result["about"], list(result["settings"])
    rows = [(key, *(str(of[name]) for name in names)) for key, of in result["differences"].items()]
    differences = table(("setting", *names), rows) if rows else "<p>Nothing that could make a difference.</p>"
    lines = "".join(f"<li>{text(line)}</li>" for line in result["verdicts"])
    return [
        f"<h1>{text(' and '.join(names))} on {text(about['log'])}</h1>",
        f"<h2>What differs</h2><div class=settings>{differences}</div>",
        f"<h2>Which is better</h2><ul>{lines}</ul>", f"<p>{text(_drawn(about))}</p>{_compared(result['runs'][0])}",
        "<h2>Figures</h2>", _figures(result), "<h2>Differences</h2>", _pairs(result),
    ]  # fmt: skip


def _compared(run: Mapping[str, Any]) -> str:
    """What is compared where the streams differ."""
    about = run["compared"]
    if not about:
        return ""
    left_out = ", ".join(f"{count:,} of {name}" for name, count in about["left_out"].items())
    return (
        f"<p>The settings make other examples of the log. Compared are the {about['examples']:,} that all have, each"
        f" scored at one moment; left out: {text(left_out)}. Clicks that not all have joined count as clicks for all:"
        f" {about['clicks_that_not_all_have']:,}.</p>"
    )


def _pairs(result: Mapping[str, Any]) -> str:
    head = ("seed, difference", *(f"{title}, 95 % interval" for title in COMPARED.values()))
    rows = []
    for run in result["runs"]:
        for pair in run["pairs"]:
            found = (pair["figures"][figure] for figure in COMPARED)
            cells = ["–" if f is None else "{:+.4f} … {:+.4f}".format(*f["interval"]) for f in found]
            rows.append((f"{run['seed']}, {pair['of']} − {pair['less']}", *cells))
    return table(head, rows) + (
        "<p class=note>Users drawn again with replacement, the same for both. For the entropy less is better. An"
        " interval that holds 0: no difference that can be seen.</p>"
    )


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """In words, where Headrace does not beat another: each seed's interval of the difference holds 0, or is beyond."""
    found = []
    for run in result["runs"]:
        for name, by_figure in run["differences"].items():
            for figure, interval in by_figure.items():
                if interval is None:
                    continue
                low, high = (-interval[1], -interval[0]) if figure in LESS_IS_BETTER else interval
                if low > 0:
                    continue
                what = "is behind" if high < 0 else "cannot be told from"
                found.append(
                    f"seed {run['seed']}: Headrace {what} {name} in {COMPARED[figure]} (difference"
                    f" {interval[0]:+.4f} to {interval[1]:+.4f})"
                )
    return found


def _drawn(about: Mapping[str, Any]) -> str:
    """What was scored, in words."""
    said = f"{about['events']:,} events in batches of {about['batch_size']:,} rows, {about['scored']:,} scores"
    said += f" of {about['users']:,} users and {about['items']:,} items. "
    if about["from_ms"] is not None:
        start = datetime.fromtimestamp(about["from_ms"] / 1000, UTC)
        said += f"What was shown before {start:%Y-%m-%d %H:%M:%S} UTC is learned and not measured. "
    if about["implicit"]:
        said += (
            f"The log has no impressions: each positive stands beside {about['negatives']} negatives, drawn evenly from"
            " the recently active items, the same for all systems. So AUC and entropy are sampled ones, no click rate"
            " is claimed, and an item that was never seen before is always a positive: “known items” leaves those out. "
        )
    else:
        said += "Scored is what was shown; a click is a click on it. "
    return said + (
        f"Ranking: the item clicked among {OTHERS} others, drawn evenly from the active items of before (sampled"
        f" metrics), at {about['positions']:,} positions chosen by hash."
    )


def _figures(result: Mapping[str, Any]) -> str:
    head = ("system", "AUC", "NE", "calibration", "… last half", "ECE", "HR@10", "NDCG@10", "MRR", "AUC, known items",
            "NDCG@10, known items", "seconds")  # fmt: skip
    rows = []
    for name, f in result["systems"].items():
        known, last = f["known_items"], f["last_half"]
        values = (f["auc"], f["ne"], f["calibration"], last["calibration"], f["ece"], f["hr_at_10"], f["ndcg_at_10"],
                  f["mrr"], known["auc"], known["ndcg_at_10"])  # fmt: skip
        rows.append((name, *map(number, values), f"{f['seconds']:.1f}"))
    seeds = ", ".join(str(run["seed"]) for run in result["runs"])
    note = f"<p class=note>Means over the seeds {text(seeds)}.</p>" if len(result["runs"]) > 1 else ""
    return table(head, rows) + note


def _differences(result: Mapping[str, Any]) -> str:
    head = ("seed, system", *(f"{title}, 95 % interval" for title in COMPARED.values()))
    rows = []
    for run in result["runs"]:
        for name, by_figure in run["differences"].items():
            cells = [_interval(by_figure[figure], figure in LESS_IS_BETTER) for figure in COMPARED]
            rows.append((f"{run['seed']}, {name}", *cells))
    if not rows:
        return "<p>Headrace was not among the systems, or alone.</p>"
    return table(head, rows, raw=True) + (
        "<p class=note>Headrace − other; users drawn again with replacement, the same for both. For the entropy less is"
        " better. Red: not better.</p>"
    )


def _words(found: Sequence[str]) -> str:
    if not found:
        return "<p><b>Headrace beats every other system in every figure that both have.</b></p>"
    return (
        "<p><b>Where Headrace does not beat another:</b></p><ul>"
        + "".join(f"<li>{text(f)}</li>" for f in found)
        + "</ul>"
    )


def _intervals(found: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("serving copy brought up to date every", "AUC", "NE", "calibration", "times", "rows copied")
    rows = [
        (
            name,
            number(f["auc"]),
            number(f["ne"]),
            number(f["calibration"]),
            f"{f['syncs']:,}",
            f"{f['rows_copied']:,}",
        )
        for name, f in found.items()
    ]
    return table(head, rows)


def _curve(run: Mapping[str, Any], figure: str) -> go.Figure:
    plot = go.Figure()
    for name, windows in run["curves"].items():
        points = [(w["to_ms"], w[figure]) for w in windows if w[figure] is not None]
        if points:
            when = [datetime.fromtimestamp(ms / 1000, UTC) for ms, _ in points]
            width = 3 if name == HEADRACE else 1.5
            plot.add_scatter(x=when, y=[y for _, y in points], name=name, mode="lines+markers", line={"width": width})
    return titled(plot, f"{COMPARED[figure]} by window of the stream", "event time (UTC)", COMPARED[figure])


def _calibration(run: Mapping[str, Any]) -> go.Figure:
    plot = go.Figure()
    most = 0.0
    for name, buckets in run["reliability"].items():
        plot.add_scatter(
            x=[p for p, _, _ in buckets], y=[rate for _, rate, _ in buckets], name=name, mode="lines+markers"
        )
        most = max([most, *(max(p, rate) for p, rate, _ in buckets)])
    plot.add_scatter(x=[0, most], y=[0, most], name="exact", mode="lines", line={"dash": "dot", "color": "#888"})
    return titled(plot, "Calibration: as many scores in each point", "mean prediction", "rate of clicks")


def _freshness(found: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    plot = go.Figure()
    plot.add_scatter(x=list(found), y=[f["auc"] for f in found.values()], name="AUC", mode="lines+markers")
    return titled(plot, "Freshness against quality", "serving copy brought up to date every", "AUC")


def _interval(interval: Sequence[float] | None, less_is_better: bool) -> str:
    if interval is None:
        return "–"
    low, high = interval
    better = high < 0 if less_is_better else low > 0
    said = f"{low:+.4f} … {high:+.4f}"
    return said if better else f"<span class=worse>{said}</span>"
