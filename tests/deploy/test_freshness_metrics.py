"""Freshness by stage: known probes give known histograms, and what is on its way is told."""

from __future__ import annotations

import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deploy.freshness_metrics import BUCKETS, STAGES, StageFreshness
from deploy.prometheus import histogram, quantile


def _gauges(registry: CollectorRegistry) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {s.name: s.value for f in families for s in f.samples if not s.labels}


def _quantiles(registry: CollectorRegistry, stage: str) -> tuple[float, float]:
    text = generate_latest(registry).decode()
    _, buckets = histogram(text, "headrace_freshness_seconds", stage=stage)
    return quantile(0.5, buckets), quantile(0.99, buckets)


@pytest.mark.parametrize("middle", [0.1, 0.35, 1.1])
def test_the_quantiles_of_the_histogram_are_those_of_the_probes_within_some_per_cent(middle: float) -> None:
    registry = CollectorRegistry()
    stages = StageFreshness(registry)
    took = middle * np.exp(0.25 * np.random.default_rng(1).standard_normal(5_000))
    for offset, seconds in enumerate(took):
        stages.sent(0, offset, at=0.0)
        stages.passed("servable", {0: offset + 1}, at=float(seconds))
    found, want = np.array(_quantiles(registry, "servable")), np.percentile(took, [50, 99])
    assert (np.abs(found / want - 1) < 0.04).all(), (found, want)
    figures = stages.figures()["servable"]
    assert figures["count"] == 5_000
    assert figures["p50"] == pytest.approx(1e3 * np.median(took[-2_000:]), abs=0.1)


def test_each_probe_is_one_sample_of_each_stage_however_often_a_stage_is_told() -> None:
    registry = CollectorRegistry()
    stages = StageFreshness(registry)
    for offset in (3, 5, 9):
        stages.sent(1, offset, at=10.0)
    for at, stage in enumerate(STAGES):
        stages.passed(stage, {1: 5}, at=11.0 + at)  # past 3, and not past 5
        stages.passed(stage, {1: 5, 0: 100}, at=50.0)  # again
        stages.passed(stage, {1: 2}, at=60.0)  # one that is behind: another epoch
    text = generate_latest(registry).decode()
    for at, stage in enumerate(STAGES):
        assert f'headrace_freshness_seconds_count{{stage="{stage}"}} 1.0' in text
        assert f'headrace_freshness_seconds_sum{{stage="{stage}"}} {1.0 + at}' in text
    assert stages.waiting == 2


def test_a_stage_that_is_faster_than_kafka_s_acknowledgement_is_timed_by_when_it_was() -> None:
    registry = CollectorRegistry()
    stages = StageFreshness(registry)
    stages.passed("joined", {0: 8}, at=20.0)
    stages.sent(0, 7, at=19.5)  # the acknowledgement comes after the block
    assert 'headrace_freshness_seconds_sum{stage="joined"} 0.5' in generate_latest(registry).decode()


def test_what_is_on_its_way_grows_old_while_a_stage_stands_still() -> None:
    refused: list[float | None] = [None]
    registry = CollectorRegistry()
    stages = StageFreshness(registry, lambda: refused[0])
    assert _gauges(registry)["headrace_freshness_oldest_seconds"] == 0
    now = time.monotonic()
    stages.sent(0, 1, at=now - 30)
    stages.sent(0, 2, at=now - 5)
    told = _gauges(registry)
    assert (told["headrace_freshness_waiting"], told["headrace_freshness_probes_total"]) == (2, 2)
    assert told["headrace_freshness_oldest_seconds"] == pytest.approx(30, abs=2)
    stages.passed("servable", {0: 3}, at=now)
    assert _gauges(registry)["headrace_freshness_oldest_seconds"] == 0
    refused[0] = now - 60  # Kafka takes nothing
    assert _gauges(registry)["headrace_freshness_oldest_seconds"] == pytest.approx(60, abs=2)


def test_buckets_are_dense_where_freshness_is() -> None:
    bounds = np.array(BUCKETS)
    assert (np.diff(bounds) > 0).all()
    assert bounds[-1] >= 60
    within = bounds[(bounds >= 0.05) & (bounds <= 2.0)]
    assert (within[1:] / within[:-1] < 1.11).all()
