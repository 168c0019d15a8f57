"""Dashboards held to the types that Grafana publishes (grafana_schema.json; docs/dashboards.md says how it is made)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs

SCHEMA = json.loads(Path(__file__).with_name("grafana_schema.json").read_text("utf-8"))
DASHBOARD, OPTIONS, CUSTOM = (
    jsonschema_rs.validator_for(SCHEMA[part]) for part in ("dashboard", "timeseries_options", "timeseries_custom")
)
OF_INTERVALS = {"auto", "auto_count", "auto_min"}  # the SDK writes these fields of interval variables for all kinds


def faults(dashboard: dict[str, Any]) -> list[str]:
    """What is not as the types have it: unknown fields, wrong types, missing ones."""
    variables = [{k: v for k, v in one.items() if k not in OF_INTERVALS} for one in dashboard["templating"]["list"]]
    found = [*DASHBOARD.iter_errors({**dashboard, "templating": {"list": variables}})]
    for panel in dashboard["panels"]:
        if panel["type"] == "timeseries":
            found += OPTIONS.iter_errors(panel["options"])
            found += CUSTOM.iter_errors(panel["fieldConfig"]["defaults"]["custom"])
    return [f"{'/'.join(map(str, error.instance_path))}: {error.message}" for error in found]
