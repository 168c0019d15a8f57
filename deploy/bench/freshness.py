"""`headrace bench freshness`: from an event to the replica that has learned of it, everything real, on two cores.

Kafka, a join, a train and a serve worker, and a producer in a process of its own that sends the standard mix (an
impression of k items counts k) at `rate`, each event when its time has come. The settings are those that everybody
starts from, but for the guard: clicks of the mix are drawn, no model is better than none there, and a guard that knows
its trade holds versions back.

Probes are events into each partition every 50 ms, held for L as all are (refunds of what nobody bought, which change
nothing; ticks are not held where no event is, as at a low rate). A probe has returned when `/v1/model` of the replica,
which is long polled, shows a position of its partition past it. A warm-up is over before any of them counts.

The stages of a probe are told apart afterwards, by what the topics and the replica's answers hold (all of one machine's
clock, so that nothing is in the way while it is measured):

    hold     L, for which events wait for others that are late
    join     the rest of the time until the joiner sends the block that is past the probe (Kafka's stamp on it): the way
             into Kafka and to the joiner, its pause between commits, the join, the commit
    learn    until the trainer begins the commit of the version that is past it (`created_ms`): the way of the block,
             the trainer's patience, steps, the pause between commits
    commit   until it sends the version (Kafka's stamp on the last part)
    publish  until the replica begins to apply it: the transaction, the way to the replica
    apply    the replica's own measurement, p50: a stage of all probes alike
    answer   from `applied_ms` until the answer was here

`stages` are medians, and so add up to something near the median alone; `shares` are of the mean, and add up to 1.

`cores`: what each process used of them, by its processor time: where the sum comes near to 2, or others use the machine
too, nothing else needs to be explained.

`histogram_ms`, where it is asked for: what `headrace monitor` would show of the same time, with probes of its own, as
p50 and p99 of the histogram that it serves to Prometheus.

`rate` is what was sent; `handled_per_s` what the replica was seen to move past meanwhile. Where that is less,
`keeps_up` is false: the system falls behind, and freshness is then a matter of for how long. Of several runs, windows
of one load, the figures are of that with the median p99; `all` has the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest

from deploy.bench.common import BenchError, finish, on_cores, part_command
from deploy.bench.mix import timed_mix
from deploy.bench.system import System, processor_s
from deploy.freshness import PROBE_S, Freshness, Probe, Prober, ReplicaWatch, quantiles, refund
from deploy.freshness_metrics import SERVABLE, Probes
from deploy.processes import ends_with_parent, terminate
from deploy.prometheus import histogram, quantile
from deploy.replica_figures import Model
from deploy.settings import Settings

CORES = 2
PAGE = 10  # items of an impression
WARM_UP_S = 15.0
BEHIND_S = 10.0  # for probes that are still under way at the end
KEEPS_UP = 0.97  # of what is sent
STAGES = ("hold", "join", "learn", "commit", "publish", "apply", "answer")
STEP_S = 0.005  # of the producer
APPLY_SECONDS = "headrace_replica_apply_seconds"


class Seen(NamedTuple):
    """An answer of the replica; times in s."""

    at: float  # time.monotonic()
    sequence: int
    applied: float  # wall clock
    handled: int  # events that its version has the effect of, probes among them


@dataclass
class Window:
    """A run: what began and ended when (time.monotonic()), the histograms of the replica's applies and of freshness
    meanwhile, and the cores that each process used."""

    begin: float
    end: float = 0.0
    applies: dict[float, float] = field(default_factory=dict)
    histogram: dict[float, float] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)


def bench_freshness(
    bootstrap: str, rate: float, seconds: float, runs: int, warm_up: float = WARM_UP_S,
    step: Callable[[], None] = lambda: None, histogram: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The figures of the command. `step` is called after the warm-up and after each run. histogram: with
    `histogram_ms`."""
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder, on_cores(cores):
        system = _System(bootstrap, Path(folder), histogram)
        with system.running():
            return asyncio.run(system.measure(rate, seconds, runs, warm_up, step))


