"""`make figures ONLY=proof.soak`: it finds what grows, and the knee; nightly it runs for ten minutes."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from deploy.bench.plots import OURS, curves_svg
from tests.deploy.drawings import Plot
from tests.end_to_end.demos import Demo
from tests.figures import soak
from tests.figures.common import Bench, FigureError


def made(name: str, *, growth: float = 0.0, noise: float = 0.0, level: float = 500.0) -> soak.Samples:
    """Two hours of a figure that begins at `level` and grows by so much after the settling."""
    rng = np.random.default_rng(1)
    at = np.arange(0.0, 7_200.0, 10.0)
    values = level + growth * at / (7_200 - soak.SETTLE_S) + noise * rng.standard_normal(len(at))
    return soak.Samples([{"seconds": t, name: v} for t, v in zip(at.tolist(), values.tolist(), strict=True)])


@pytest.mark.parametrize("name", ["rss_mb train", "disk_mb train", "fresh_ms p99"])
def test_what_grows_is_found_and_noise_is_not(name: str) -> None:
    (leaks,) = soak.trends(made(name, growth=60.0, noise=20.0, level=400.0), soak.SETTLE_S, 1_000)
    assert not leaks.flat
    assert leaks.growth == pytest.approx(60, abs=8)
    (flat,) = soak.trends(made(name, noise=40.0), soak.SETTLE_S, 1_000)
    assert flat.flat


def test_a_spike_and_the_beginning_are_no_growth() -> None:
    samples = made("rss_mb serve")
    for row in samples.rows[-30:]:
        row["rss_mb serve"] += 300
    for row in samples.rows[:80]:
        row["rss_mb serve"] = 100
    (trend,) = soak.trends(samples, soak.SETTLE_S, 1_000)
    assert trend.flat
    assert trend.growth == pytest.approx(0, abs=1)


@pytest.mark.parametrize("name", ["rss_mb train", "disk_mb train", "files join", "threads serve", "fresh_ms p99"])
@pytest.mark.parametrize("at", [0.4, 0.5, 0.6])
def test_what_rises_once_and_stays_is_found(name: str, at: float) -> None:
    """As a table that doubles its room does: the slopes between most pairs of samples are then 0."""
    samples = made(name, level=400.0)
    for row in samples.rows:
        row[name] += 300.0 * (row["seconds"] >= soak.SETTLE_S + at * (soak.SECONDS - soak.SETTLE_S))
    (trend,) = soak.trends(samples, soak.SETTLE_S, 1_000)
    assert not trend.flat
    assert trend.growth >= 300


def test_lags_are_of_records_and_of_blocks() -> None:
    for name, growth in (("lag join", 2_000.0), ("lag train", 300.0)):
        (trend,) = soak.trends(made(name, growth=growth, level=0.0), soak.SETTLE_S, 1_000)
        assert not trend.flat
        (trend,) = soak.trends(made(name, noise=50.0, level=0.0), soak.SETTLE_S, 1_000)
        assert trend.flat


def test_processes_of_a_name_count_together_and_an_answer_that_is_late_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two children, named alike, of this test stand for the demo's; its /metrics answers every second time."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as process:
        running = Demo(process, tmp_path)
        running.until(lambda: psutil.Process(process.pid).children(), 30)
        (tmp_path / "targets.json").write_text(
            json.dumps([{"labels": {"job": job}, "targets": [job]} for job in ("demo", "join", "train")])
        )
        (tmp_path / "demo").mkdir()
        answers = itertools.cycle([(5.0, {1.0: 5.0, float("inf"): 5.0}), (0.0, {}), (9.0, {1.0: 9.0, math.inf: 9.0})])
        monkeypatch.setattr(soak, "_fresh", lambda *_: next(answers))
        monkeypatch.setattr(soak, "_metrics", lambda *_: "")
        monkeypatch.setattr(soak, "SAMPLE_S", 0.05)
        rows = list(soak._sampled(running, 0.6))
        process.communicate("\n")
    assert len(rows) > 3
    assert any("fresh_ms p50" in row for row in rows)
    (name,) = {key.partition(" ")[2] for key in rows[0] if key.startswith("rss_mb")}
    assert rows[0][f"threads {name}"] == 2


def test_few_files_that_stay_open_are_found() -> None:
    (leaks,) = soak.trends(made("files join", growth=20.0, level=60.0), soak.SETTLE_S, 1_000)
    assert not leaks.flat


def test_a_jvm_may_take_its_heap_and_no_more() -> None:
    def grown(growth: float) -> soak.Trend:
        return soak.trends(made("rss_mb kafka", growth=growth, level=400.0), soak.SETTLE_S, 1_000)[0]

    assert grown(200).flat
    assert not grown(1_000).flat


def test_rocksdb_may_fill_its_cache_and_no_more() -> None:
    for growth, flat in ((100.0, True), (140.0, True), (300.0, False)):
        (trend,) = soak.trends(made("store_mb join", growth=growth, level=100.0), soak.SETTLE_S, 1_000)
        assert trend.flat == flat


def test_what_grows_for_a_reason_is_said_and_not_judged() -> None:
    for name in ("rows train", "disk_mb kafka", "open join", "cpu_s join"):
        assert soak.trends(made(name, growth=1_000.0), soak.SETTLE_S, 1_000) == []
        assert soak.is_only_said(name)


def test_a_figure_that_must_be_there_and_is_not_fails() -> None:
    """As lag and freshness of a worker that answers nobody; and a run with hardly any samples."""
    result = {
        "balance": {"events_in": 5, "joined": 5}, "oracle_balance": {"events_in": 5, "joined": 4}, "lost": 0,
        "duplicated": 0, "left_out": 0, "unanswered": {}, "events_per_s": 700.0, "seconds": 7_200.0, "restarts": {},
    }  # fmt: skip
    samples = made("lag join", level=5.0)
    for row in samples.rows[:450]:
        del row["lag join"]
    found = soak.trends(samples, soak.SETTLE_S, 700)
    failed = {row.what for row in soak.rows_of(found, samples, result, None, 7_200) if row.fails}
    assert failed == {"the oracle's balance", *soak.JUDGED}
    samples = made("lag join", level=5.0)
    samples.rows = samples.rows[::2]
    found = soak.trends(samples, soak.SETTLE_S, 700)
    failed = {row.what for row in soak.rows_of(found, samples, result, None, 7_200) if row.fails}
    assert failed == {"the oracle's balance", "samples", *soak.JUDGED} - {"lag join"}


def test_the_knee_is_the_largest_rate_that_is_kept_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def keeps_up(_: Bench, rate: float) -> bool:
        asked.append(rate)
        return rate <= 2_700

    monkeypatch.setattr(soak, "_keeps_up", keeps_up)
    assert soak.find_knee(Bench(tmp_path)) == 2_500
    assert asked == [500, 1_000, 2_000, 4_000, 3_000, 2_500]
    monkeypatch.setattr(soak, "_keeps_up", lambda *_: False)
    with pytest.raises(FigureError, match="does not keep up with 500"):
        soak.find_knee(Bench(tmp_path))
    monkeypatch.setattr(soak, "_keeps_up", lambda *_: True)
    assert soak.find_knee(Bench(tmp_path)) == soak.MOST_RATE


def test_curves_are_drawn_in_panels_of_their_own_from_0_to_their_largest() -> None:
    curves = {
        "a <b>": (np.array([0.0, 50.0, 100.0]), np.array([0.0, 1_234.0, 617.0])),
        "none": (np.empty(0), np.empty(0)),
        "zero": (np.array([0.0, 5.0]), np.zeros(2)),
    }
    drawn = curves_svg("all of it", curves)
    assert drawn == curves_svg("all of it", curves)
    plot = Plot(drawn)
    assert plot.title == "all of it"
    assert [word for word in plot.words if word != plot.title] == ["a <b>: up to 1,234, 100 s", "zero: up to 0, 5 s"]
    rising, flat = plot.paths(OURS)
    (left, bottom), (_, top), (_, last) = rising
    assert rising[:, 0] - left == pytest.approx(np.array([0, 0.5, 1]) * np.ptp(rising[:, 0]))
    assert top < last == pytest.approx((top + bottom) / 2)
    assert flat[:, 1] == pytest.approx(bottom), "on the line on which the other begins"
    assert flat[:, 0].min() > rising[:, 0].max(), "beside it"
    assert curves_svg("nothing", {})


def test_a_drawing_of_two_hours_is_small() -> None:
    at = np.arange(0.0, 7_200.0, 10.0)
    noise = np.random.default_rng(1).exponential(size=(3, len(at)))
    quiet = {f"rss_mb {number}": (at, 400 + at / 100) for number in range(27)}
    assert len(curves_svg("two hours", quiet | {f"lag {n}": (at, values) for n, values in enumerate(noise)})) < 100_000


@pytest.mark.nightly
@pytest.mark.broker
@pytest.mark.timeout(2_400)
def test_ten_minutes_of_the_demo_are_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate that any machine keeps up with. Freshness and lag are the machine's matter in so short a run."""
    for name, value in (("SECONDS", "600"), ("RATE", "500"), ("OUT", str(tmp_path / "out"))):
        monkeypatch.setenv(f"SOAK_{name}", value)
    (tmp_path / "bench").mkdir()
    rows = soak.soak(Bench(tmp_path / "bench"))
    assert not [row for row in rows if row.fails and row.what.split()[0] not in ("fresh_ms", "lag")]
    told = json.loads((tmp_path / "out" / "soak.json").read_text("utf-8"))
    assert {"rss_mb train", "rss_mb join", "rss_mb serve", "rss_mb demo", "rss_mb twin", "rss_mb kafka"} <= {
        trend["name"] for trend in told["trends"]
    }
    assert "rss_mb train: up to" in (tmp_path / "out" / "soak.svg").read_text("utf-8")
