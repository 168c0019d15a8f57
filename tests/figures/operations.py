"""Figures of operations: what dashboards show, and whether alerts fire."""

from __future__ import annotations

from tests.figures import dashboards
from tests.figures.common import Line

LINES: dict[str, Line] = {"dashboards": dashboards.dashboards, "alerts": dashboards.alerts}
