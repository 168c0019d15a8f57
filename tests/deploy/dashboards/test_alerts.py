"""Each alert fires on made-up series that have its cause, and clears when the cause is gone; promtool reckons."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.dashboards.alerts import ALERTS, Alert, grafana_rules, rule_file, scaled, waits
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.files import build
from deploy.dashboards.objectives import FRESHNESS_S
from deploy.freshness_metrics import BUCKETS
from tests.deploy.dashboards.made_series import CASES, Case

DOCS = Path(__file__).parents[3] / "docs"
with_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (prometheus)")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rule file as it is written for users."""
    return next(file for file in build(tmp_path_factory.mktemp("rules")) if file.suffix == ".yml")


@with_promtool
def test_prometheus_takes_the_rules(rules: Path) -> None:
    done = subprocess.run(["promtool", "check", "rules", str(rules)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@with_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert} {case.name}".strip())
def test_it_fires_and_clears(case: Case, tmp_path: Path) -> None:
    (alert,) = (alert for alert in ALERTS if alert.name == case.alert)
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump(rule_file([alert])))  # this one: promtool reckons all there are at each point
    told = {
        "rule_files": [str(rules)],
        "evaluation_interval": case.point,
        "tests": [
            {
                "interval": case.point,
                "input_series": [
                    {"series": name, "values": " ".join(f"{value:.10g}" for value in values)}
                    for name, values in case.series.items()
                ],
                "promql_expr_test": [
                    _expected(case, alert, at, fires)
                    for fires, moments in ((0, case.quiet), (1, case.fires))
                    for at in moments
                ],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(told))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _expected(case: Case, alert: Alert, at: int, fires: int) -> dict:
    number, unit = re.fullmatch(r"(\d+)(\w)", case.point).groups()  # type: ignore[union-attr]
    return {
        "expr": f'count(ALERTS{{alertname="{alert.title}",alertstate="firing"}}) or vector(0)',
        "eval_time": f"{at * int(number)}{unit}",
        "exp_samples": [{"labels": "{}", "value": fires}],
    }


def test_every_alert_has_a_cause_in_these_tests() -> None:
    assert {case.alert for case in CASES if case.fires} == {alert.name for alert in ALERTS}
    assert {case.alert for case in CASES if case.fires and case.quiet} == {alert.name for alert in ALERTS}


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule, alert in zip(rule_file()["groups"][0]["rules"], ALERTS, strict=True):
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 40
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{alert.name}"
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", alert.name)
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


def test_grafana_and_prometheus_ask_the_same() -> None:
    for ours, theirs in zip(rule_file()["groups"][0]["rules"], grafana_rules(), strict=True):
        asked, holds = theirs["data"]
        assert asked["model"]["expr"] == ours["expr"]
        assert (theirs["title"], theirs["for"], theirs["labels"]) == (ours["alert"], ours["for"], ours["labels"])
        assert theirs["condition"] == holds["refId"] == "B"
        assert theirs["annotations"]["runbook_url"] == ours["annotations"]["runbook_url"]


def test_an_alert_links_to_the_panel_that_has_its_bound() -> None:
    boards = {board.uid: board for board in BOARDS}
    for rule, alert in zip(grafana_rules(), ALERTS, strict=True):
        notes = rule["annotations"]
        panel = boards[notes["__dashboardUid__"]].panels[int(notes["__panelId__"]) - 1]
        assert panel.objective is alert.objective


def test_disk_filling_links_to_the_forecast_that_it_asks_for() -> None:
    (alert,) = (alert for alert in ALERTS if alert.name == "disk-filling")
    (panel,) = (panel for board in BOARDS for panel in board.panels if panel.objective is alert.objective)
    (query,) = panel.queries
    assert alert.expr.startswith(f"{query.expr.replace('{}', '')} < {alert.objective.low:g} and ")


def test_only_windows_and_durations_are_scaled() -> None:
    assert scaled("rate(x[5m]) > 60 and y[1h:1m]", 1 / 60) == "rate(x[5s]) > 60 and y[60s:1s]"
    assert scaled("x{a='5m'} > 60", 1 / 60) == "x{a='5m'} > 60"
    assert scaled("x[10s]", 1 / 60) == "x[1s]"
    assert [waits(alert) for alert in ALERTS] == [alert.wait for alert in ALERTS]
    fast = rule_file(scale=1 / 60)["groups"][0]
    assert fast["interval"] == "1s"
    assert {rule["for"] for rule in fast["rules"]} <= {"0s", "1s", "2s", "5s", "10s", "60s"}


def test_the_freshness_objective_is_a_bound_of_the_histogram() -> None:
    assert FRESHNESS_S in BUCKETS
    assert f'le="{FRESHNESS_S}"' in json.dumps(rule_file()).replace('\\"', '"')


def test_the_docs_have_each_alert_with_its_bound() -> None:
    text = (DOCS / "dashboards.md").read_text("utf-8")
    for alert in ALERTS:
        cells = f"[{alert.name}](operations.md#{alert.name})", alert.severity, alert.objective.said, alert.wait
        assert f"| {' | '.join(cells)} |" in text, alert.name


def test_the_runbook_has_a_section_for_each_alert() -> None:
    headings = re.findall(r"^#+ (.*)$", (DOCS / "operations.md").read_text("utf-8"), re.MULTILINE)
    assert {alert.name for alert in ALERTS} <= set(headings)
