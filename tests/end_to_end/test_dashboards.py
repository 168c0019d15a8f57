"""Dashboards and alerts on a real Prometheus that scrapes a running demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.dashboards.alerts import ALERTS
from deploy.dashboards.validate import validate
from tests.deploy.dashboards.prometheus import with_prometheus
from tests.end_to_end.alert_story import story, watched


@pytest.mark.nightly
@pytest.mark.broker
@pytest.mark.timeout(1_200)
@with_prometheus
def test_every_query_has_an_answer_and_alerts_fire_and_clear(tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        found.prometheus.until(lambda: not validate(found.prometheus.url, 60, "20s").empty, 180, "every query has an answer")
        report = validate(found.prometheus.url, 60, "20s")
        assert report.errors == []
        assert report.queries_run > 200
        told = story(found)
    assert [one.alert for one in told] == [
        "target-down", "freshness-stalled", "target-down", "dead-letters", "guard-tripped"
    ]  # fmt: skip
    assert {one.alert for one in told} <= {alert.name for alert in ALERTS}
    for one in told:
        assert "error" not in one.summary
        assert "{{" not in one.summary
