"""What the demo and `headrace monitor` both look at: a replica's versions, as soon as it has them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from deploy.demo.figures import Model
from deploy.freshness import PROBE_S, Follower


class Board(Protocol):
    """Shows samples."""

    def publish(self, sample: dict[str, Any]) -> None: ...


class Watched:
    """A replica that is followed. An async context; `follow` is a task.

    `model`: its newest answer. `seen`: told each answer, with the time.monotonic() at which it came.
    """

    def __init__(self, url: str, seen: Callable[[Model, float], None] = lambda model, at: None) -> None:
        self.url, self.model = url, Model()
        self._seen, self._follower = seen, Follower(url)
        self._moved = asyncio.Event()  # set, and made anew, with each new version
        self._answered = time.time()
        self._away = False

    async def __aenter__(self) -> Watched:
        await self._follower.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._follower.__aexit__(*error)

    async def follow(self) -> None:
        """Long polls, until cancelled; where there is no answer, again a moment later."""
        while True:
            sequence = self.model.sequence
            answer = await self._follower.newer_than(sequence)
            self._away = answer is None
            if answer is None:
                await asyncio.sleep(PROBE_S)  # it is starting, or starting again
                continue
            at = time.monotonic()
            self.model, self._answered = Model(answer), time.time()
            self._seen(self.model, at)
            if self.model.sequence != sequence:
                self._moved.set()
                self._moved = asyncio.Event()

    async def moves(self) -> None:
        """Return with its next version."""
        await self._moved.wait()

    @property
    def away_since(self) -> float | None:
        """Since when it has not answered, seconds since 1970; None: it does."""
        return self._answered if self._away else None
