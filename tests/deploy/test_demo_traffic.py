"""What the demo remembers of a run that may last for days."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
from aiohttp import web

from deploy.demo import traffic
from deploy.freshness import RECENT, Freshness
from replay.simulator import SimulatorSettings
from replay.sinks import JsonlSink

START_MS = 1_760_000_000_000
STEP_MS = 250


def test_requests_are_forgotten_once_nobody_clicks_them_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(START_MS, STEP_MS)
    monkeypatch.setattr(traffic, "now_ms", lambda: next(clock))

    async def main() -> traffic.ClosedLoop:
        answered = itertools.count(1)

        async def recommend(request: web.Request) -> web.Response:
            items = [{"item": item.item, "propensity": 1.0} for item in users.world.catalogue()[:8]]
            return web.json_response({
                "items": items, "request_id": f"q{next(answered)}", "moment_ms": users.world.now_ms,
                "model_version": "1.1", "feature_hash": 1,
            })  # fmt: skip

        app = web.Application()
        app.router.add_post("/v1/recommend", recommend)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        with JsonlSink(tmp_path / "events.jsonl") as sink:
            settings = SimulatorSettings(users=50, items=40, requests_per_s=2.0)
            users = traffic.ClosedLoop(settings, sink, f"http://127.0.0.1:{runner.addresses[0][1]}")  # type: ignore[arg-type]
            users.open(START_MS)
            stop = asyncio.Event()
            run = asyncio.create_task(users.run(stop))
            while users.world.now_ms < START_MS + 3 * traffic.FORGET_MS and not run.done():
                await asyncio.sleep(traffic.STEP_S)
            stop.set()
            await run  # a click of what was forgotten would be a KeyError
        await runner.cleanup()
        return users

    monkeypatch.setattr(traffic, "STEP_S", 0.0)
    users = asyncio.run(main())
    shown = sum(users.clicks.shown.values()) / 8
    assert shown > 200, "two a second, for three minutes"
    assert sum(users.clicks.clicked.values()) > 0
    assert 0 < len(users._shown) < shown / 2
    assert all(ts >= users.world.now_ms - traffic.FORGET_MS - STEP_MS for ts, _ in users._shown.values())


def test_freshness_of_all_probes_needs_no_probe_kept() -> None:
    kept, every = Freshness(keep=3), Freshness()
    for fresh in (kept, every):
        for n in range(RECENT + 500):
            fresh.sent(0, n, float(n))
        for n in range(RECENT + 500):
            fresh.served({0: n + 1}, n + (0.25 if n < 500 else 0.5))
    assert len(kept.returned) == 3
    assert len(every.returned) == RECENT + 500
    assert kept.figures() == every.figures()
    assert kept.figures()["count"] == RECENT + 500
    assert kept.figures()["p50"] == 500
    assert kept.figures(recent=True)["p95"] == 500
    assert every.unreturned() == 0
