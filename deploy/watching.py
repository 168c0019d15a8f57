"""What the demo and `headrace monitor` both keep of a replica that is followed, and how they show it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from deploy.freshness import POLL_MS
from deploy.freshness_metrics import SERVABLE, StageFreshness
from deploy.replica_figures import Model

SILENT_S = 2.0  # longer than a long poll: then a replica is away


class Board(Protocol):
    """Shows samples."""

    def publish(self, sample: dict[str, Any]) -> None: ...


class Watched:
    """A replica's newest answer, `model`, and those who wait for its next version."""

    def __init__(self) -> None:
        self.model = Model()
        self._moved = asyncio.Event()  # set, and made anew, with each new version
        self._answered = time.time()

    def answered(self, answer: dict[str, Any], at: float) -> None:
        """The replica has said what it serves; `at`: time.monotonic()."""
        sequence, self.model = self.model.sequence, Model(answer)
        self._answered = time.time() - time.monotonic() + at
        if self.model.sequence != sequence:
            self._moved.set()
            self._moved = asyncio.Event()

    async def moves(self) -> None:
        """Return with its next version."""
        await self._moved.wait()

    @property
    def away_since(self) -> float | None:
        """Since when it has not answered, seconds since 1970; None: it does."""
        return self._answered if time.time() - self._answered > POLL_MS / 1e3 + SILENT_S else None


def freshness_of(stages: StageFreshness) -> dict[str, Any]:
    """Of a sample: p50, p95, p99 in ms and the count of probes that are served; `stages`: the median of each, ms."""
    figures = stages.figures()
    return figures[SERVABLE] | {"stages": {name: figure["p50"] for name, figure in figures.items()}}
