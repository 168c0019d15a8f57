"""headrace demo: broker, workers, a replica, events, probes, and at the end the oracle's recount.

    start    broker (or the user's own), topics, catalogue; join, train and serve in processes of their own
    run      the closed loop (or a log) · probes · a sample each second for terminal and page · workers kept alive
    drain    everything sent has reached the replica; join, then train end; the replica holds the last version
    recount  the oracle reads `events` from its beginning and says what must have been trained
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from deploy import broker
from deploy.demo.live import Live, whole_seconds
from deploy.demo.traffic import ClosedLoop, LogPlay, now_ms
from deploy.demo.twin import TwinProcess, TwinSettings
from deploy.freshness_metrics import StageFreshness
from deploy.page import LivePage, Visited
from deploy.processes import alone, free_port, write_atomically
from deploy.recount import figures_of, recounted
from deploy.replica_figures import Model, balance
from deploy.settings import DemoOptions, Settings, dump
from deploy.summary import Summary
from deploy.watching import Board
from deploy.workers import Worker
from embedding_store.checkpoint import CheckpointStore
from embedding_store.errors import HeadraceError, UsageError
from online_model.features import table_specs
from online_model.serving.settings import HttpSettings
from replay.oracle import Verdict
from replay.readers import LogReader, open_log
from replay.sinks import KafkaSink
from streams.listener import serve_metrics
from streams.metrics import tell_process
from streams.topics import create_topics, delete_topics, end_offsets, wait_for_broker

FOREVER_S = 10 * 365 * 86_400.0
SUGGESTED = 5  # simulated users that the page offers to be
EVENTS_PER_REQUEST = 9.0  # of the simulator: items shown and what users do with them
PATIENT = {"join.wait_ms": 3_000, "join.watch_wait_ms": 5_000}  # the simulator's users click within 2 s


def run_demo(settings: Settings, options: DemoOptions) -> dict[str, Any]:
    """Run the demo and return the figures of `headrace demo --json`. Raises HeadraceError with one line.

    To be called from the main thread: the worker processes are tied to it.
    """
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what matters of it comes as an error, in one line
    if options.log is not None:
        _opened(settings, options)  # a wrong name or path is said before anything is started
    if settings.kafka.security_protocol != "PLAINTEXT" and not settings.bootstrap:
        raise UsageError("[kafka] is set, and the demo's own Kafka has neither TLS nor users: give --bootstrap")
    if settings.http != HttpSettings():  # its workers are asked on the loopback, without tokens
        raise UsageError("[http] is set, and the demo works without tokens and TLS, on the loopback: leave it out")
    if settings.bootstrap:
        wait_for_broker(settings.connection)
    home = settings.data_dir / "demo"
    with alone(home.parent / "demo.lock", "demo", "stop it (Ctrl-C)"), contextlib.ExitStack() as stack:
        if not options.keep and home.exists():
            _clear(home)
        home.mkdir(parents=True, exist_ok=True)
        workers = _workers(home)
        for worker in workers:
            stack.callback(worker.stop, 5.0)
        workers[0].load()  # what is slowest to load has one core to itself while Kafka starts on the other
        bootstrap = settings.bootstrap or stack.enter_context(broker.Broker.start(home)).bootstrap
        for worker in workers[1:]:
            worker.load()
        return _Demo(_fitted(settings, options, home, bootstrap), options, home, workers).run()


def _workers(home: Path) -> list[Worker]:
    """Join, train and serve; what is slowest to load comes first."""
    config = str(home / "headrace.toml")
    train, serve, join = (
        Worker(name, [name, "--config", config], home / f"{name}.log") for name in ("train", "serve", "join")
    )
    return [train, serve, join]


class _Demo:
    """One run, from topics to figures."""

    def __init__(self, settings: Settings, options: DemoOptions, home: Path, workers: list[Worker]) -> None:
        self.settings, self.options, self.home, self.workers = settings, options, home, workers
        self.trained_before = self._sequence()
        self._close_visits: Callable[[str], None] = lambda why: None

    def run(self) -> dict[str, Any]:
        settings = self.settings
        create_topics(
            settings.connection, settings.topics, purchase_window_ms=settings.join.join.purchase_window_ms,
            snapshot_interval_ms=int(settings.train.snapshot_interval_s * 1000),
            join_interval_ms=int(settings.join.snapshot_interval_s * 1000),
        )  # fmt: skip
        write_atomically(self.home / "headrace.toml", dump(settings))
        with contextlib.ExitStack() as stack:
            if settings.topics.prefix != "" and not self.options.keep:
                stack.callback(delete_topics, settings.connection, settings.topics)
            sink = stack.enter_context(KafkaSink(settings.connection, settings.topics.events, settings.topics.items))
            registry, boards = CollectorRegistry(), list[Board]()
            live = Live(settings, self.workers, boards, registry)
            if self.options.page:
                page = LivePage(self.options.port, visited=self._visited(live.probes.stages))
                stack.callback(page.stop)
                boards.append(page)
                self._close_visits = page.close_visits
            summary = stack.enter_context(Summary(page.start() if self.options.page else None))
            boards.append(summary)
            for worker in self.workers:
                worker.go()
            self._serve_metrics(registry, stack)
            summary.say(f"metrics: {self._targets} (targets for Prometheus' file_sd_configs)")
            return asyncio.run(self._live(live, sink))

    @property
    def _targets(self) -> Path:
        return self.home.parent / "targets.json"

    def _serve_metrics(self, registry: CollectorRegistry, stack: contextlib.ExitStack) -> None:
        """Those of this process at a free port, and a file that names all ports while they answer."""
        settings, port = self.settings, free_port()
        tell_process(registry, self.home)
        stack.callback(serve_metrics(registry, port))
        ports = {"join": settings.join.metrics_port, "train": settings.train.metrics_port,
                 "serve": settings.serve.port, "demo": port}  # fmt: skip
        targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": job}} for job, port in ports.items()]
        write_atomically(self._targets, json.dumps(targets, indent=1) + "\n")
        stack.callback(self._targets.unlink, missing_ok=True)

    async def _live(self, live: Live, sink: KafkaSink) -> dict[str, Any]:
        """Everything between the start of the workers and the figures."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: _interrupted(stop))
        gc.freeze()  # what measures must not stall over what is only loaded
        async with live:
            if self.options.log is None:
                seconds = await self._closed_loop(live, sink, stop)
            else:
                seconds = await self._log(live, sink, stop)
            played = time.monotonic()
            self._close_visits("the run is over: start another to be a user")
            ends = await asyncio.to_thread(end_offsets, self.settings.connection, self.settings.topics.events)
            live.note = "draining: what was sent is on its way to the replica"
            await live.drained(ends)
            if self.options.log is not None:
                seconds += time.monotonic() - played  # at full speed it is the system's pace that counts
            model = await self._wind_down(live)
            live.note = "recounting the log"
            # All records that the last version claims, and at least all that were sent by us: ticks may lie behind.
            until = {p: max(end, model.next_offsets.get(p, 0)) for p, end in ends.items()}
            verdict = await asyncio.to_thread(recounted, self.settings, model, until)
            result = self._figures(live, model, verdict, seconds)
            live.publish(lost=result["lost"], duplicated=result["duplicated"], note="done")
        return result

    async def _closed_loop(self, live: Live, sink: KafkaSink, stop: asyncio.Event) -> float:
        """Simulated users for `seconds`. Returns how long it was, in seconds."""
        users = ClosedLoop(self.settings.simulator, sink, live.url, self.settings.serve.serve.log_impressions)
        users.open(now_ms())  # the catalogue first: a replica has nothing to recommend before
        model = self.settings.model
        shared = TwinSettings(self.settings.simulator, self.settings.serve.serve, model.features, model.ranker)
        with TwinProcess(shared, self.home / "twin.log") as twin:  # it loads while the others make a first version
            await live.ready(stop)
            users.open(now_ms())
            twin.open(users.world.start_ms)
            live.traffic, live.twin = users, twin
            started = time.monotonic()
            ending = asyncio.get_running_loop().call_later(self.options.seconds or FOREVER_S, stop.set)
            await live.under_probes(users.run(stop))
            ending.cancel()
            seconds = time.monotonic() - started
            live.note = "waiting for the twin that does not learn"
            await twin.reached(whole_seconds(seconds))
        return seconds

    async def _log(self, live: Live, sink: KafkaSink, stop: asyncio.Event) -> float:
        """A log, to its end, or until Ctrl-C."""
        log = _opened(self.settings, self.options)
        play = LogPlay(log, sink, self.home, self.settings.join.join.closing_ms)
        await live.ready(stop, with_items=False)
        live.traffic = play
        started = time.monotonic()
        await live.under_probes(play.run(stop))
        return time.monotonic() - started

    async def _wind_down(self, live: Live) -> Model:
        """Join ends, so that the log grows no more; train ends with all that was joined; the replica has it."""
        train, serve, join = self.workers
        live.watching = False
        await asyncio.to_thread(join.stop)
        await asyncio.to_thread(train.stop)
        model = await live.reached(self._sequence())
        await asyncio.to_thread(serve.stop)
        return model

    def _visited(self, stages: StageFreshness) -> Visited | None:
        """The shop for those who look at the page; a log is of other times and takes nobody in."""
        if self.options.log is not None:
            return None
        settings = self.settings
        return Visited(
            f"http://127.0.0.1:{settings.serve.port}", settings.connection, settings.topics,
            settings.join.join.watch_wait_ms, tuple(f"u{n}" for n in range(min(SUGGESTED, settings.simulator.users))),
            stages.when,
        )  # fmt: skip

    def _sequence(self) -> int:
        """The trainer's last version, from its store; 0 before the first."""
        path = self.home / "train"
        if not path.exists():
            return 0
        store = CheckpointStore(path, {spec.name: spec.layout for spec in table_specs(self.settings.model.features)})
        try:
            head = store.head()
            return head.sequence if head else 0
        finally:
            store.close()

    def _figures(self, live: Live, model: Model, verdict: Verdict | None, seconds: float) -> dict[str, Any]:
        counts = model.counts()
        result = {
            "events_in": counts.events_in,
            "events_rejected": counts.rejected,
            "trained_examples": model.trained_rows,
            "left_out": model.left_out,
            **figures_of(verdict),
            "versions_published": self._sequence() - self.trained_before,
            "trainer_version": f"{model.answer['epoch']}.{self._sequence()}",
            "replica_version": model.version,
            "freshness_ms": live.freshness.figures(),
            "prequential": model.prequential(),
            **live.click_rates(seconds),
            "balance": balance(counts),
            "events_per_s": round(counts.events_in / seconds, 1) if seconds else 0.0,
            "seconds": round(seconds, 2),
            "first_trained_s": live.first_trained_s,
            "restarts": {worker.name: worker.restarts for worker in self.workers},
            "unanswered": dict(live.traffic.sent.unanswered) if live.traffic else {},
        }
        return result


