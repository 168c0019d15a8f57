"""Every panel has a unit, a description and queries that parse; what is drawn as a bound is what an alert looks at."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import promql_parser
import pytest

from deploy.dashboards import objectives
from deploy.dashboards.alerts import ALERTS
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.files import GRAFANA_RULES, build
from deploy.dashboards.panels import Board, grafana_json
from tests.deploy.dashboards.grafana_types import faults

METRICS = Path(__file__).parents[3] / "docs" / "metrics.md"
boards = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


@boards
def test_it_is_a_dashboard_as_grafana_publishes_the_type(board: Board) -> None:
    assert faults(grafana_json(board)) == []


def test_the_types_refuse_what_is_none() -> None:
    good = grafana_json(BOARDS[0])
    for key, value in (("colour", "red"), ("title", 5), ("gridPos", {"w": "wide"})):
        bad = copy.deepcopy(good)
        bad["panels"][1][key] = value
        assert faults(bad), (key, value)
    bad = copy.deepcopy(good)
    bad["panels"][1]["options"]["legend"]["placement"] = "left"
    assert faults(bad)


@boards
def test_every_panel_says_what_it_shows_and_what_to_do(board: Board) -> None:
    for panel in board.panels:
        assert panel.unit
        assert panel.queries
        assert len(panel.about) > 20, panel.title
        assert panel.about.endswith((".", "?")), panel.title
    assert len({panel.title for panel in board.panels}) == len(board.panels)


@boards
def test_queries_parse_and_panels_have_places_and_ids_of_their_own(board: Board) -> None:
    built = grafana_json(board)
    places: set[tuple[int, int]] = set()
    for panel in built["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not places & cells
        assert at["x"] + at["w"] <= 24
        places |= cells
        for target in panel.get("targets", ()):
            promql_parser.parse(target["expr"].replace("$__rate_interval", "1m"))
    assert len({panel["id"] for panel in built["panels"]}) == len(built["panels"])


def test_the_bounds_on_panels_are_those_of_the_alerts() -> None:
    drawn = {panel.objective for board in BOARDS for panel in board.panels if panel.objective}
    assert {alert.objective for alert in ALERTS} <= drawn
    assert drawn - {alert.objective for alert in ALERTS} <= {objectives.BURN_FAST}  # of the same alert's two bounds
    for board in BOARDS:
        plots = [panel for panel in grafana_json(board)["panels"] if panel["type"] != "row"]
        for panel, built in zip(board.panels, plots, strict=True):
            steps = [step["value"] for step in built["fieldConfig"]["defaults"]["thresholds"]["steps"]]
            bound = panel.objective
            wanted = [None] + [v for v in (bound.low, bound.high) if v is not None] if bound else [None]
            assert steps == wanted


def test_an_alert_asks_for_its_objectives_bound() -> None:
    elsewhere = {"freshness-burn-fast", "freshness-burn-slow", "probes-missing", "target-down"}
    for alert in ALERTS:
        bounds = [value for value in (alert.objective.low, alert.objective.high) if value is not None]
        for bound in bounds if alert.name not in elsewhere else ():
            assert f"{bound:g}" in alert.expr or f"{bound:.0f}" in alert.expr, alert.name


def test_every_metric_that_is_asked_for_is_in_the_docs() -> None:
    """docs/metrics.md is held to what the processes export."""
    told = set(re.findall(r"`(headrace_\w+)`", METRICS.read_text("utf-8")))
    asked = [query.promql for board in BOARDS for panel in board.panels for query in panel.queries]
    asked += [alert.expr for alert in ALERTS]
    named = {name for promql in asked for name in re.findall(r"headrace_\w+", promql)}
    assert len(named) > 50
    assert {re.sub(r"_(bucket|count)$", "", name) for name in named} - told == set()


def test_the_files_are_what_is_pushed(tmp_path: Path) -> None:
    files = {file.name: file for file in build(tmp_path / "new")}
    assert len(files) == len(BOARDS) + 2
    for board in BOARDS:
        assert json.loads(files[f"{board.uid}.json"].read_text()) == grafana_json(board)
    assert len(json.loads(files[GRAFANA_RULES].read_text())) == len(ALERTS)
