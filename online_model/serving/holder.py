"""The replica that serves now, and those who wait for its next version.

Everything here runs on one event loop's thread: a request scores in one synchronous call, a version is applied in
another, so no reader ever sees half of either. A snapshot may be loaded into a fresh replica on another thread; `swap`
puts it in place by one assignment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from embedding_store.delta import Version
from online_model.serving.api import (
    ModelInfo,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    SimilarItems,
    SimilarQuery,
)
from online_model.serving.live import Action, Coverage
from online_model.serving.metrics import Measured, Metrics
from online_model.serving.policy import PolicyInForce


class Serving(Measured, Protocol):
    """What the HTTP app and the metrics ask of a replica."""

    policy: PolicyInForce
    coverage: Coverage

    def apply(self, version: Version) -> bool: ...
    def rank(self, request: RankRequest, deadline: float | None = None) -> Ranking: ...
    def recommend(self, request: RecommendRequest, deadline: float | None = None) -> Recommendation: ...
    def similar(self, item: str | int, query: SimilarQuery) -> SimilarItems: ...
    def info(self) -> ModelInfo: ...
    def holds(self, user: int, action: Action) -> bool | None: ...


class Holder:
    """The current replica. `behind`: why it is known to be behind, "" if it is not; the worker says so. `policy`: that
    of the first one, and from then on of all. `served`: who is told each request that was answered, with its answer.
    `parts`: name → what else is said in `GET /v1/model`. `cold`: why it would answer slowly, "" if it would not.
    `let_by`: awaited between two pieces of work on the loop, so that requests come in between."""

    def __init__(self, replica: Serving) -> None:
        self.replica, self.policy = replica, replica.policy
        self.metrics = Metrics()
        self.metrics.watch(lambda: self.replica)
        self.behind = self.cold = ""
        self.served: list[Callable[[RankRequest | RecommendRequest, Ranking | Recommendation], None]] = []
        self.parts: dict[str, Callable[[], dict[str, Any]]] = {}
        self.let_by: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
        self._closing = False
        self._changed = asyncio.Event()

    def apply(self, version: Version) -> bool:
        """`Replica.apply`, measured; wakes who waits for it. False: it was there already."""
        start = time.perf_counter()
        applied = self.replica.apply(version)
        if applied:
            self.behind = ""  # it goes on from the one before, so nothing is missing
            self.metrics.applied(time.perf_counter() - start)
            self._announce()
        return applied

    def swap(self, replica: Serving) -> None:
        """Serve from another replica (one that has loaded a snapshot) from the next request on."""
        replica.policy = self.policy
        self.replica = replica
        self.behind = ""
        self.metrics.swapped()
        self._announce()

    def answered(self, asked: RankRequest | RecommendRequest, answer: Ranking | Recommendation) -> None:
        """This answer goes out."""
        for told in self.served:
            told(asked, answer)

    def info(self) -> ModelInfo:
        """The replica's, with what `parts` say under their names."""
        info = self.replica.info()
        return replace(info, info=info.info | {name: part() for name, part in self.parts.items()})

    def close(self) -> None:
        """Nobody waits any more: to be called before the server stops, which would sit out the long polls."""
        self._closing = True
        self._announce()

    async def newer_than(self, sequence: int, wait_s: float) -> None:
        """Return when the sequence is larger than `sequence`, when the epoch changes, or after `wait_s` seconds."""
        epoch, loop = self.replica.epoch, asyncio.get_running_loop()
        end = loop.time() + wait_s
        while not self._closing and self.replica.sequence <= sequence and self.replica.epoch == epoch:
            try:
                async with asyncio.timeout_at(end):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
