"""What processes say of themselves at `/metrics`, for the live page: who they are, what they use, how far they lag."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

MAX_BYTES = 8 << 20
PATIENCE_S = 3.0
# Whose metrics these are, by how their names begin.
PARTS = {
    "headrace_join_": "join", "headrace_train_": "train", "headrace_serve_": "serve", "headrace_replica_": "serve",
    "headrace_player_": "player",
}  # fmt: skip
LAG = ("headrace_join_lag_records", "headrace_train_lag_records")


@dataclass
class Scraped:
    """One process, as its `/metrics` had it last. `report` is a row of the page's table."""

    url: str
    name: str = ""
    error: str = "not asked yet"  # "": it answered
    values: dict[str, float] = field(default_factory=dict)  # metric → the sum over its labels
    cores: float | None = None
    _cpu: tuple[float, float] | None = None  # time.monotonic(), processor s

    def __post_init__(self) -> None:
        self.name = self.name or urlsplit(self.url).netloc

    async def scrape(self, session: aiohttp.ClientSession) -> None:
        """Ask once; what is wrong is kept in `error`."""
        try:
            async with session.get(self.url, timeout=aiohttp.ClientTimeout(PATIENCE_S)) as response:
                text = (await response.content.read(MAX_BYTES)).decode()
                if response.status != 200:
                    self.error = f"it answers {response.status}"
                    return
            self.take(text, time.monotonic())
            self.error = ""
        except (aiohttp.ClientError, TimeoutError):
            self.error = "it does not answer"
        except ValueError:
            self.error = "what it answers are no metrics"

    def take(self, text: str, at: float) -> None:
        """Prometheus' text, as it was at time.monotonic() `at`. Raises ValueError where it is none."""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        self.values = values
        for start, name in PARTS.items():
            if any(metric.startswith(start) for metric in values):
                self.name = name
                break
        cpu = values.get("process_cpu_seconds_total")
        if cpu is not None:
            if self._cpu is not None and at > self._cpu[0]:
                self.cores = max(0.0, cpu - self._cpu[1]) / (at - self._cpu[0])
            self._cpu = at, cpu

    def report(self) -> dict[str, Any]:
        """{name, state, cores, memory_mb, lag}; without what is not known."""
        if self.error:
            return {"name": self.name, "state": "down"}
        memory = self.values.get("process_resident_memory_bytes")
        known = {
            "name": self.name, "state": "up", "cores": self.cores,
            "memory_mb": None if memory is None else memory / 1e6,
            "lag": next((self.values[metric] for metric in LAG if metric in self.values), None),
        }  # fmt: skip
        return {name: value for name, value in known.items() if value is not None}
