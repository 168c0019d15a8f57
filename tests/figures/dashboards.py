"""The lines operations.dashboards and operations.alerts: a real Prometheus that scrapes a running demo."""

from __future__ import annotations

import shutil

from deploy.dashboards.alerts import ALERTS
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.validate import Report
from tests.end_to_end.alert_story import (
    CHAPTERS,
    CLEARS_S,
    DAYS,
    DAYS_SCALE,
    FIRES_S,
    OF_RANKS,
    SCALE,
    Told,
    answered,
    story,
    watched,
)
from tests.figures.common import Bench, FigureError, Row, at_least, at_most, equal, say


def dashboards(bench: Bench) -> list[Row]:
    """Every query of dashboards and alerts, asked of a Prometheus that scrapes a demo"""
    report, _ = _seen(bench)
    for line in report.empty + report.errors:
        say(f"dashboards: {line}")
    return [
        equal("dashboards", len(BOARDS), 6),
        at_least("panels", sum(len(board.panels) for board in BOARDS), 60),
        equal("alerts", len(ALERTS), 18),
        at_least("queries run", report.queries_run, 200),
        equal("empty", len(report.empty), 0),
        equal("in error", len(report.errors), 0),
    ]


def alerts(bench: Bench) -> list[Row]:
    """Each alert is quiet in a running demo, fires by what causes it, and clears (windows and durations over 60)"""
    _, told = _seen(bench)
    say(f"alerts: windows and durations times {SCALE:.4f}, of {DAYS} times {DAYS_SCALE:.4f}; bounds as they are, but")
    say("alerts: for that of snapshot-old: a quarter of an hour between two snapshots is a quarter of a minute here")
    rows = [equal("alerts caused", len({one.alert for one in told}), len(ALERTS))]
    for one in told:
        rows.append(at_most(f"{one.alert}, caused by: {one.cause}; fired after", one.fired_s, FIRES_S, " s"))
        rows.append(at_most(f"{one.alert}: cleared after", one.cleared_s, CLEARS_S, " s"))
    return rows


def _seen(bench: Bench) -> tuple[Report, list[Told]]:
    """Both lines look at the same run."""
    if shutil.which("prometheus") is None:
        raise FigureError("prometheus is not installed: apt-get install prometheus")
    return bench.once("dashboards", lambda: _run(bench))


def _run(bench: Bench) -> tuple[Report, list[Told]]:
    say("dashboards: a demo under Prometheus")
    try:
        with watched(bench.empty("dashboards")) as found:
            report = answered(found)
            say("alerts: causing them")
            told = story(found, CHAPTERS)
        with watched(bench.empty("ranks"), ranks=2) as of_ranks:
            told += story(of_ranks, OF_RANKS)
    except AssertionError as error:
        raise FigureError(str(error).splitlines()[0]) from None
    for line in found.failed + of_ranks.failed:
        say(f"alerts: {line}")
    return report, told

