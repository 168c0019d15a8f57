"""A second model answers what the replica answers, unseen (online_model/serving/shadow.py says what is made of it).

It has a topic of versions, snapshots, a follower and a replica of its own, and the same users. It scores what was
shown, as of that moment, when no request has or awaits its turn. What does not fit is dropped and counted, and whatever
goes wrong with it ends the shadow, never the replica.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from online_model.features import FeatureSettings
from online_model.ranker import RankerSettings
from online_model.serving.api import Ranking, RankRequest, Recommendation, RecommendRequest
from online_model.serving.errors import NotReady
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.serving.replica import Replica, wall_clock_ms
from online_model.serving.shadow import Pages
from streams.events import Click
from streams.follower import Follower
from streams.impressions import impression_of
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")

WAITING = 200  # answers that wait for the shadow; more are dropped
LATE_MS = 1_000  # what has waited for so long is dropped: by now the shadow may have learned of it
IDLE_SECONDS = 0.002  # between two looks whether somebody has a turn


class Shadow:
    """`served` is for answers, `clicked` and `moved` for events, `run` a task."""

    def __init__(
        self, settings: ServeWorkerSettings, holder: Holder, live: LiveUsers, busy: Callable[[], bool]
    ) -> None:
        """`busy`: whether a request has or awaits its turn."""
        self._share, self._busy, self._serving = settings.shadow_share, busy, holder
        self._moment = 0  # as of which the shadow scores, ms; 0: now
        self._queue: deque[tuple[str, int, RankRequest]] = deque()
        self._more = asyncio.Event()
        self._pages, self._dice = Pages(), random.Random()
        self.broken = ""
        empty = Replica(settings.serve, FeatureSettings(), RankerSettings())
        self._holder = Holder(empty)  # with metrics that nobody reads
        folder = Path(settings.shadow_snapshots) if settings.shadow_snapshots else settings.data_dir / "shadow"
        self._follower = Follower(
            settings, self._holder, live, settings.shadow_topic, folder, lambda: self._moment or wall_clock_ms()
        )
        self._dropped = Counter(
            "headrace_shadow_dropped", "Answers that the shadow did not score", registry=holder.metrics.registry
        )
        holder.metrics.registry.register(_Gauges(self))

    def served(self, asked: RankRequest | RecommendRequest, answer: Ranking | Recommendation) -> None:
        """An answer goes out: a share of those of which something is shown is kept."""
        if self.broken or self._dice.random() >= self._share:
            return
        shown = impression_of(asked, answer)
        if shown is None:
            return
        request, items = str(shown.request_id), [str(item) for item in shown.items]
        probabilities = [item.click for item in answer.items[: len(items)]]
        if len(self._queue) >= WAITING or not self._pages.show(request, shown.ts, items, probabilities):
            self._dropped.inc()
            return
        again = RankRequest(asked.user, list(shown.items), asked.scenario, asked.context)
        self._queue.append((request, shown.ts, again))
        self._more.set()

    def clicked(self, click: Click) -> None:
        """A click was read."""
        if click.request_id is not None:
            self._pages.click(str(click.request_id), str(click.item))

    def moved(self, ts: int) -> None:
        """Event time, ms."""
        self._dropped.inc(self._pages.moves(ts))

    async def run(self) -> None:
        """Follow and score until cancelled, or until something is wrong with the shadow."""
        tasks = [asyncio.create_task(self._follower.run()), asyncio.create_task(self._score_all())]
        try:
            await asyncio.gather(*tasks)
        except Exception as error:  # noqa: BLE001 - whatever it is, the replica goes on without its shadow
            self.broken = f"{type(error).__name__}: {error}"
            log.error("the shadow has ended: %s", self.broken)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def figures(self) -> dict[str, Any]:
        """JSON-ready, for `GET /v1/model`."""
        now, replica, serving = wall_clock_ms(), self._holder.replica, self._serving.replica
        there = replica.sequence >= 0
        return {
            **self._pages.comparison.figures(),
            "version": f"{replica.epoch}.{replica.sequence}" if there else "",
            "age_ms": max(0, now - serving.created_ms) if serving.sequence >= 0 else None,
            "shadow_age_ms": max(0, now - replica.created_ms) if there else None,
            "waiting": len(self._pages),
            "broken": self.broken,
        }

    async def _score_all(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._queue:
                while self._busy():
                    await asyncio.sleep(IDLE_SECONDS)
                self._score(*self._queue.popleft())
                await asyncio.sleep(0)

    def _score(self, request: str, ts: int, asked: RankRequest) -> None:
        if wall_clock_ms() - ts > LATE_MS:
            return  # counted when its window is over
        self._moment = ts
        try:
            answer = self._holder.replica.rank(asked)
        except NotReady:
            return
        finally:
            self._moment = 0
        click = {str(item.item): item.click for item in answer.items}
        self._pages.score(request, [click[str(item)] for item in asked.candidates])


class _Gauges(Collector):
    """What is said of the shadow on /metrics."""

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def collect(self) -> list[Metric]:
        figures = self._shadow.figures()
        said = {
            "requests": ("Requests compared, of late", figures["requests"]),
            "log_loss_difference": ("Mean log loss of clicks, shadow - serving", figures["difference"]),
            "log_loss_difference_low": ("Lower end of its 95 % interval", figures["low"]),
            "log_loss_difference_high": ("Upper end of its 95 % interval", figures["high"]),
            "log_loss": ("Mean log loss of clicks of the shadow", figures["shadow_log_loss"]),
            "serving_log_loss": ("Mean log loss of the same clicks of the model served", figures["log_loss"]),
            "age_seconds": ("Since the shadow's version was made", _seconds(figures["shadow_age_ms"])),
            "serving_age_seconds": ("Since the version served was made", _seconds(figures["age_ms"])),
            "broken": ("1: the shadow has ended", float(bool(figures["broken"]))),
        }
        gauges = [(f"headrace_shadow_{name}", *about) for name, about in said.items()]
        return [GaugeMetricFamily(name, what, value) for name, what, value in gauges if value is not None]

    def describe(self) -> list[Metric]:
        return []


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
