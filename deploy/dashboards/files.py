"""Dashboards and alerts as files: for Grafana's and Prometheus' own provisioning, and to look at."""

from __future__ import annotations

from pathlib import Path

import orjson
import yaml

from deploy.dashboards.alerts import ALERTS, RUNBOOKS, grafana_rules, rule_file
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.panels import grafana_json
from embedding_store.errors import HeadraceError

RULES, GRAFANA_RULES = "headrace.rules.yml", "grafana-alert-rules.json"


def build(out: Path, runbooks: str = RUNBOOKS, scale: float = 1) -> list[Path]:
    """Write each dashboard as JSON, the rules for Prometheus as YAML, those for Grafana as JSON into the folder `out`.

    `runbooks`: address of docs/operations.md, for the alerts' links. `scale`: of all windows of the rules for
    Prometheus, for tests. Raises HeadraceError if that cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for board in BOARDS:
            written.append(out / f"{board.uid}.json")
            written[-1].write_bytes(_json(grafana_json(board)))
        written.append(out / GRAFANA_RULES)
        written[-1].write_bytes(_json(grafana_rules(ALERTS, runbooks)))
        written.append(out / RULES)
        rules = rule_file(ALERTS, scale, runbooks)
        written[-1].write_text(yaml.safe_dump(rules, sort_keys=False, width=120, allow_unicode=True), "utf-8")
        return written
    except OSError as error:
        raise HeadraceError(f"{out}: {error.strerror}; choose another folder with --out") from None


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"
