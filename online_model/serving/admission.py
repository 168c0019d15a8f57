"""Who is scored next: one request at a time, few that wait, none that waits long.

Scoring is synchronous on the event loop, so a turn is what keeps the loop's other work (sockets, versions) between two
requests. What comes faster than it can be answered waits in a queue that is bounded in length (429) and in time (503):
an answer that comes is then never later than `give_up_ms` and its own scoring, however many ask.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from online_model.serving.problems import TOO_MANY_WAITING, WAITED_TOO_LONG, GoneAway, Refused
from online_model.serving.settings import Limits


class Turns:
    """Hands out turns, first come, first served. On one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._taken = False
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    @asynccontextmanager
    async def turn(self, gone: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Wait for a turn and keep it for the block. `gone`: returns when the client has gone away.

        Before the block the loop looks at its sockets once: versions come in between, and wait for one request only.
        Raises Refused (429, 503), GoneAway: then there is no turn to give back.
        """
        if self._taken:
            await self._wait(gone)
        self._taken = True
        try:
            await asyncio.sleep(0)
            yield
        finally:
            self._pass_on()

    async def _wait(self, gone: Callable[[], Awaitable[None]]) -> None:
        if len(self._queue) >= self._limits.waiting:
            raise Refused(TOO_MANY_WAITING, f"{len(self._queue)} requests wait for their turn already")
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(mine)
        leaving, granted = asyncio.ensure_future(gone()), False
        try:
            seconds = self._limits.give_up_ms / 1000
            await asyncio.wait((mine, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise GoneAway
            if not mine.done():
                raise Refused(WAITED_TOO_LONG, f"no turn within {self._limits.give_up_ms:,} ms")
            granted = True
        finally:
            leaving.cancel()
            if not granted:
                self._give_up(mine)

    def _give_up(self, mine: asyncio.Future[None]) -> None:
        """Leave the queue, or pass on the turn that has just come."""
        if mine.done():
            self._pass_on()
        else:
            self._queue.remove(mine)

    def _pass_on(self) -> None:
        """The turn goes from hand to hand: it is free only if nobody waits, so that nobody comes in between."""
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._taken = False
