"""Dashboards and alerts on a real Prometheus that scrapes a running demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.dashboards.prometheus import with_prometheus
from tests.end_to_end.alert_story import CHAPTERS, OF_RANKS, answered, possible, story, watched


@pytest.mark.nightly
@pytest.mark.broker
@pytest.mark.timeout(2_400)
@with_prometheus
def test_every_query_has_an_answer_and_alerts_fire_and_clear(tmp_path: Path) -> None:
    with watched(tmp_path / "one") as found:
        report = answered(found)
        assert (report.empty, report.errors) == ([], [])
        assert report.queries_run > 200
        told = story(found, CHAPTERS)
        assert found.failed == []
    with watched(tmp_path / "ranks", ranks=2) as found:
        told += story(found, OF_RANKS)
        assert found.failed == []
    assert {one.alert for one in told} == possible(found)
    for one in told:
        assert "error" not in one.summary
        assert "{{" not in one.summary
