"""`headrace bench`: the keys that are promised, ratios of the same run, exit codes."""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import os
from pathlib import Path

import aiohttp
import numpy as np
import orjson
import pytest
import torch
from aiohttp import web

from deploy.bench import common, serve_parts, train_parts
from deploy.bench import join as join_bench
from deploy.bench import scale as scale_bench
from deploy.bench import serve as serve_bench
from deploy.bench import store as store_bench
from deploy.bench.freshness import STAGES as STAGES_OF_A_PROBE
from deploy.bench.mix import SHARES, standard_mix
from deploy.bench.train import STAGES
from deploy.cli import run
from deploy.prometheus import histogram, quantile


def test_the_mix_has_its_shares_of_events() -> None:
    counted: collections.Counter[str] = collections.Counter()
    times = []
    for raw in standard_mix(100_000, page=10, span_ms=100_000):
        event = orjson.loads(raw)
        counted[event["kind"]] += len(event.get("items", [0]))
        times.append(event["ts"])
    assert {kind: counted[kind] / counted.total() for kind in SHARES} == pytest.approx(SHARES, abs=0.01)
    assert times == sorted(times)


@pytest.mark.nightly  # each run of CI has bench check, which runs it
def test_join_reports_its_keys_and_the_reference_agrees(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "join", "--events", "10000", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    contract = {"events_per_s", "reference_per_s", "rss_growth_mb", "rss_growth_mb_10x_open", "digest_equal"}
    assert contract <= result.keys()
    assert result["digest_equal"] is True
    assert result["ratio"] == pytest.approx(result["events_per_s"] / result["reference_per_s"])


def test_rows_that_differ_from_the_reference_are_a_failure(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"digest_equal": False, "events_per_s": 1.0}
    monkeypatch.setattr(join_bench, "bench_join", lambda *_: measured)
    assert run(["bench", "join", "--json"]) == 1
    assert "not those of the reference" in capfd.readouterr().err


SMALL_STORE = ["--rows", "5000", "--largest", "10000", "--touched", "50", "--ids", "20000", "--memory", "2000"]


@pytest.mark.nightly
def test_store_reports_its_keys_and_tiered_rows_come_back_exactly(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "store", *SMALL_STORE, "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    contract = {
        "lookup_per_s", "admit_per_s", "checkpoint_ms", "checkpoint_flatness", "restore_rows_per_s", "rows_tiered",
        "tier_read_rows_per_s",
    }  # fmt: skip
    assert contract <= result.keys()
    assert list(result["checkpoint_ms"]) == ["100", "1000", "10000"]
    assert result["tier_exact"] is True


def test_a_row_that_comes_back_otherwise_is_a_failure(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"checkpoint_ms": {"100": 1.0}, "tier_exact": False}
    monkeypatch.setattr(store_bench, "bench_store", lambda *_: measured)
    assert run(["bench", "store"]) == 1
    said = capfd.readouterr()
    assert "checkpoint_ms 100" in said.out
    assert "not learned" in said.err


@pytest.mark.nightly
def test_train_reports_its_keys_and_where_the_time_went(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "train", "--ids", "1000", "--steps", "2", "--runs", "1", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["headrace_per_s"] / result["bare_torchrec_per_s"])
    assert result["ratio_to_limit"] == pytest.approx(result["headrace_per_s"] / result["pure_torch_per_s"])
    assert set(result["share"]) == set(STAGES)
    assert all(share > 0 for share in result["share"].values())
    assert 0.9 < sum(result["share"].values()) <= 1, "there is nothing else in a step"
    assert result["commits"] >= 1
    assert result["rows_a_step"] == 1024 * (6 + 2 * 20)


def test_the_parts_of_train_learn_the_same_model(tmp_path: Path, one_thread: None) -> None:
    """Else their speeds are of different work."""
    ids, feature = 50, train_parts.FEATURES
    parts = [train_parts.BareTorchrec(ids), train_parts.PureTorch(ids), train_parts.Headrace(ids, tmp_path)]
    for batch in train_parts.batches(ids, 5):
        for part in parts:
            part.learn(part.ready(batch))
    bare, *others = parts
    for other in others:
        for name, weights in bare.dense.named_parameters():
            torch.testing.assert_close(dict(other.dense.named_parameters())[name], weights, atol=1e-4, rtol=0)
        for name, number in itertools.product(feature, range(ids)):
            assert bare.row(name, number).any()
            np.testing.assert_allclose(other.row(name, number), bare.row(name, number), atol=1e-4)
    parts[2].store.close()


@pytest.mark.nightly
def test_scale_learns_on_two_ranks_what_one_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "scale", "--steps", "20", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["ranks"].keys() == {"1", "2"}
    assert 0 < result["largest_difference"] < 1e-5, "sums over two ranks have another order"
    assert result["loss_difference"] <= result["largest_difference"]
    assert 0 < result["loss"] < 5


def test_ranks_that_learn_otherwise_are_a_failure(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for difference in (1.1e-5, float("nan")):
        monkeypatch.setattr(scale_bench, "bench_scale", lambda *_, d=difference: {"loss_difference": d})
        assert run(["bench", "scale", "--json"]) == 1
        assert "two ranks learn otherwise than one" in capfd.readouterr().err


def test_wrong_sizes_are_wrong_usage() -> None:
    assert run(["bench", "join", "--events", "0"]) == 2
    assert run(["bench", "intake", "--runs", "0"]) == 2


@pytest.mark.nightly
@pytest.mark.broker
def test_intake_reports_its_keys_from_one_run(broker: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--events", "50000", "--faust-events", "1000", "--runs", "1", "--bootstrap", broker, "--json"]
    assert run(["bench", "intake", *arguments]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["ratio_to_faust"] == pytest.approx(result["headrace_per_s"] / result["faust_per_event_per_s"])
    assert result["ratio_to_limit"] == pytest.approx(result["headrace_per_s"] / result["client_limit_per_s"])


@pytest.mark.broker
@pytest.mark.nightly
def test_serve_reports_its_keys_under_versions_that_come(broker: str, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--items", "2000", "--users", "2000", "--rate", "10", "--seconds", "3", "--runs", "1"]
    assert run(["bench", "serve", *sizes, "--bootstrap", broker, "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["candidates"] == 500
    assert result["errors"] == 0
    assert result["requests"] == pytest.approx(30, abs=1), "the load is open: it does not wait for answers"
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert result["ratio"] == pytest.approx(result["p99_ms"] / result["bare_forward_ms"])
    assert result["stall_p99_ms"] > 0
    assert result["versions"] >= 1, "else nothing came in between"
    assert 0 < result["apply_p50_ms"] <= result["apply_p99_ms"]
    assert [one["p99_ms"] for one in result["all"]] == [result["p99_ms"]]
    assert result["rss_mb"] > 100
    assert {"rps", "rss_growth_mb", "rss_slope_mb_per_h", "knee_rps", "arrivals", "cpu_ms_a_request"} <= result.keys()


def test_a_late_answer_counts_from_when_its_request_was_due() -> None:
    """A server that answers one request after the other, each after 20 ms, asked every 10 ms: a queue that grows."""

    async def main() -> list[float]:
        turn = asyncio.Lock()

        async def rank(request: web.Request) -> web.Response:
            async with turn:
                await asyncio.sleep(0.02)
            return web.Response(body=b'"item":' * 500)

        app = web.Application()
        app.router.add_post("/v1/rank", rank)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        load = serve_parts.Load(runner.addresses[0][1], 1_000, 10, seed=1)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await load.open(session, 0.5, 100.0, "even")
        await runner.cleanup()
        assert load.errors == {}
        return load.took

    took = asyncio.run(main())
    assert len(took) == pytest.approx(50, abs=1)
    assert max(took) > 0.4, "the last of them waited for all before it"


def test_a_quantile_of_a_histogram_is_linear_inside_its_bucket() -> None:
    text = 'x_bucket{le="0.01"} 2\nx_bucket{le="0.02"} 10\nx_bucket{le="+Inf"} 11\nx_count 11\nx_sum 1\n'
    count, buckets = histogram("# TYPE x histogram\n" + text, "x")
    assert count == 11
    assert quantile(0.5, buckets) == pytest.approx(0.01 + 0.01 * (5.5 - 2) / 8)
    assert quantile(0.99, buckets) == 0.02, "past the last bound nothing is known"
    assert quantile(0.5, {}) == 0


def test_memory_counts_from_after_the_first_minute() -> None:
    grown = serve_bench.memory([[0.0, 100.0], [60.0, 500.0], [120.0, 501.0], [180.0, 502.0]])
    assert grown["rss_growth_mb"] == 2
    assert grown["rss_slope_mb_per_h"] == pytest.approx(60)
    assert serve_bench.memory([[0.0, 100.0], [2.0, 101.0], [4.0, 101.0]])["rss_growth_mb"] == 0, "or half of it"


@pytest.mark.broker
@pytest.mark.nightly
def test_freshness_reports_its_keys_and_stages_that_add_up(broker: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rate", "100", "--seconds", "4", "--warm-up", "1", "--bootstrap", broker, "--json"]
    assert run(["bench", "freshness", *arguments]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["rate"] == pytest.approx(100, rel=0.2)
    assert result["probes"] > 100
    assert 250 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"], "L alone is 250 ms"
    assert list(result["stages"]) == list(STAGES_OF_A_PROBE)
    assert all(ms >= 0 for ms in result["stages"].values())
    assert result["stages"]["hold"] == 250
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert sum(result["stages"].values()) == pytest.approx(result["p50_ms"], rel=0.5)
    assert result["unreturned"] == 0
    assert {"train", "serve", "join", "producer"} <= result["cores"].keys()


def test_a_part_may_last_as_long_as_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_part.py").write_text(
        "import json, sys, time\ntime.sleep(json.loads(sys.argv[2])['sleeps'])\nprint('{}')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(common, "CHILD_SECONDS", 0.5)
    assert common.run_part("slow_part", "sleep", sleeps=1.0, seconds=30.0) == {}
    with pytest.raises(common.BenchError, match="did not end within"):
        common.run_part("slow_part", "sleep", sleeps=60.0)