def _fitted(settings: Settings, options: DemoOptions, home: Path, bootstrap: str) -> Settings:
    """The run's settings: its own folder, broker and ports; a joiner that fits the source."""
    flags: dict[str, Any] = {
        "data_dir": home, "bootstrap": bootstrap, "serve.port": free_port(),
        "join.metrics_port": settings.join.metrics_port or free_port(),
        "train.metrics_port": settings.train.metrics_port or free_port(),
    }  # fmt: skip
    if settings.bootstrap:  # somebody's cluster: topics of our own there
        flags["topics.prefix"] = f"headrace-demo-{home.resolve().name}-{now_ms()}."
    if options.log is None:
        default = Settings([]).join.join
        flags |= {f: v for f, v in PATIENT.items() if getattr(settings.join.join, f[5:]) == getattr(default, f[5:])}
        # Their events are of now, and what they are shown is logged: `headrace init` wrote these for a log.
        flags |= {"join.implicit": False, "join.ticks": "live", "simulator.seed": options.seed}
        if options.rate:
            flags["simulator.requests_per_s"] = options.rate / EVENTS_PER_REQUEST
    else:
        implicit = settings.join.join.implicit or not _opened(settings, options).has_impressions
        flags |= {"join.implicit": implicit, "join.ticks": "log"}
    if options.keep and (home / "headrace.toml").exists():
        flags |= _kept(home)
    return settings.with_flags(flags)


def _opened(settings: Settings, options: DemoOptions) -> LogReader:
    """The log to be played, as `Settings.log` has it where the command line names the format.

    Raises UsageError, LogError.
    """
    log = settings.with_flags({"log.format": options.log}).log
    return open_log(log.format, options.path or "", log.max_rejected_share, log.columns)


def _kept(home: Path) -> dict[str, Any]:
    """Where the run before left off: its topics."""
    before = tomllib.loads((home / "headrace.toml").read_text("utf-8"))
    return {"topics.prefix": before["topics"]["prefix"]}


def _clear(home: Path) -> None:
    broker.stop(home)  # one that was left behind
    try:
        shutil.rmtree(home)
    except OSError as error:
        raise HeadraceError(f"{home} cannot be cleared: {error.strerror}; give another place with --data-dir") from None


def _interrupted(stop: asyncio.Event) -> None:
    """The first Ctrl-C ends the run and drains it; the next one ends the process."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()
