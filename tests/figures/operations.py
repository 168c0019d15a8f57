"""Figures of operations: what an operator is shown, beside what is measured from outside."""

from __future__ import annotations

from tests.figures import dashboards, security
from tests.figures.common import Bench, Line, Row, at_most, headrace
from tests.figures.page import page

RATE, SECONDS = 1000, 60


def freshness(bench: Bench) -> list[Row]:
    """Freshness as Prometheus has it, beside the measurement from outside of the same time"""
    arguments = ("--rate", RATE, "--seconds", SECONDS, "--histogram")
    found = headrace(bench.empty("freshness"), "bench", "freshness", *arguments)
    rows = [Row("probes of the outside measurement", f"{found['probes']:,}", "", True)]
    for name in ("p50", "p99"):
        outside, shown = found[f"{name}_ms"], found["histogram_ms"][name]
        rows.append(Row(f"{name} from outside", f"{outside:.0f} ms", "", True))
        off = 100 * abs(shown / outside - 1)
        rows.append(at_most(f"{name} by histogram_quantile, {shown:.0f} ms, is off by", off, 10, " %"))
    return rows


LINES: dict[str, Line] = {
    "freshness": freshness, "dashboards": dashboards.dashboards, "alerts": dashboards.alerts, "page": page,
    "security": security.security,
}  # fmt: skip
