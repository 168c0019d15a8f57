"""The demo while it runs: what the replica says, probes, workers kept alive, a sample each second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import psutil
from prometheus_client import CollectorRegistry

from deploy.demo.clicks import CLICKS_COME_S, WINDOW_S
from deploy.demo.traffic import ClosedLoop, LogPlay, now_ms
from deploy.demo.twin import TwinProcess
from deploy.freshness import PROBE_S, Freshness
from deploy.freshness_metrics import Probes
from deploy.replica_figures import Model, rate_of, sample
from deploy.settings import Settings
from deploy.watching import Board, Watched, freshness_of
from deploy.workers import Worker
from embedding_store.errors import HeadraceError
from replay.player_metrics import tell_player

T = TypeVar("T")

READY_S = 90.0
STALL_S = 60.0  # a drain that gets nowhere for so long has failed


class Live:
    """An async context: tasks that watch the run from its start to its end. The first error of any ends it."""

    def __init__(
        self, settings: Settings, workers: Sequence[Worker], boards: Sequence[Board], registry: CollectorRegistry
    ) -> None:
        """registry: for the metrics of probes and of what is sent."""
        self.settings, self.workers, self.boards = settings, workers, boards
        self.url = f"http://127.0.0.1:{settings.serve.port}"
        self.freshness = Freshness(keep=0)
        topics = settings.topics
        self._replica = Watched()
        self.probes = Probes(settings.connection, topics, self.url, registry, moment=self._moment)
        self.probes.probing = False  # but while events flow: freshness is a figure under load
        self.probes.sent.append(self.freshness.sent)
        self.probes.answered.append(self._answered)
        tell_player(registry, lambda: self.traffic.sent.kinds if self.traffic else {},
                    lambda: self.traffic.behind_s if self.traffic else 0.0)  # fmt: skip
        self.traffic: ClosedLoop | LogPlay | None = None
        self.twin: TwinProcess | None = None
        self.note = "starting"
        self.watching = True  # over the workers
        self.first_trained_s: float | None = None  # since this process was started
        self._began = time.monotonic()
        self._before = (self._began, 0.0, 0.0)

    async def __aenter__(self) -> Live:
        await self.probes.__aenter__()
        self._tasks = [asyncio.create_task(task) for task in (*self.probes.tasks(), self._watch(), self._show())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.probes.__aexit__()

    @property
    def model(self) -> Model:
        """The replica's newest answer."""
        return self._replica.model

    async def under_probes(self, traffic: Coroutine[Any, Any, T]) -> T:
        """`traffic`, with probes as long as it lasts."""
        self.probes.probing = True
        try:
            return await self.alongside(traffic)
        finally:
            self.probes.probing = False

    async def alongside(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`, unless one of the tasks here fails first: then its error."""
        doing = asyncio.create_task(work)
        done, _ = await asyncio.wait([doing, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        if doing not in done:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
            for task in done:
                task.result()
        return await doing

    async def ready(self, stop: asyncio.Event, with_items: bool = True) -> None:
        """The replica answers, and, if it must, knows items and is warm. KeyboardInterrupt if `stop` is set before."""

        def there() -> bool:
            if stop.is_set():
                raise KeyboardInterrupt  # nothing has happened that needed draining
            answer = self.model.answer
            if not answer or not with_items:  # it is cold until it has a version, and a log brings the first one
                return bool(answer)
            return bool(answer["rows"].get("card")) and not answer["info"]["warm_up"]["cold"]

        self.note = "starting the workers"
        await self._until(there, READY_S, "the replica does not answer")
        self.note = ""

    async def drained(self, ends: dict[int, int]) -> None:
        """The replica is past these offsets of `events`."""

        def behind() -> int:
            return sum(max(0, end - self.model.positions.get(p, 0)) for p, end in ends.items())

        await self._until(lambda: not behind(), STALL_S, "what was sent does not reach the replica", behind)

    async def reached(self, sequence: int) -> Model:
        """The replica has this version."""
        complaint = f"the replica does not get version {sequence}"
        await self._until(lambda: self.model.sequence >= sequence, STALL_S, complaint)
        return self.model

    def publish(self, **more: Any) -> None:
        """A sample to all boards."""
        now, sent = time.monotonic(), float(self.traffic.sent.events if self.traffic else 0)
        trained = float(self.model.trained_rows)
        at, sent_before, trained_before = self._before
        second = self.seconds
        values = {
            "t": round(now - self._began, 1),
            "events_per_s": rate_of(sent, sent_before, now - at),
            "trained_per_s": rate_of(trained, trained_before, now - at),
            "processes": [worker.report() for worker in self.workers],
            "note": self.note,
            "recount": "at the end",
            **({"ctr": self._clicks.recent(second)} if self._clicks else {}),
            **({"ctr_frozen": self.twin.recent(second)} if self.twin else {}),
            **more,
        }
        self._before = (now, sent, trained)
        for board in self.boards:
            board.publish(sample(self.model, freshness_of(self.probes.stages), **values))

    @property
    def seconds(self) -> int:
        """Whole seconds since the shop opened."""
        return (now_ms() - self.traffic.world.start_ms) // 1000 if isinstance(self.traffic, ClosedLoop) else 0

    def click_rates(self, seconds: float) -> dict[str, float | None]:
        """The rates of the first and the last window of a run of so many seconds."""
        if self._clicks is None or self.twin is None:
            return dict.fromkeys(("ctr_first_window", "ctr_last_window", "ctr_frozen_last_window"))
        end = whole_seconds(seconds)
        window = (max(0, end - WINDOW_S), end)
        return {
            "ctr_first_window": self._clicks.rate(0, WINDOW_S),
            "ctr_last_window": self._clicks.rate(*window),
            "ctr_frozen_last_window": self.twin.clicks.rate(*window),
        }

    @property
    def _clicks(self) -> Any:
        return self.traffic.clicks if isinstance(self.traffic, ClosedLoop) else None

    async def _until(
        self,
        condition: Callable[[], bool],
        patience_s: float,
        complaint: str,
        measure: Callable[[], int] = lambda: 0,
    ) -> None:
        """Wait for `condition`, looked at with each new version; HeadraceError where `measure` stays for too long."""

        async def wait() -> None:
            since, was = time.monotonic(), measure()
            while not condition():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._replica.moves()
                if (now := measure()) != was:
                    since, was = time.monotonic(), now
                elif time.monotonic() - since > patience_s:
                    logs = self.workers[0].log.parent
                    raise HeadraceError(f"{complaint} within {patience_s:.0f} s: see the logs in {logs}")

        await self.alongside(wait())

    def _answered(self, answer: dict[str, Any], at: float) -> None:
        """The replica has said what it serves."""
        self._replica.answered(answer, at)
        self.freshness.served(self.model.positions, at)
        if self.first_trained_s is None and self.model.trained_rows:
            self.first_trained_s = round(time.time() - psutil.Process().create_time(), 2)

    def _moment(self) -> int:
        """The time of a probe. In a log time is the player's to tell: a probe there has one that moves nothing."""
        return now_ms() if isinstance(self.traffic, ClosedLoop) else 0

    # --- the tasks ---

    async def _watch(self) -> None:
        """Workers that were killed are started again."""
        while True:
            await asyncio.sleep(PROBE_S)
            for worker in self.workers if self.watching else ():
                if (said := worker.revive()) is not None:
                    self.note = said

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.publish()


def whole_seconds(seconds: float) -> int:
    """The seconds of a run whose clicks have all come."""
    return max(0, int(seconds) - CLICKS_COME_S)
