"""Alert rules held to the model that Grafana's own client has of them (Go): unknown fields and wrong values refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.dashboards.alerts import ALERTS, grafana_rules


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("go") is None, reason="go is not installed")
def test_the_rules_are_as_grafanas_model_has_them(tmp_path: Path) -> None:
    program = tmp_path / "check"
    built = subprocess.run(
        ["go", "build", "-o", str(program), "."], cwd=Path(__file__).with_name("grafana_models"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr

    def check(rules: list[dict]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program)], input=json.dumps(rules), capture_output=True, text=True)

    good = grafana_rules()
    assert check(good).stdout == f"{len(ALERTS)}\n"
    for change in ({"colour": "red"}, {"noDataState": "Perhaps"}, {"title": ""}, {"data": "none"}):
        assert check([{**good[0], **change}]).returncode == 1, change
