"""Figures of serving: a replica under load beside the bare forward, its memory, and freshness."""

from __future__ import annotations

from typing import Any

from tests.figures.common import Bench, Line, Row, at_least, at_most, equal, headrace

SOAK_S = 1_000
SOAK_SHARE = 0.8  # of the knee
GROWS_MB = 10.0  # of resident memory after the first minute: what an allocator may shift about


def serve(bench: Bench) -> list[Row]:
    """A replica of model `small` on one core, 500 candidates, 5 versions a second meanwhile: best of three"""
    found = headrace(bench.empty("serve"), "bench", "serve", "--runs", 3)
    at_random = headrace(
        bench.empty("serve"), "bench", "serve", "--runs", 1, "--rate", round(found["rps"], 1), "--poisson"
    )
    return [
        at_most("p99 to the bare forward of the same batches", found["ratio"], 3.0, " ×"),
        at_most("p99", found["p99_ms"], 25.0, " ms"),
        equal("errors", found["errors"], 0),
        *(_said(found, key, " ms") for key in ("p50_ms", "bare_forward_ms", "stall_p99_ms")),
        Row("requests a second, at even distances", f"{found['rps']:.1f}", "", True),
        Row("the knee: the most with a p99 of 25 ms", f"{found['knee_rps']:.1f}", "", True),
        Row("p99 of as many that come at random", f"{at_random['p99_ms']:.1f} ms", "", True),
        Row("versions applied meanwhile", f"{found['versions']}", "", found["versions"] > 0),
        *(_said(found, key, " ms") for key in ("apply_p50_ms", "apply_p99_ms")),
        *(
            Row(f"run {number}", f"p99 {run['p99_ms']:.1f} ms, {run['ratio']:.2f} × of {run['bare_forward_ms']:.2f} ms",
                "", True)
            for number, run in enumerate(found["all"], 1)
        ),
    ]  # fmt: skip


def soak(bench: Bench) -> list[Row]:
    """1,000 s at 80 % of the knee, versions all the time"""
    arguments = "--share", SOAK_SHARE, "--seconds", SOAK_S, "--runs", 1
    found = headrace(bench.empty("soak"), "bench", "serve", *arguments)
    return [
        equal("errors", found["errors"], 0),
        at_most("memory after the first minute, growth", found["rss_growth_mb"], GROWS_MB, " MB"),
        Row("the line through it", f"{found['rss_slope_mb_per_h']:.1f} MB an hour", "", True),
        Row("memory at the end", f"{found['rss_mb']:.0f} MB", "", True),
        Row("requests", f"{found['requests']:,}", "", True),
        _said(found, "p99_ms", " ms"),
        Row("versions applied meanwhile", f"{found['versions']:,}", "", found["versions"] > 0),
    ]


def freshness(bench: Bench) -> list[Row]:
    """From an event to the replica that has learned of it, 5,000 events/s on two cores"""
    found = headrace(bench.empty("freshness"), "bench", "freshness", "--rate", 5000, "--runs", 3)
    return [
        at_most("p50", found["p50_ms"], 600, " ms"),
        at_most("p99", found["p99_ms"], 1_000, " ms"),
        *_about(found),
    ]


def freshness_slow(bench: Bench) -> list[Row]:
    """The same of 100 events/s"""
    found = headrace(bench.empty("freshness"), "bench", "freshness", "--rate", 100, "--runs", 3)
    return [at_most("p99", found["p99_ms"], 700, " ms"), _said(found, "p50_ms", " ms"), *_about(found)]


def _about(found: dict[str, Any]) -> list[Row]:
    """What else there is to say of a freshness."""
    return [
        at_least("probes", found["probes"], 1_000),
        equal("probes that did not return", found["unreturned"], 0),
        equal("the system keeps up", found["keeps_up"], True),
        at_least("sent of what was asked", found["rate"] / found["asked_rate"], 0.97),
        *(
            Row(f"stage {name}", f"{ms:.0f} ms (p99 {found['stages_p99'][name]:.0f}), {found['shares'][name]:.0%}",
                "", True)
            for name, ms in found["stages"].items()
        ),
        *(Row(f"cores of {name}", f"{cores:.2f}", "", True) for name, cores in found["cores"].items()),
        *(
            Row(f"run {number}", f"p50 {run['p50_ms']:.0f}, p99 {run['p99_ms']:.0f} ms", "", True)
            for number, run in enumerate(found["all"], 1)
        ),
    ]  # fmt: skip


def _said(found: dict[str, Any], key: str, unit: str) -> Row:
    """A figure with nothing to hold it against."""
    return Row(key.removesuffix("_ms").replace("_", " "), f"{found[key]:.2f}{unit}", "", True)


LINES: dict[str, Line] = {"serve": serve, "soak": soak, "freshness": freshness, "freshness_slow": freshness_slow}
