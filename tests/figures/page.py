"""Figures of the live page, from a real browser before a running demo."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from tests.deploy.browsing import CHROMIUM, Opened, click_as, opened
from tests.end_to_end.demos import demo
from tests.figures.common import Bench, FigureError, Row, at_most, equal, say

USERS = 20
RATE = 200  # events per second of the simulated users beside them
SOON_MS = 1_000


def page(bench: Bench) -> list[Row]:
    """Clicks of test users on the page of a running demo: when their list knows of it, and when the model does"""
    if not CHROMIUM.exists():
        raise FigureError(f"{CHROMIUM} is not there: install chromium")
    with _demo(bench) as it:
        clicks = []
        for number in range(USERS):
            clicks.append(click_as(it.tab, f"visitor-{number}", number % 10))
            say(f"user {number + 1} of {USERS}: {clicks[-1].history_ms:.0f} ms, {clicks[-1].learned_ms:.0f} ms")
        faults = it.problems + it.unreadable()
    history, learned = ([click[i] for click in clicks] for i in (0, 1))
    return [
        at_most("list changed after, p50", statistics.median(history), SOON_MS, " ms"),
        Row("list changed after, p99", f"{_p99(history):.0f} ms", "(seen)", True),
        at_most("learned and served after, p50", statistics.median(learned), SOON_MS, " ms"),
        Row("learned and served after, p99", f"{_p99(learned):.0f} ms", "(seen)", True),
        Row("lists that changed", f"{sum(click.changed for click in clicks)} of {USERS}", "(seen)", True),
        equal("console errors, and what cannot be read", len(faults), 0),
    ]


@contextmanager
def _demo(bench: Bench) -> Iterator[Opened]:
    with demo(bench.empty("page"), "--seconds", 0, "--rate", RATE) as running:
        url = running.until(lambda: re.search(r"live page: (\S+)", running.stderr()))[1]
        with opened(url) as it:
            it.tab.locator("#tiles", has_text="p50").wait_for(timeout=120_000)  # probes come back
            yield it


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]
