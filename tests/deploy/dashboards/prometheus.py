"""A real Prometheus (Debian's package), started for a test; without it the test is skipped by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.processes import free_port

with_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
CONFIG = """
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
- job_name: headrace
  file_sd_configs: [{files: [%s], refresh_interval: 1s}]
"""


@dataclass
class Prometheus:
    """One that answers at `url`."""

    url: str
    process: subprocess.Popen
    log: Path

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def firing(self, title: str, **labels: str) -> list[dict[str, Any]]:
        """The alerts of this name that fire, with these labels."""
        return [
            alert for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing" and alert["labels"].items() >= {"alertname": title, **labels}.items()
        ]  # fmt: skip

    def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> float:
        """Wait until it holds; how many seconds that took. AssertionError with `what` otherwise."""
        begun = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - begun < timeout_s, f"{what}: waited {timeout_s:.0f} s in vain"
            time.sleep(0.5)  # what is waited for is in other processes
        return time.monotonic() - begun


@contextmanager
def prometheus(folder: Path, targets: Path, rules: Sequence[Path] = ()) -> Iterator[Prometheus]:
    """One on a free port of the loopback that scrapes, once a second, what the file `targets` names."""
    folder.mkdir(exist_ok=True)
    config, log = folder / "prometheus.yml", folder / "prometheus.log"
    config.write_text(CONFIG % (", ".join(json.dumps(str(file)) for file in rules), json.dumps(str(targets))))
    address = f"127.0.0.1:{free_port()}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
             f"--web.listen-address={address}"],
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        running = Prometheus(f"http://{address}", process, log)
        running.until(lambda: _ready(running.url), 60, "Prometheus starts")
        yield running
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
