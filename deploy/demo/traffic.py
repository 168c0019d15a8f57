"""What the demo feeds its system with: simulated users who answer what the replica recommends, or a log."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import orjson

from deploy.demo.clicks import ClickRate
from replay.player import Played, Player, PlaySettings, WallClock
from replay.readers import LogReader, in_time_order
from replay.simulator import Marketplace, Request, SimulatorSettings
from replay.sinks import KafkaSink
from streams.events import Click, Event, Item, units

STEP_S = 0.02
IN_FLIGHT = 64  # requests to the replica at a time; users beyond that go away
ANSWER_S = 2.0  # so long a user waits
FORGET_MS = 60_000  # well past CLICKS_COME_S


def now_ms() -> int:
    """The time, ms UTC."""
    return time.time_ns() // 1_000_000


@dataclass
class Sent:
    """What went into the topics so far; `events` counts an impression of k items as k."""

    kinds: defaultdict[type, int] = field(default_factory=lambda: defaultdict(int))
    unanswered: Counter[str] = field(default_factory=Counter)  # requests that the replica did not answer, by reason

    @property
    def events(self) -> int:
        return sum(self.kinds.values())

    def add(self, event: Event) -> None:
        """It is sent."""
        self.kinds[type(event)] += units(event)

    def refuse(self, why: object) -> None:
        """A user went away without an answer."""
        self.unanswered[str(why) or type(why).__name__] += 1


class ClosedLoop:
    """Users of a marketplace, each page of theirs filled by the replica at `url`. One asyncio task: `run`. `logged`:
    the replica sends the impressions (`[serve] log_impressions`); otherwise they are sent here."""

    def __init__(self, settings: SimulatorSettings, sink: KafkaSink, url: str, logged: bool = True) -> None:
        self.world, self.sink, self.clicks, self.sent = Marketplace(settings), sink, ClickRate(), Sent()
        self._url, self._logged = f"{url}/v1/recommend", logged
        self._shown: dict[str, tuple[int, int]] = {}  # request → when (ms UTC), the second of the run it counts for
        self._flying: set[asyncio.Task] = set()
        self._stepped: float | None = None  # when the last step began, time.monotonic(); None: it does not run

    def open(self, at_ms: int) -> None:
        """The shop opens at `at_ms`: its catalogue goes out."""
        self.world.start(at_ms)
        self._send(self.world.catalogue())
        self.sink.flush()

    async def run(self, stop: asyncio.Event) -> None:
        """Live in step with the wall clock until `stop` is set; then wait for the answers under way."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_S)) as session:
            while not stop.is_set():
                self._stepped = time.monotonic()
                step = self.world.advance(now_ms())
                for event in step.events:
                    if isinstance(event, Click):
                        self.clicks.add(self._shown[str(event.request_id)][1], clicked=1)
                    self.sent.add(event)
                self._forget()
                self._send([*step.items, *step.events])
                for request in step.requests:
                    if len(self._flying) < IN_FLIGHT:
                        task = asyncio.create_task(self._visit(session, request))
                        self._flying.add(task)
                        task.add_done_callback(self._flying.discard)
                    else:
                        self.sent.refuse("too many at a time")
                await asyncio.sleep(STEP_S)
            self._stepped = None
            await asyncio.gather(*self._flying)
        await asyncio.to_thread(self.sink.flush)

    @property
    def behind_s(self) -> float:
        """How late the next step is. For any thread."""
        stepped = self._stepped
        return 0.0 if stepped is None else max(0.0, time.monotonic() - stepped - STEP_S)

    async def _visit(self, session: aiohttp.ClientSession, request: Request) -> None:
        """One page: ask, show; what they do with it comes in later steps."""
        asked = {"user": request.user, "scenario": request.scenario, "k": request.k,
                 "context": {"query": request.query or ""}}  # fmt: skip
        try:
            async with session.post(self._url, data=orjson.dumps(asked)) as response:
                answer = orjson.loads(await response.read())
                if response.status != 200:
                    raise aiohttp.ClientError(answer["detail"])
        except (aiohttp.ClientError, TimeoutError) as error:
            self.sent.refuse(error)  # perhaps the replica is being started again: this user saw nothing
            return
        items, request = answer["items"], replace(request, request_id=answer["request_id"])
        impression = self.world.show(
            request, [shown["item"] for shown in items], ts=answer["moment_ms"],
            propensities=[shown["propensity"] for shown in items],
            model_version=answer["model_version"], feature_hash=answer["feature_hash"],
        )  # fmt: skip
        second = (request.ts - self.world.start_ms) // 1000
        self._shown[request.request_id] = (impression.ts, second)
        self.clicks.add(second, shown=len(items))
        self.sent.add(impression)
        if not self._logged:
            self._send([impression])

    def _forget(self) -> None:
        """What nobody clicks any more: all clicks up to now are counted."""
        while self._shown:
            request, (ts, _) = next(iter(self._shown.items()))
            if ts >= self.world.now_ms - FORGET_MS:
                break
            del self._shown[request]

    def _send(self, records: Iterable[Event | Item]) -> None:
        for record in records:
            self.sink.send(record)


class _Stopped(Exception):
    """Ctrl-C, before a log came to its first event."""


class LogPlay:
    """A historical log, played at full speed. One asyncio task: `run`. `directory`: for what is sorted on disk;
    `closing_ms`: of the joiner."""

    def __init__(self, log: LogReader, sink: KafkaSink, directory: Path, closing_ms: int) -> None:
        self.log, self._directory = log, directory
        self.player = Player(sink, PlaySettings(closing_ms=closing_ms), WallClock(), None)

    @property
    def sent(self) -> Sent:
        return Sent(self.player.played.kinds)

    @property
    def behind_s(self) -> float:
        """As `Player.behind_s`."""
        return self.player.behind_s

    async def run(self, stop: asyncio.Event) -> Played:
        """Play it to its end, or until `stop`; a tick past the last event closes what is open.

        Raises LogError, BrokerError.
        """

        def look() -> None:
            if stop.is_set():
                raise _Stopped

        ordered = in_time_order(self.log, directory=self._directory, progress=look)
        records = itertools.takewhile(lambda _: not stop.is_set(), ordered)
        try:
            return await asyncio.to_thread(self.player.play, records)
        except _Stopped:  # while it was sorted: nothing has been sent
            return self.player.played
