"""Figures of operations (issue 10)."""

from __future__ import annotations

from tests.figures import security
from tests.figures.common import Line

LINES: dict[str, Line] = {"security": security.security}
