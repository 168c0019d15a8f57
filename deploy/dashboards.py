"""The Grafana dashboard, built from the names that the workers export on /metrics, and sent with grafana-client."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from embedding_store.errors import HeadraceError, UsageError

UID = "headrace-overview"
SOURCE = {"type": "prometheus", "uid": "${source}"}  # chosen on the dashboard
WIDTH, HEIGHT = 12, 8  # of a panel; Grafana's grid is 24 wide

# (title, description, Grafana unit, [(PromQL, legend)])
PANELS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Age of the version served", "Time since the version was made that a replica serves.", "s",
     (("headrace_replica_age_seconds", "{{instance}}"),)),
    ("Version served", "Sequence of the version; replicas should lie on one line.", "none",
     (("headrace_replica_sequence", "{{instance}}"),)),
    ("Versions applied", "Versions that a replica took over, per second.", "ops",
     (("rate(headrace_replica_versions_applied_total[1m])", "{{instance}}"),)),
    ("Requests", "HTTP requests answered, per second.", "reqps",
     (("sum by (route, status) (rate(headrace_serve_requests_total[1m]))", "{{route}} {{status}}"),)),
    ("Serving latency", "From a request's head to the end of its answer, without the long polls of /v1/model.", "s",
     tuple((f'histogram_quantile({q}, sum by (le, route) (rate(headrace_serve_request_seconds_bucket'
            '{route=~"/v1/(rank|recommend)"}[1m])))', f"p{100 * q:.0f} {{{{route}}}}") for q in (0.5, 0.99))),
    ("Requests refused", "By the problem that was said, per second.", "reqps",
     (("sum by (reason) (rate(headrace_serve_refused_total[1m]))", "{{reason}}"),)),
    ("Waiting", "Requests that wait for their turn; answers cut short by the deadline, per second.", "none",
     (("headrace_serve_waiting", "waiting {{instance}}"),
      ("sum by (route) (rate(headrace_serve_degraded_total[1m]))", "degraded {{route}}"))),
    ("Rows held", "Rows in a replica's tables.", "short", (("headrace_replica_rows", "{{instance}} {{table}}"),)),
    ("Memory of rows", "Bytes that a replica's tables have reserved; twice that while it loads a snapshot.", "bytes",
     (("headrace_replica_bytes", "{{instance}} {{table}}"),)),
    ("Held back by the guard", "1: versions are not published, the trainer's log says why; rollbacks in a row.", "none",
     (("headrace_train_guard_held", "held"), ("headrace_train_guard_rollbacks", "rollbacks"))),
    ("Drift of the loss", "Changes of the log loss that were found, by task, per hour.", "none",
     (("increase(headrace_train_drifts_total[1h])", "{{task}}"),)),
)  # fmt: skip


def dashboards() -> list[dict[str, Any]]:
    """The dashboards, as Grafana's JSON model."""
    panels = [_panel(number, *panel) for number, panel in enumerate(PANELS)]
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return [
        {
            "uid": UID, "title": "Headrace", "tags": ["headrace"], "schemaVersion": 39, "editable": False,
            "timezone": "utc", "refresh": "5s", "time": {"from": "now-15m", "to": "now"},
            "templating": {"list": [source]}, "panels": panels,
        }
    ]  # fmt: skip


def build(out: Path) -> list[Path]:
    """Write each dashboard as JSON into the folder `out`. Raises HeadraceError if that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = []
        for dashboard in dashboards():
            file = out / f"{dashboard['uid']}.json"
            file.write_bytes(orjson.dumps(dashboard, option=orjson.OPT_INDENT_2) + b"\n")
            files.append(file)
        return files
    except OSError as error:
        raise HeadraceError(f"{out}: {error.strerror}; choose another folder with --out") from None


def push(url: str, token: str) -> list[str]:
    """Create or replace the dashboards on a Grafana server; gives their addresses.

    Raises UsageError for an address that is none, HeadraceError if the server cannot be reached or refuses.
    """
    from grafana_client import GrafanaApi, TokenAuth
    from grafana_client.client import GrafanaException

    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UsageError(f"{url!r} is not the address of a server: give it as http://HOST:PORT")
    grafana = GrafanaApi.from_url(url, credential=TokenAuth(token), timeout=10)
    pushed = []
    for dashboard in dashboards():
        try:
            answer = grafana.dashboard.update_dashboard(
                {"dashboard": dashboard, "overwrite": True, "message": "headrace dashboards push"}
            )
        except GrafanaException as error:
            raise HeadraceError(
                f"Grafana at {url} refuses the dashboard (HTTP {error.status_code}: {error.message});"
                " the token must be an editor's"
            ) from None
        except OSError as error:
            raise HeadraceError(f"no Grafana answers at {url} ({type(error).__name__}); check --url") from None
        pushed.append(url.rstrip("/") + answer.get("url", ""))
    return pushed


def _panel(
    number: int, title: str, description: str, unit: str, queries: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(queries)
    ]
    place = {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT}
    return {
        "id": number + 1, "type": "timeseries", "title": title, "description": description, "gridPos": place,
        "datasource": SOURCE, "targets": targets, "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
    }  # fmt: skip