class _System(System):
    """What is sent to it, and what is seen of it."""

    def __init__(self, bootstrap: str, folder: Path, histogram: bool) -> None:
        super().__init__(bootstrap, folder)
        self._freshness, self._seen, self._model = Freshness(), list[Seen](), Model()
        self._registry = CollectorRegistry() if histogram else None

    async def measure(
        self, rate: float, seconds: float, runs: int, warm_up: float, step: Callable[[], None]
    ) -> dict[str, Any]:
        """Load, probes and windows; then the stages."""
        settings, topics = self.settings, self.settings.topics
        async with contextlib.AsyncExitStack() as stack:
            replica = await stack.enter_async_context(ReplicaWatch(self.url))
            prober = await stack.enter_async_context(
                Prober(self._freshness.sent, settings.bootstrap, topics.events, topics.partitions, refund)
            )
            tasks = [asyncio.create_task(self._follow(replica))]
            if self._registry is not None:
                probes = Probes(settings.bootstrap, topics, self.url, self._registry, refund)
                tasks += map(asyncio.create_task, (await stack.enter_async_context(probes)).tasks())
            tasks.append(asyncio.create_task(self._probe(prober)))
            try:
                await self.until(lambda: self._freshness.returned)  # all three workers do their part
                gc.freeze()  # what measures must not stall over what is only loaded
                with self._producer(rate, warm_up + runs * seconds + BEHIND_S) as producer:
                    await self._sending(producer)
                    await self._watch(warm_up, producer)
                    step()
                    windows = []
                    for _ in range(runs):
                        windows.append(await self._window(seconds, producer))
                        step()
                    tasks.pop().cancel()
                    await self._returned()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        sent = [json.loads(line) for line in (self.folder / "sent.jsonl").read_text().splitlines()]
        journeys = await asyncio.to_thread(_Journeys, settings, self._seen)
        found = [self._figures(window, sent, journeys) for window in windows]
        median = sorted(found, key=lambda run: run["p99_ms"])[(len(found) - 1) // 2]
        keys = ("rate", "probes", "p50_ms", "p95_ms", "p99_ms", "handled_per_s")
        return {**median, "asked_rate": rate, "median_of": runs, "all": [{k: run[k] for k in keys} for run in found]}

    async def _follow(self, replica: ReplicaWatch) -> None:
        while True:
            answer = await replica.newer_than(self._model.sequence)
            if answer is None:
                await asyncio.sleep(PROBE_S)  # it is starting
                continue
            at, self._model = time.monotonic(), Model(answer)
            self._freshness.served(self._model.positions, at)
            counts = self._model.counts()
            self._seen.append(Seen(at, self._model.sequence, answer["applied_ms"] / 1e3, counts.events_in))

    async def _probe(self, prober: Prober) -> None:
        due = time.monotonic()
        while True:
            await prober.send(time.time_ns() // 1_000_000)
            due = max(due + PROBE_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    @contextlib.contextmanager
    def _producer(self, rate: float, seconds: float) -> Iterator[subprocess.Popen]:
        topics = self.settings.topics
        with (self.folder / "sent.jsonl").open("wb") as sent, subprocess.Popen(
            part_command(__name__, "produce", bootstrap=self.settings.bootstrap, events=topics.events,
                         items=topics.items, rate=rate, seconds=seconds),
            stdout=sent, preexec_fn=ends_with_parent(),
        ) as producer:  # fmt: skip
            try:
                yield producer
            finally:
                terminate(producer)

    async def _sending(self, producer: subprocess.Popen) -> None:
        """It has loaded, which takes seconds on a busy machine, and sent something."""
        while not (self.folder / "sent.jsonl").stat().st_size and producer.poll() is None:
            self.all_up()
            await asyncio.sleep(PROBE_S)  # what is waited for is in another process

    async def _watch(self, seconds: float, producer: subprocess.Popen) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.all_up()
            if producer.poll() is not None:
                raise BenchError("the producer of the benchmark ended on the way: see what it said above")
            await asyncio.sleep(min(left, 0.5))

    async def _window(self, seconds: float, producer: subprocess.Popen) -> Window:
        applied, used = await asyncio.to_thread(self._applies), self._processor_s(producer)
        window, fresh = Window(time.monotonic()), self._histogram()
        await self._watch(seconds, producer)
        window.end = time.monotonic()
        window.histogram = {bound: n - fresh.get(bound, 0.0) for bound, n in self._histogram().items()}
        now, passed = self._processor_s(producer), window.end - window.begin
        window.cores = {name: (now[name] - used[name]) / passed for name in now}
        after = await asyncio.to_thread(self._applies)
        window.applies = {bound: n - applied.get(bound, 0.0) for bound, n in after.items()}
        return window

    def _processor_s(self, producer: subprocess.Popen) -> dict[str, float]:
        """Processor time so far of all that takes part, s; Kafka's only where it can be seen."""
        return processor_s(self.processes(producer=producer.pid, probes=os.getpid()))

    async def _returned(self) -> None:
        """The probes under way have come back, or will not while it is of interest."""
        end = time.monotonic() + BEHIND_S
        while self._freshness.unreturned() and time.monotonic() < end:
            await asyncio.sleep(PROBE_S)

    def _applies(self) -> dict[float, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:  # noqa: S310  # nosec B310 - our own
            return histogram(answer.read().decode(), APPLY_SECONDS)[1]

    def _histogram(self) -> dict[float, float]:
        """Of freshness, as a Prometheus would read it now."""
        if self._registry is None:
            return {}
        text = generate_latest(self._registry).decode()
        return histogram(text, "headrace_freshness_seconds", stage=SERVABLE)[1]

    def _figures(self, window: Window, sent: list[list[float]], journeys: _Journeys) -> dict[str, Any]:
        probes = [probe for probe in self._freshness.returned if window.begin <= probe.sent < window.end]
        now = time.monotonic()  # one that is not back took longer than until now
        waiting = self._freshness.waiting
        late = [Probe(p, offset, at, now) for p, queue in waiting.items() for offset, at in queue if at < window.end]
        took = quantiles([*probes, *late])
        rate = _per_s([(at, count) for at, count in sent], window)
        probing = (len(probes) + window.histogram.get(math.inf, 0.0)) / (window.end - window.begin)  # events too
        handled = _per_s([(seen.at, seen.handled) for seen in self._seen], window) - probing
        hold_ms, apply_ms = self.settings.join.join.disorder_ms, 1e3 * quantile(0.5, window.applies)
        stages = [journeys.stages(probe, hold_ms, apply_ms) for probe in probes]
        columns = {name: [stage[name] for stage in stages] for name in STAGES} if stages else {}
        total = sum(map(sum, columns.values()))
        shown = {name: 1e3 * quantile(share, window.histogram) for name, share in (("p50", 0.5), ("p99", 0.99))}
        return {
            "rate": rate,
            "probes": took["count"],
            **{f"{name}_ms": took[name] for name in ("p50", "p95", "p99")},
            "stages": {name: statistics.median(column) for name, column in columns.items()},
            "shares": {name: sum(column) / total for name, column in columns.items()},
            "stages_p99": {name: statistics.quantiles(c, n=100)[98] for name, c in columns.items() if len(c) > 1},
            "cores": window.cores,
            "handled_per_s": handled,
            "keeps_up": handled >= KEEPS_UP * rate,
            "unreturned": len(late),
            **({"histogram_ms": shown} if window.histogram else {}),
        }


def _per_s(counted: list[tuple[float, float]], window: Window) -> float:
    """By how much a count that was looked at now and then grew a second, from the first to the last look in it."""
    inside = [(at, count) for at, count in counted if window.begin <= at <= window.end]
    if len(inside) < 2 or inside[-1][0] == inside[0][0]:
        return 0.0
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


class _Journeys:
    """Where and when each probe was, from the topics as they lie there afterwards."""

    def __init__(self, settings: Settings, seen: list[Seen]) -> None:
        from embedding_store.delta import Assembler
        from replay.oracle import read_topic
        from streams.blocks import decode_block

        topics = settings.topics
        self._wall = time.time() - time.monotonic()  # s, of the machine's clock, beside the monotonic one
        self._blocks: dict[int, list[tuple[int, float]]] = {}  # partition → (all below is handled, s sent), ascending
        for partition, _, value, stamped in read_topic(settings.bootstrap, topics.examples):
            handled = decode_block(value or b"").handled
            self._blocks.setdefault(partition, []).append((handled, (stamped or 0) / 1e3))
        self._versions: dict[int, list[tuple[int, float, float, int]]] = {}  # (position, s created, s sent, sequence)
        assembler = Assembler()
        for _, _, value, stamped in read_topic(settings.bootstrap, topics.parameters):
            version = assembler.add(value or b"")
            if version is None:
                continue
            for partition, position in version.positions.items():
                made = position, version.created_ms / 1e3, (stamped or 0) / 1e3, version.sequence
                self._versions.setdefault(partition, []).append(made)
        self._seen = seen

    def stages(self, probe: Probe, hold_ms: float, apply_ms: float) -> dict[str, float]:
        """Ms of each stage of a probe that has returned."""
        sent, returned = probe.sent + self._wall, probe.seen + self._wall
        _, joined = _first_past(self._blocks[probe.partition], probe.offset)
        _, created, published, sequence = _first_past(self._versions[probe.partition], probe.offset)
        applied = self._seen[bisect_left(self._seen, sequence, key=lambda seen: seen.sequence)].applied
        held = min(hold_ms, (joined - sent) * 1e3)
        ms = {"hold": held, "join": (joined - sent) * 1e3 - held, "learn": (created - joined) * 1e3,
              "commit": (published - created) * 1e3, "publish": (applied - published) * 1e3 - apply_ms,
              "apply": apply_ms, "answer": (returned - applied) * 1e3}  # fmt: skip
        return ms


def _first_past(known: list[Any], offset: int) -> Any:
    """The first of these, ascending by their first number, that is past an offset."""
    return known[bisect_left(known, offset + 1, key=lambda entry: entry[0])]


def _produce(bootstrap: str, events: str, items: str, rate: float, seconds: float) -> dict[str, Any]:
    """The standard mix, each event when its time has come; a line of (time.monotonic(), events so far) a second."""
    from replay.sinks import KafkaSink

    start = time.time()
    offset, sent, said = start - time.monotonic(), 0, 0.0
    mix = timed_mix(round(rate * seconds), PAGE, round(start * 1e3), round(seconds * 1e3))
    with KafkaSink(bootstrap, events, items) as sink:
        gc.freeze()
        for ts, user, record in mix:
            due = ts / 1e3 - offset
            while (left := due - time.monotonic()) > 0:
                time.sleep(max(left, STEP_S))
            sink.send_raw(record, user)
            sent += PAGE if b'"items":' in record else 1
            if time.monotonic() > said + 1:
                said = time.monotonic()
                sys.stdout.write(f"[{said}, {sent}]\n")
                sys.stdout.flush()
    return {"sent": sent}


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"produce": _produce}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
