"""The live page of a real demo, in a real browser: whoever looks can be a user, and sees how soon that counts."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.deploy.browsing import click_as, opened, with_chromium
from tests.end_to_end.demos import Demo, demo

pytestmark = [pytest.mark.broker, pytest.mark.nightly, pytest.mark.timeout(600), with_chromium]

POINTS = "document.querySelector('[data-plot=stages] .plot').data?.map((d) => d.y.filter((v) => v != null).length)"


def page_of(running: Demo) -> str:
    """The address of its live page."""
    return running.until(lambda: re.search(r"live page: (\S+)", running.stderr()))[1]


def test_clicks_change_the_list_and_freshness_moves(tmp_path: Path) -> None:
    with demo(tmp_path, "--seconds", 0, "--rate", 200) as running, opened(page_of(running)) as it:
        tab = it.tab
        running.until(lambda: min(tab.evaluate(POINTS) or [0]) > 2)  # in each stage
        clicks = [click_as(tab, user, place) for user, place in (("u0", 3), ("visitor-1", 0), ("visitor-1", 5))]
        points = tab.evaluate(POINTS)
        running.until(lambda: min(tab.evaluate(POINTS)) > max(points))
        assert it.unreadable() == []
        it.keep("page-demo")
        tab.set_viewport_size({"width": 360, "height": 800})
        assert it.unreadable() == []
        running.process.send_signal(signal.SIGINT)
        result = running.result(400)  # the twin that never learns has to catch up
        tab.locator("#state", has_text="run ended").wait_for()
    assert it.problems == []
    assert any(click.changed for click in clicks)
    assert (result["lost"], result["duplicated"]) == (0, 0)  # a visitor's events are events like any
