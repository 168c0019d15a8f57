"""`headrace monitor`: a system that others run, on the live page and in the terminal.

What it knows comes from outside: versions and counts from a replica's `/v1/model`, the ends of the topics from Kafka,
freshness from probes of its own, processes from their `/metrics`. Each part is asked for itself and for as long as it
takes: one that is away is named among the `problems`, and nothing else waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry

from deploy.freshness_metrics import Probes
from deploy.replica_figures import Model, rate_of, sample
from deploy.scraping import Scraped
from deploy.watching import Board, Watched, freshness_of
from embedding_store.errors import BrokerError
from embedding_store.secret import Secret
from online_model.serving.client import authorization
from streams.kafka_clients import Bootstrap
from streams.topics import TopicSettings, end_offsets

SHOW_S = 1.0
LOOK_S = 2.0  # between two looks at Kafka's offsets and at the workers
OVER_S = 5.0  # rates are taken over this long: versions come several at a time


@dataclass(frozen=True)
class MonitorOptions:
    """What is watched. `live`: events carry the time of the wall clock, so probes may too; in a system that replays a
    log, time is the log's to tell, and a probe has one that moves nothing."""

    replica: str  # http://HOST:PORT
    bootstrap: Bootstrap
    topics: TopicSettings
    probe: bool = True
    live: bool = True
    scrape: tuple[str, ...] = ()
    token: Secret | None = None  # what the replica and those that are scraped ask for, if they do


class Monitor:
    """An async context: tasks that look, as long as it lasts; each second a sample to all boards."""

    def __init__(self, options: MonitorOptions, boards: Sequence[Board], registry: CollectorRegistry) -> None:
        """registry: for the metrics of the probes."""
        self.options, self.boards = options, boards
        self.last: dict[str, Any] = {}  # sample
        self._replica = Watched()
        self._probes = Probes(
            options.bootstrap, options.topics, options.replica, registry,
            moment=lambda: time.time_ns() // 1_000_000 if options.live else 0, token=options.token,
        )  # fmt: skip
        self._probes.probing = options.probe
        self.stages = self._probes.stages
        self._probes.answered.append(self._replica.answered)
        self._scraped = [Scraped(url) for url in options.scrape]
        self._ends: dict[int, int] = {}
        self._wrong: dict[str, str] = {}  # part → what is wrong with it
        self._began = time.monotonic()
        self._counted: list[tuple[float, int, int]] = []  # time, events, examples: of the last OVER_S

    async def __aenter__(self) -> Monitor:
        await self._probes.__aenter__()
        tasks = [*self._probes.tasks(), self._offsets(), self._scrape(), self._show()]
        self._tasks = [asyncio.create_task(task) for task in tasks]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._probes.__aexit__(*error)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. What fails for good fails here."""
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([stopping, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in done - {stopping}:
            task.result()

    def sample(self) -> dict[str, Any]:
        """What is known now; keys that nothing is known of are missing."""
        model, away = self._replica.model, self._replica.away_since
        counts = model.counts()
        events, trained = self._rates(counts.events_in, model.trained_rows)
        problems = list(self._wrong.values())
        if away is not None:
            since = datetime.fromtimestamp(away, UTC)
            problems.append(f"the replica at {self.options.replica} does not answer since {since:%H:%M:%S} UTC")
        problems += [f"{one.url}: {one.error}" for one in self._scraped if one.error]
        made = sample(
            model, freshness_of(self.stages),
            t=round(time.monotonic() - self._began, 1), events_per_s=events, trained_per_s=trained,
            problems=problems, processes=[one.report() for one in self._scraped], offsets=self._offsets_of(model),
            trainer_version=self._trainer_version(model), note=f"watching {self.options.replica}",
        )  # fmt: skip
        if not self.options.probe:
            made.pop("freshness_ms")
        return made

    def _rates(self, events: int, trained: int) -> tuple[float, float]:
        now, counted = time.monotonic(), self._counted
        counted.append((now, events, trained))
        while len(counted) > 2 and now - counted[1][0] >= OVER_S:
            counted.pop(0)
        at, before, trained_before = counted[0]
        return rate_of(events, before, now - at), rate_of(trained, trained_before, now - at)

    def _offsets_of(self, model: Model) -> list[dict[str, int]]:
        positions = model.positions
        return [
            {"partition": p, "end": end, "behind": max(0, end - positions.get(p, 0))}
            for p, end in sorted(self._ends.items())
        ]

    def _trainer_version(self, model: Model) -> str | None:
        """Of a train worker that is scraped; None: there is none."""
        for one in self._scraped:
            if not one.error and "headrace_train_sequence" in one.values:
                return f"{model.answer.get('epoch', 0)}.{one.values['headrace_train_sequence']:.0f}"
        return None

    # --- the tasks ---

    async def _offsets(self) -> None:
        """The ends of `events`. A connection for each look: one that was lost needs no mending."""
        while True:
            try:
                self._ends = await asyncio.to_thread(
                    end_offsets, self.options.bootstrap, self.options.topics.events
                )
                self._wrong.pop("kafka", None)
            except BrokerError as error:
                self._wrong["kafka"] = str(error)
            await asyncio.sleep(LOOK_S)

    async def _scrape(self) -> None:
        async with aiohttp.ClientSession(headers=authorization(self.options.token)) as session:
            while True:
                await asyncio.gather(*(one.scrape(session) for one in self._scraped))
                await asyncio.sleep(LOOK_S)

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(SHOW_S)
            self.last = self.sample()
            for board in self.boards:
                board.publish(self.last)
