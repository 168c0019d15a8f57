"""What `headrace dashboards validate` finds, on a real Prometheus: it sees what is missing and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli import run
from deploy.dashboards import validate as validation
from deploy.dashboards.alerts import ALERTS, Alert
from deploy.dashboards.objectives import UP
from deploy.dashboards.panels import Board, Panel, Query
from deploy.dashboards.validate import selectors, validate
from embedding_store.errors import HeadraceError, UsageError
from tests.deploy.dashboards.prometheus import Prometheus, prometheus, with_prometheus


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped itself."""
    folder = tmp_path_factory.mktemp("prometheus")
    targets = folder / "targets.json"
    with prometheus(folder / "own", targets) as server:
        targets.write_text(json.dumps([{"targets": [server.url.removeprefix("http://")], "labels": {"job": "join"}}]))
        server.until(lambda: server.ask("query", query="count_over_time(up[30s]) > 2")["result"], 60, "it is scraped")
        yield server


def only(monkeypatch: pytest.MonkeyPatch, queries: list[Query], alerts: list[str]) -> None:
    """These, instead of ours."""
    board = Board("b", "Board", "", {"row": [Panel("Panel", "s", "about", queries)]})
    monkeypatch.setattr(validation, "BOARDS", [board])
    monkeypatch.setattr(
        validation, "ALERTS", [Alert("one-alert", "page", "0s", expr, "summary", "todo", UP) for expr in alerts]
    )


@with_prometheus
def test_what_answers_is_fine_and_an_alert_may_be_quiet(running: Prometheus, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, [Query("rate(prometheus_http_requests_total{}[$__rate_interval])", "{{handler}}")],
         ['up{job="join"} == 0 or absent(up{job="join"})'])  # fmt: skip
    report = validate(running.url, 60, "10s")
    assert (report.empty, report.errors) == ([], [])
    assert report.queries_run == 2 + 2 + 1


@with_prometheus
@pytest.mark.parametrize(
    ("query", "kind"),
    [
        (Query("headrace_no_such_metric{}"), "empty"),
        (Query('up{job="nobody"}'), "empty"),
        (Query("0 * up / 0"), "empty"),  # not a number is nothing to see
        (Query("rate(up)"), "errors"),
        (Query("sum(up)", "{{instance}}"), "errors"),  # a legend without its label
    ],
)
def test_a_panel_without_an_answer(
    running: Prometheus, monkeypatch: pytest.MonkeyPatch, query: Query, kind: str
) -> None:
    only(monkeypatch, [query], [])
    report = validate(running.url, 60)
    assert len(getattr(report, kind)) == 1
    assert getattr(report, kind)[0].startswith("Board / Panel: ")


@with_prometheus
@pytest.mark.parametrize(
    ("expr", "empty", "errors"),
    [
        ("up == 0 and headrace_no_such_metric > 5", 1, 0),
        ('up{job="nobody"} == 0', 1, 0),
        ("absent(headrace_no_such_metric)", 1, 0),
        ('rate(prometheus_http_requests_total{code="500"}[1m]) > 1', 1, 0),
        ("up ==", 0, 1),
    ],
)
def test_an_alert_that_could_never_fire(
    running: Prometheus, monkeypatch: pytest.MonkeyPatch, expr: str, empty: int, errors: int
) -> None:
    only(monkeypatch, [], [expr])
    report = validate(running.url, 60)
    assert (len(report.empty), len(report.errors)) == (empty, errors)


@with_prometheus
def test_the_command_fails_with_one_line_where_nothing_of_ours_is_scraped(
    running: Prometheus, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["dashboards", "validate", "--prometheus", running.url, "--window", "60", "--json"]) == 1
    out, err = capfd.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["empty"] > 50
    assert result["errors"] == 0
    assert result["queries_run"] > 200
    assert "does Prometheus scrape" in err.strip().splitlines()[-1]


def test_what_is_no_prometheus_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match=r"no Prometheus answers .*--prometheus"):
        validate("http://127.0.0.1:9")
    with pytest.raises(UsageError, match="address of a server"):
        validate("127.0.0.1:9090")
    with pytest.raises(UsageError, match="address of a server"):
        validate("http://127.0.0.1:port")


def test_each_selection_of_an_expression_is_found_once() -> None:
    found = selectors('max_over_time(rate(a{x="1"}[1m])[1h:1m]) > 2 and on (x) (b or absent(c)) - a{x="1"}')
    assert [str(one) for one in found] == ['a{x="1"}', "b{}", "c{}"]
    for alert in ALERTS:
        assert list(selectors(alert.expr)), alert.name
