"""What a worker says of itself at `/metrics`, read as the benchmarks need it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


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
