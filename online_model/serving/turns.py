"""Who is scored next: one request at a time, few that wait, none that waits long.

Scoring is synchronous on the event loop, so a turn is what keeps the loop's other work (sockets, versions) between two
requests. What comes faster than it can be answered waits in a queue that is bounded in length (429) and in time (503):
an answer that comes is then never later than `give_up_ms` and its own scoring, however many ask.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from online_model.serving.problems import TOO_MANY_WAITING, WAITED_TOO_LONG, GoneAway, Refused
from online_model.serving.settings import Limits

# A round of the loop that had nothing to do takes 1 to 3 µs (an AMD EPYC core), one that accepts a connection over 20.
IDLE_ROUND_S = 10e-6
MOST_ROUNDS = 64


class Turns:
    """Hands out turns, first come, first served. On one event loop."""

    def __init__(self, limits: Callable[[], Limits]) -> None:
        self._limits = limits  # those in force
        self._taken = False
        self._queue: deque[asyncio.Future[None]] = deque()
        self._passed = asyncio.Event()  # is set, and replaced, when a turn is over

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether somebody has a turn."""
        return self._taken

    @asynccontextmanager
    async def turn(self, gone: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Wait for a turn and keep it for the block. `gone`: returns when the client has gone away.

        Before the block the loop does what else there is: versions come in between, and each piece of the work that
        they are waits for one request only (`let_by`).
        Raises Refused (429, 503), GoneAway: then there is no turn to give back.
        """
        if self._taken:
            await self._wait(gone)
        self._taken = True
        try:
            await _others_first()
            yield
        finally:
            self._pass_on()

    async def let_by(self) -> None:
        """For work in pieces, between two of them: the request that has come by now is scored first, if any."""
        passed = self._passed
        await _others_first(passed.is_set)  # what has arrived is read; nobody waits for more than one
        if self._taken and not passed.is_set():
            await passed.wait()

    async def _wait(self, gone: Callable[[], Awaitable[None]]) -> None:
        if len(self._queue) >= self._limits().waiting:
            raise Refused(TOO_MANY_WAITING, f"{len(self._queue)} requests wait for their turn already")
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(mine)
        leaving, granted = asyncio.ensure_future(gone()), False
        try:
            give_up_ms = self._limits().give_up_ms
            await asyncio.wait((mine, leaving), timeout=give_up_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise GoneAway
            if not mine.done():
                raise Refused(WAITED_TOO_LONG, f"no turn within {give_up_ms:,} ms")
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
        self._passed.set()
        self._passed = asyncio.Event()
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._taken = False


async def _others_first(enough: Callable[[], bool] = lambda: False) -> None:
    """Let the loop go round until it has nothing else to do, or it is enough, within limits.

    One round would not do: uvloop accepts one connection in a round, and a request takes three until it is in the
    queue. Those that were not accepted yet would wait unseen, for as long as it takes, instead of being refused.
    """
    for _ in range(MOST_ROUNDS):
        start = time.perf_counter()
        await asyncio.sleep(0)
        if time.perf_counter() - start < IDLE_ROUND_S or enough():
            return
