"""Every query of the dashboards and alerts, asked of a Prometheus: none in error, none without an answer.

A panel must show something: its range has a value that is a number. An alert gives nothing while nothing is wrong, so
what is looked at is each series that it selects: those must be there. Where a label picks what is rare (RARE), it is
enough that there are series with that label.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from deploy.dashboards.addresses import checked
from deploy.dashboards.alerts import ALERTS
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.panels import Query
from embedding_store.errors import HeadraceError

if TYPE_CHECKING:
    from promql_parser import VectorSelector

RARE = {"status"}
POINTS = 60  # of a range
TIMEOUT_S = 30
_LEGEND = re.compile(r"{{(\w+)}}")


@dataclass
class Report:
    """What came of it. `empty` and `errors`: where, which query, and what is wrong with it."""

    queries_run: int = 0
    empty: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def validate(prometheus: str, window_s: int = 300, rate_interval: str = "1m") -> Report:
    """Ask for everything at this moment and over the last `window_s` seconds. `rate_interval`: for $__rate_interval.

    Raises UsageError for an address that is none, HeadraceError if no Prometheus answers there.
    """
    server = checked(prometheus).rstrip("/")
    variables = {"$__rate_interval": rate_interval, "$instance": ".*"}
    report = Report()
    with httpx.Client(base_url=server, timeout=TIMEOUT_S) as client:
        ask = _Asker(client, report, window_s)
        for board in BOARDS:
            for panel in board.panels:
                for query in panel.queries:
                    ask.panel(f"{board.title} / {panel.title}", query, _replaced(query.promql, variables))
        for alert in ALERTS:
            ask.alert(alert.title, alert.expr)
    return report


def selectors(promql: str) -> Iterator[VectorSelector]:
    """Each selection of series in an expression. Raises ValueError if that is not PromQL."""
    import promql_parser

    found: list[VectorSelector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(promql), visit)
    return iter({str(selector): selector for selector in found}.values())


def _replaced(promql: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        promql = promql.replace(name, value)
    return promql


class _Asker:
    """Asks one Prometheus and writes down what is wrong."""

    def __init__(self, client: httpx.Client, report: Report, window_s: int) -> None:
        self._client, self._report, self._window_s = client, report, window_s
        self._there: dict[str, bool] = {}

    def panel(self, where: str, query: Query, promql: str) -> None:
        """A panel's query: a number at least once in the range, and all labels that its legend names."""
        if self._ask(where, promql, at="now") is None or (series := self._ask(where, promql, at="range")) is None:
            return
        numbers = [one for one in series if any(not math.isnan(float(value)) for _, value in one["values"])]
        if not numbers:
            self._report.empty.append(f"{where}: {promql}")
        for label in _LEGEND.findall(query.legend):
            if any(label not in one["metric"] for one in numbers):
                self._report.errors.append(f"{where}: the legend names {label}, which the series lack: {promql}")

    def alert(self, where: str, promql: str) -> None:
        """An alert's expression: no error, and every series that it looks at is there."""
        if self._ask(where, promql, at="now") is None:
            return
        self._ask(where, promql, at="range")
        for selector in selectors(promql):
            if not self._exists(where, selector):
                self._report.empty.append(f"{where}: {selector}")

    def _exists(self, where: str, selector: VectorSelector) -> bool:
        for matcher in selector.matchers.matchers:
            if matcher.name in RARE:
                selector = next(selectors(str(selector).replace(str(matcher), f'{matcher.name}!=""')))
        text = f"present_over_time({selector}[{self._window_s}s])"
        if text not in self._there:
            self._there[text] = bool(self._ask(where, text, at="now"))
        return self._there[text]

    def _ask(self, where: str, promql: str, at: str) -> list[dict[str, Any]] | None:
        """The series of an answer; None if it is an error, which is written down."""
        self._report.queries_run += 1
        now = time.time()
        if at == "range":
            path, data = "/api/v1/query_range", {
                "query": promql, "start": now - self._window_s, "end": now, "step": max(1, self._window_s // POINTS),
            }  # fmt: skip
        else:
            path, data = "/api/v1/query", {"query": promql, "time": now}
        try:
            answer = self._client.post(path, data=data)
            told = answer.json()
            if not isinstance(told, dict):
                raise ValueError("it is of something else")
        except httpx.HTTPError as error:
            raise HeadraceError(
                f"no Prometheus answers at {self._client.base_url} ({type(error).__name__}); check --prometheus"
            ) from None
        except ValueError:
            raise HeadraceError(
                f"{self._client.base_url} answers {path} with HTTP {answer.status_code}, and not as a"
                f" Prometheus does: is it one?"
            ) from None
        if told.get("status") != "success":
            self._report.errors.append(f"{where}: {told.get('error', answer.status_code)}: {promql}")
            return None
        return told["data"]["result"]
