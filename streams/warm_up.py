"""Before a replica says that it is ready it answers requests of late: the first user to come pays for nothing.

The last impressions of `events` are the requests: who asked for what, and what was shown. They are read from there at
each start, so nothing is kept for it, and who was forgotten is in no file. Without any, made-up users ask.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import get_args

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from online_model.serving.api import Context, RankRequest, RecommendRequest, Scenario
from online_model.serving.errors import NotReady
from online_model.serving.holder import Holder
from streams.events import Impression, decode_many
from streams.kafka_clients import Bootstrap, client_arguments
from streams.live_events import first_version
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")

TAIL = 1_000  # records at the end of each partition in which impressions are looked for
READ_SECONDS = 5.0  # for as long
PAUSE_SECONDS = 0.002  # between two, for versions, and for those who do not ask whether it is ready


class WarmUp:
    """Answers `[serve] warm_up` requests, once there is a model; until then `holder.cold` says so."""

    def __init__(self, settings: ServeWorkerSettings, holder: Holder, caught_up: asyncio.Event) -> None:
        self._settings, self._holder, self._caught_up = settings, holder, caught_up
        holder.parts["warm_up"] = lambda: {"cold": bool(holder.cold)}
        if settings.serve.warm_up:
            holder.cold = "warming up: requests of late are being answered"

    async def run(self) -> None:
        """Ends when it is warm."""
        wanted = self._settings.serve.warm_up
        if not wanted:
            return
        await first_version(self._holder, self._caught_up)
        requests = await self._recent(wanted)
        start, first_ms, answered = time.perf_counter(), 0.0, 0
        for asked in requests or made_up(wanted):
            answered += self._answer(asked)
            first_ms = first_ms or (time.perf_counter() - start) * 1e3
            await asyncio.sleep(PAUSE_SECONDS)
        self._holder.cold = ""
        log.info(
            "warm after %s requests (%s) in %.0f ms, the first of them took %.0f ms",
            answered, "of late" if requests else "made up", (time.perf_counter() - start) * 1e3, first_ms,
        )  # fmt: skip

    def _answer(self, asked: RankRequest | RecommendRequest) -> bool:
        """Nobody is told, nothing is logged or counted. False: there is nothing to recommend."""
        replica = self._holder.replica
        try:
            if isinstance(asked, RankRequest):
                replica.rank(asked)
            else:
                replica.recommend(asked)
        except NotReady:
            return False
        return True

    async def _recent(self, wanted: int) -> list[RankRequest | RecommendRequest]:
        """At most so many requests of late, the last of them first."""
        found: list[Impression] = []
        try:
            async with asyncio.timeout(READ_SECONDS):
                found = await last_impressions(self._settings.connection, self._settings.topics.events)
        except (KafkaError, TimeoutError) as error:
            log.warning("warming up without requests of late: %s is not read (%r)", self._settings.topics.events, error)
        return [asked for shown in found[: (wanted + 1) // 2] for asked in requests_of(shown)][:wanted]


def requests_of(shown: Impression) -> list[RankRequest | RecommendRequest]:
    """Two that could have led to this impression."""
    query = (shown.context or {}).get("query")
    context = Context(query[:1_000] if isinstance(query, str) else "")
    return [
        RankRequest(shown.user, list(shown.items), shown.scenario, context),
        RecommendRequest(shown.user, shown.scenario, context, min(len(shown.items), 100), log=False),
    ]


def made_up(wanted: int) -> Sequence[RankRequest | RecommendRequest]:
    """Of users whom nobody knows."""
    scenarios: tuple[Scenario, ...] = get_args(Scenario)
    return [RecommendRequest(f"warm-up {n}", scenarios[n % len(scenarios)], log=False) for n in range(wanted)]


async def last_impressions(bootstrap: Bootstrap, topic: str) -> list[Impression]:
    """Those among the last TAIL records of each partition, the newest first. Raises KafkaError."""
    consumer = AIOKafkaConsumer(
        topic, **client_arguments(bootstrap), enable_auto_commit=False, auto_offset_reset="earliest"
    )
    values: list[bytes | None] = []
    try:
        await consumer.start()
        partitions = sorted(consumer.assignment())
        ends = await consumer.end_offsets(partitions)
        for place, begin in (await consumer.beginning_offsets(partitions)).items():
            consumer.seek(place, max(begin, ends[place] - TAIL))
        while any([await consumer.position(place) < ends[place] for place in partitions]):
            for records in (await consumer.getmany(timeout_ms=200, max_records=TAIL)).values():
                values += [record.value for record in records]
    finally:
        await consumer.stop()
    impressions = [event for event in decode_many(values) if isinstance(event, Impression)]
    return sorted(impressions, key=lambda shown: -shown.ts)
