"""Figures of operations: what is seen of a running system."""

from __future__ import annotations

from tests.figures.common import Line
from tests.figures.page import page

LINES: dict[str, Line] = {"page": page}
