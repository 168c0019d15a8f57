"""What a worker says of itself over HTTP, its metrics above all, read as benchmarks and torture need it."""

from __future__ import annotations

import contextlib
import http.client

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def get(port: int, path: str, patience_s: float = 2.0) -> bytes | None:
    """What 127.0.0.1 answers with 200; None where it does not, or not in time."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=patience_s)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException):
            return None
    return raw if answer.status == 200 else None


def samples(port: int, patience_s: float = 2.0) -> list[Sample] | None:
    """All that the worker on this port of 127.0.0.1 says; None where it does not answer."""
    raw = get(port, "/metrics", patience_s)
    if raw is None:
        return None
    families: list[Metric] = list(text_string_to_metric_families(raw.decode()))
    return [sample for family in families for sample in family.samples]


def histogram(text: str, name: str, **labels: str) -> tuple[float, dict[float, float]]:
    """(count, {upper bound: how many are at most that}) of the histogram with just these labels in Prometheus' text."""
    for family in text_string_to_metric_families(text):
        if family.name == name:
            buckets = {
                float(s.labels["le"]): s.value
                for s in family.samples
                if s.name == f"{name}_bucket" and {**s.labels, "le": ""} == {**labels, "le": ""}
            }
            return buckets.get(float("inf"), 0.0), buckets
    return 0.0, {}


def quantile(share: float, buckets: dict[float, float]) -> float:
    """A quantile of a histogram, linear inside a bucket (as PromQL's `histogram_quantile`); 0 where it is empty.

    >>> quantile(0.5, {0.01: 0.0, 0.02: 10.0, float("inf"): 10.0})
    0.015
    """
    wanted, below, lower = share * buckets.get(float("inf"), 0.0), 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= wanted > 0:
            return lower if bound == float("inf") else lower + (bound - lower) * (wanted - below) / (count - below)
        below, lower = count, bound
    return 0.0
