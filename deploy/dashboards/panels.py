"""A dashboard said in a few words, and its JSON made of that with Grafana's own builders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.dashboards.objectives import FRESHNESS_S, Objective

JOBS = "join|train|serve|monitor|player|demo"  # Prometheus' label of our processes
ANSWERS = 'route=~"/v1/(rank|recommend|items/.+)"'  # what users wait for: no probes, scrapes, or the monitor's looks
SOURCE_UID = "headrace-prometheus"
WIDTH, HEIGHT = 12, 8  # of a panel; Grafana's grid is 24 wide


@dataclass(frozen=True)
class Query:
    """PromQL and the legend of its series. In `expr`, `{}` stands for the instances chosen on the dashboard."""

    expr: str
    legend: str = "{{instance}}"

    @property
    def promql(self) -> str:
        return self.expr.replace("{}", '{instance=~"$instance"}')


def quantiles(histogram: str, by: str = "", of: tuple[float, ...] = (0.5, 0.99), legend: str = "") -> list[Query]:
    """Quantiles of a histogram over the last interval, one query each. `by`: labels that are kept."""
    kept = f"le, {by}" if by else "le"
    return [
        Query(
            f"histogram_quantile({q}, sum by ({kept}) (rate({histogram}[$__rate_interval])))",
            f"p{100 * q:.0f} {legend}".strip(),
        )
        for q in of
    ]


def past_objective(window: str) -> str:
    """The share of probes in a window that took longer than the objective of freshness, as PromQL."""
    servable = 'stage="servable"'
    return (
        f'(1 - sum(rate(headrace_freshness_seconds_bucket{{{servable},le="{FRESHNESS_S}"}}[{window}]))'
        f" / sum(rate(headrace_freshness_seconds_count{{{servable}}}[{window}])))"
    )


@dataclass(frozen=True)
class Panel:
    """One plot. `about`: what it says, and what to do when it is bad."""

    title: str
    unit: str
    about: str
    queries: Sequence[Query]
    objective: Objective | None = None
    log: bool = False  # a logarithmic axis


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels under a heading each."""

    uid: str
    title: str
    about: str
    rows: dict[str, Sequence[Panel]]

    @property
    def panels(self) -> list[Panel]:
        return [panel for panels in self.rows.values() for panel in panels]

    def panel_id(self, objective: Objective) -> int | None:
        """The panel on which this objective is drawn."""
        return next((n for n, panel in enumerate(self.panels, 1) if panel.objective is objective), None)


def to_json(model: Any) -> Any:
    """What an object of Grafana's SDK is on the wire, with keys in order."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    return json.loads(JSONEncoder(sort_keys=True).encode(model))


def grafana_json(board: Board) -> dict[str, Any]:
    """The board as Grafana's JSON model."""
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType, VariableRefresh

    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["headrace"])
        .timezone("utc")
        .refresh("10s")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-15m", "now")
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Instance")
            .datasource(_source())
            .query("label_values(headrace_info, instance)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
        .link(
            dashboard.DashboardLink("Headrace")
            .type(DashboardLinkType.DASHBOARDS).tags(["headrace"]).as_dropdown(True).keep_time(True)
        )
    )  # fmt: skip
    number = 0
    for row, (heading, panels) in enumerate(board.rows.items(), 1):
        built.with_row(dashboard.Row(heading).id(1_000 + row))
        for panel in panels:
            number += 1
            built.with_panel(_timeseries(panel).id(number))
    return to_json(built.build())


def _source() -> Any:
    """The data source that is chosen on the dashboard."""
    from grafana_foundation_sdk.models.common import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid="${source}")


def _timeseries(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import common, prometheus, timeseries
    from grafana_foundation_sdk.models.common import (
        LegendDisplayMode,
        LegendPlacement,
        ScaleDistribution,
        SortOrder,
        TooltipDisplayMode,
        VisibilityMode,
    )

    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .datasource(_source())
        .span(WIDTH)
        .height(HEIGHT)
        .fill_opacity(8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )  # fmt: skip
    if panel.log:
        built.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    _draw_objective(built, panel.objective)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        built.with_target(
            prometheus.Dataquery().expr(query.promql).legend_format(query.legend).ref_id(letter).datasource(_source())
        )
    return built


def _draw_objective(built: Any, objective: Objective | None) -> None:
    """Its bounds as thresholds: what is beyond them is red, with a line where it begins."""
    from grafana_foundation_sdk.builders import common, dashboard
    from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
    from grafana_foundation_sdk.models.dashboard import Threshold, ThresholdsMode

    low, high = (objective.low, objective.high) if objective else (None, None)
    steps = [Threshold(value=None, color="red" if low is not None else "green")]
    steps += [Threshold(value=low, color="green")] if low is not None else []
    steps += [Threshold(value=high, color="red")] if high is not None else []
    built.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    style = GraphThresholdsStyleMode.DASHED if objective else GraphThresholdsStyleMode.OFF
    built.thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
