"""The files that deploy Headrace, as the tests read them: the compose file, and the chart as helm renders it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deploy.settings import Settings, load

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: it comes with the extra dev")

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
CHART = ROOT / "deploy" / "helm" / "headrace"
KUBERNETES = "1.34"
LEAST = ("kafka.bootstrap=kafka:9092", "auth.existingSecret=tokens")
ALL = (
    *LEAST, "join.autoscaling.enabled=true", "serve.autoscaling.enabled=true", "train.gpus=2", "train.ranks=2",
    "metrics.serviceMonitor.enabled=true", "auth.metricsKey=admin", "storage.sharedUrl=s3://bucket/headrace",
    "storage.ports={443}", "kafka.existingSecret=kafka", "signing.existingSecret=keys", "tls.existingSecret=tls",
    "kafka.prefix=shop.", "kafka.ports={9093,9094}", "image.digest=sha256:" + 64 * "a",
    "metrics.from[0].namespaceSelector.matchLabels.name=monitoring",
)  # fmt: skip


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def tool(name: str) -> str:
    """The path of a program beside this Python, on the PATH, or where `go install` puts it; else a skip."""
    places = [Path(sys.executable).parent, Path.home() / "go" / "bin", *map(Path, sys.path)]
    path = os.pathsep.join([*(str(p / "bin") for p in places), *map(str, places), os.environ.get("PATH", "")])
    return shutil.which(name, path=path) or pytest.skip(f"{name} is not installed")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def template(*values: str) -> subprocess.CompletedProcess[str]:
    given = [part for value in values for part in ("--set", value)]
    return run("helm", "template", "shop", str(CHART), "--kube-version", f"{KUBERNETES}.0", *given)


@cache
def rendered(values: tuple[str, ...]) -> list[dict[str, Any]]:
    done = template(*values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def pods(values: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind/name, spec of its pods)"""
    for document in rendered(values):
        if document["kind"] in ("StatefulSet", "Deployment", "Job"):
            yield f"{document['kind']}/{document['metadata']['name']}", document["spec"]["template"]["spec"]


def accepted(environment: dict[str, str], tmp_path: Path) -> Settings:
    """The settings that a pod or container would start with. Raises UsageError where one of them does not exist."""
    ours = {name: value for name, value in environment.items() if name.startswith("HEADRACE_")}
    settings = load(tmp_path / "headrace.toml", ours)
    settings.check()
    return settings
