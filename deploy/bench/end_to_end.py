"""`headrace bench end_to_end`: the standard mix from Kafka to a replica on two cores, beside plain Faust and beside
what joiner and a bare TorchRec loop reach on the same cores.

Each part is sent a warm-up first, and waited for: what is loaded and compiled once is not in the figures. Then a
producer, a process of its own, has all events of the part in memory and sends them as fast as it goes, at last a tick
into each partition that closes all that is open. The clock runs from the first of them until

- headrace: the *replica* serves a version that is past all of them, ticks included. Join, train and serve worker as
  users get them (system.py). The oracle recounts the log: `lost`, `duplicated`;
- faust_per_event, faust_batches: the parameters that were learned from all of them are in Kafka (plain_faust.py, two
  processes). The trainer learns a page of items a step, or up to TAKE examples a step by `stream.take`;
- reference: no Kafka, each alone on one core: `joiner_us`, `Joiner.process` on the same records in memory, and
  `bare_us`, `PlainRanker.learn` (TorchRec and fbgemm as they come) on the rows that it gives, ready, in batches as
  large as the train worker's where it is behind; µs an event. `reference_per_s` is what both reach sharing the cores
  (alone.py, `together`).

The plain parts are given less to do than Headrace does: see plain_faust.py and plain_ranker.py.

By the clock is what is promised. `cpu_s` has the processor seconds of each process meanwhile, and `ratios_cpu` the
ratios by processor time, which say more where others use the machine too: events/s of a part are then
min(CORES / the sum, 1 / the most) of its processes' seconds an event, of Headrace and Faust alike; Kafka and the
producer are among them. `trainer_us` are µs an event by the clock of the trainer's thread, which takes longest: the
stages of its steps, commits, and the rest: blocks decoded, waiting for them and for the processor.

`events` counts an impression of PAGE items as PAGE. `handled` are those that the replica's version accounts for, the
warm-up's among them: `sent` of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.bench.common import BenchError, bare_topics, finish, median, on_cores, part_command, run_part
from deploy.bench.mix import timed_mix
from deploy.bench.system import System, processor_s, with_kafka
from deploy.freshness import PROBE_S, ReplicaWatch
from deploy.processes import ends_with_parent, listening, terminate
from deploy.replica_figures import Model

CORES, PAGE, PARTITIONS = 2, 10, 4
WARM_UP = 20_000  # events
WARM_UP_FAUST = 3_000
TAKE = 256  # examples a step
EVENTS_PER_S = 1_000  # of event time
DAY_MS = 86_400_000
STALL_S = 300.0  # nothing moves for so long: it hangs (torch alone takes a minute to load where others use the machine)
READY_BATCHES = 100  # of the bare loop, made ahead, then again from the first


def bench_end_to_end(
    bootstrap: str, events: int, faust_events: int, runs: int, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The figures of the command, medians of `runs`; ratios are medians of those of each run.

    faust_events: that plain Faust is sent. `step` is called after each of the 4 · runs parts.
    """
    found = []
    for _ in range(runs):
        run: dict[str, Any] = {}
        with on_cores(cores()):
            run["headrace"] = _headrace(bootstrap, events)
            step()
            for name, take in (("faust_per_event", 0), ("faust_batches", TAKE)):
                run[name] = _faust(bootstrap, faust_events, take)
                step()
            run["reference"] = run_part(__name__, "reference", events=events)
            step()
        found.append(run)
    middle = sorted(found, key=lambda run: run["headrace"]["per_s"])[(runs - 1) // 2]
    parts = {name: [run[name] for run in found] for name in middle}
    references = [_reference(run["reference"]) for run in found]

    def ratio(to: str, key: str) -> float:
        return statistics.median(run["headrace"][key] / run[to][key] for run in found)

    def to_reference(key: str) -> float:
        each = zip(parts["headrace"], references, strict=True)
        return statistics.median(ours[key] / reference[key] for ours, reference in each)

    ours = middle["headrace"]
    return {
        "events_per_s": median(parts["headrace"], "per_s"),
        "faust_per_event_per_s": median(parts["faust_per_event"], "per_s"),
        "faust_batches_per_s": median(parts["faust_batches"], "per_s"),
        "joiner_us": median(references, "joiner_us"),
        "bare_us": median(references, "bare_us"),
        "reference_per_s": median(references, "per_s"),
        "ratio_to_faust": ratio("faust_per_event", "per_s"),
        "ratio_to_faust_batches": ratio("faust_batches", "per_s"),
        "ratio_to_reference": to_reference("per_s"),
        "ratios_cpu": {
            "to_faust": ratio("faust_per_event", "per_cpu_s"),
            "to_faust_batches": ratio("faust_batches", "per_cpu_s"),
            "to_reference": to_reference("per_cpu_s"),
        },
        "cpu_s": {name: middle[name]["cpu_s"] for name in ("headrace", "faust_per_event", "faust_batches")},
        "seconds": {name: middle[name]["seconds"] for name in ("headrace", "faust_per_event", "faust_batches")},
        **{key: ours[key] for key in ("trainer_us", "events", "sent", "handled", "rows")},
        "lost": sum(run["headrace"]["lost"] for run in found),
        "duplicated": sum(run["headrace"]["duplicated"] for run in found),
        "faust_events": middle["faust_per_event"]["events"],
        "faust_rows": middle["faust_per_event"]["rows"],
        "median_of": runs,
    }  # fmt: skip


def cores() -> list[int]:
    """Those on which all of it is to be, a broker of our own too."""
    return sorted(os.sched_getaffinity(0))[:CORES]


def _reference(part: dict[str, Any]) -> dict[str, float]:
    """Of what `reference` measured."""
    from deploy.bench.alone import together

    (join, join_cpu), (train, train_cpu) = part["join_s"], part["train_s"]
    return {
        "joiner_us": 1e6 * join, "bare_us": 1e6 * train, "per_s": together(CORES, join, train),
        "per_cpu_s": together(CORES, join_cpu, train_cpu),
    }  # fmt: skip


# --- what both are sent -----------------------------------------------------------------------------------------------


@contextmanager
def _producing(folder: Path, bootstrap: str, topics: tuple[str, str], **mix: Any) -> Iterator[subprocess.Popen]:
    """A producer that has its events in memory: it sends them once it is told to."""
    with (folder / "sent.json").open("wb") as sent, subprocess.Popen(
        part_command(__name__, "produce", bootstrap=bootstrap, topics=topics, **mix),
        stdin=subprocess.PIPE, stdout=sent, preexec_fn=ends_with_parent(),
    ) as producer:  # fmt: skip
        try:
            while not (folder / "sent.json").stat().st_size:
                if producer.poll() is not None:
                    raise BenchError("the producer of the benchmark ended: see what it said above")
                time.sleep(PROBE_S)  # what is waited for is in another process
            yield producer
        finally:
            terminate(producer)


def _go(producer: subprocess.Popen) -> None:
    assert producer.stdin is not None
    producer.stdin.close()


def _sent(folder: Path, producer: subprocess.Popen) -> dict[str, Any]:
    """What the producer, which is about to end, says."""
    if producer.wait(STALL_S):
        raise BenchError("the producer of the benchmark failed: see what it said above")
    return json.loads((folder / "sent.json").read_text().splitlines()[-1])


def _produce(bootstrap: str, topics: tuple[str, str], events: int, end_ms: int, closing_ms: int, name: str) -> dict:
    """All of it at once; `name`: of the events' ids."""
    from replay.sinks import KafkaSink

    span_ms = events * 1000 // EVENTS_PER_S
    mix = list(timed_mix(events, PAGE, end_ms - span_ms, span_ms, name=name))
    count = sum(PAGE if b'"items":' in record else 1 for _, _, record in mix)
    with KafkaSink(bootstrap, *topics) as sink:
        finish({"ready": len(mix)})
        sys.stdin.read()
        began, began_cpu = time.monotonic(), time.process_time()
        for _, user, record in mix:
            sink.send_raw(record, user)
        sink.tick(end_ms + closing_ms)
        sink.flush()
    return {"began": began, "events": count, "cpu_s": time.process_time() - began_cpu}


def _phases(events: int, warm_up: int, closing_ms: int) -> list[dict[str, Any]]:
    """The mixes of warm-up and measured part: the first is of a day before. Their last ticks are not in the future."""
    now_ms = time.time_ns() // 1_000_000 - closing_ms
    return [
        {"events": count, "end_ms": end_ms, "closing_ms": closing_ms, "name": name}
        for count, end_ms, name in ((warm_up, now_ms - DAY_MS, "warm-"), (events, now_ms, ""))
    ]


def _figures(began: float, end: float, sent: dict[str, Any], used: dict[str, float]) -> dict[str, Any]:
    """Of a measured part. used: processor seconds of its processes, the producer's not among them."""
    used = used | {"producer": sent["cpu_s"]}
    count = sent["events"]
    return {
        "events": count, "seconds": end - began, "per_s": count / (end - began), "cpu_s": used,
        "per_cpu_s": count * min(CORES / sum(used.values()), 1 / max(used.values())),
    }  # fmt: skip


# --- Headrace ---------------------------------------------------------------------------------------------------------


def _headrace(bootstrap: str, events: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        system = System(bootstrap, Path(folder), **{"join.ticks": "log"})
        with system.running():
            return asyncio.run(_Run(system).measure(events))


class _Run:
    """What a replica is seen to serve while it is sent something."""

    def __init__(self, system: System) -> None:
        self._system, self._seen = system, list[tuple[float, Model]]()

    async def measure(self, events: int) -> dict[str, Any]:
        """Warm-up, then what counts; then the recount."""
        system, sent = self._system, 0
        async with ReplicaWatch(system.url) as replica:
            following = asyncio.create_task(self._follow(replica))
            try:
                await system.until(lambda: self._seen and listening(system.settings.train.metrics_port))
                for mix in _phases(events, WARM_UP, system.settings.join.join.closing_ms):
                    figures, model = await self._send(mix)
                    sent += figures["events"]
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        return figures | {"sent": sent} | await asyncio.to_thread(self._recounted, model)

    async def _send(self, mix: dict[str, Any]) -> tuple[dict[str, Any], Model]:
        """(figures, the first version past all of it)."""
        from streams.topics import end_offsets

        system, topics = self._system, self._system.settings.topics
        with _producing(system.folder, system.settings.bootstrap, (topics.events, topics.items), **mix) as producer:
            processes = system.processes()
            before, trained = processor_s(processes), system.trainer_s()
            del self._seen[:-1]
            _go(producer)
            await system.until(lambda: producer.poll() is not None, STALL_S)
            sent = _sent(system.folder, producer)
        ends = end_offsets(system.settings.bootstrap, topics.events)
        moved = time.monotonic()
        while (past := next((seen for seen in self._seen if _is_past(seen[1], ends)), None)) is None:
            system.all_up()
            if self._seen and self._seen[-1][0] > moved:
                moved = self._seen[-1][0]
            if time.monotonic() > moved + STALL_S:
                raise BenchError(f"the replica gets no further for {STALL_S:.0f} s: {self._seen[-1][1].positions}")
            await asyncio.sleep(PROBE_S)
        used = {name: after - before[name] for name, after in processor_s(processes).items()}
        figures = _figures(sent["began"], past[0], sent, used)
        spent = {stage: after - trained[stage] for stage, after in system.trainer_s().items()}
        spent["rest"] = figures["seconds"] - sum(spent.values())
        return figures | {"trainer_us": {k: 1e6 * s / sent["events"] for k, s in spent.items()}}, past[1]

    async def _follow(self, replica: ReplicaWatch) -> None:
        while True:
            answer = await replica.newer_than(self._seen[-1][1].sequence if self._seen else -1)
            if answer is None:
                await asyncio.sleep(PROBE_S)  # it is starting
            elif not self._seen or answer["sequence"] > self._seen[-1][1].sequence:
                self._seen.append((time.monotonic(), Model(answer)))

    def _recounted(self, model: Model) -> dict[str, Any]:
        from replay.oracle import Rules, compare, expect, read_topic

        settings = self._system.settings
        records = read_topic(settings.bootstrap, settings.topics.events, model.next_offsets)
        verdict = compare(expect(records, Rules.of(settings.join.join), model.set_aside), model.trained)
        return {
            "handled": model.counts().events_in, "rows": model.trained_rows, "lost": verdict.lost,
            "duplicated": verdict.duplicated,
        }  # fmt: skip


def _is_past(model: Model, ends: dict[int, int]) -> bool:
    return all(model.positions.get(partition, 0) >= end for partition, end in ends.items())


# --- plain Faust ------------------------------------------------------------------------------------------------------


def _faust(bootstrap: str, events: int, take: int) -> dict[str, Any]:
    """Two plain workers."""
    from streams.joiner import JoinSettings

    name, join = f"bench-{uuid.uuid4().hex[:8]}", JoinSettings()
    topics = {f"{name}-{part}": PARTITIONS for part in ("events", "examples")}
    topics |= {f"{name}-parameters": 1, f"{name}-items": 1}
    arguments = {
        "bootstrap": bootstrap, "partitions": PARTITIONS, "take": take, "wait_ms": join.wait_ms,
        **{part: f"{name}-{part}" for part in ("events", "examples", "parameters")},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder, bare_topics(bootstrap, topics):
        home = Path(folder)
        with _worker(home, "join", arguments) as joining, _worker(home, "train", arguments) as training:
            workers = {"join": joining, "train": training}
            processes = with_kafka(bootstrap, **{part: worker.pid for part, worker in workers.items()})
            figures: dict[str, Any] = {}
            with contextlib.closing(_Parameters(bootstrap, f"{name}-parameters", home, workers)) as done:
                for number, mix in enumerate(_phases(events, WARM_UP_FAUST, join.closing_ms), 1):
                    with _producing(home, bootstrap, (f"{name}-events", f"{name}-items"), **mix) as producer:
                        before = processor_s(processes)
                        _go(producer)
                        end, rows = done.wait(number)
                        used = {part: after - before[part] for part, after in processor_s(processes).items()}
                        sent = _sent(home, producer)
                    figures = _figures(sent["began"], end, sent, used) | {"rows": rows}
        return figures


@contextmanager
def _worker(home: Path, part: str, arguments: dict[str, Any]) -> Iterator[subprocess.Popen]:
    with (home / f"{part}.log").open("wb") as log, subprocess.Popen(
        part_command("deploy.bench.plain_faust", part, **arguments), stdout=log, stderr=log,
        preexec_fn=ends_with_parent(), env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    ) as worker:  # fmt: skip
        try:
            yield worker
        finally:
            terminate(worker, 5.0)


class _Parameters:
    """What plain Faust publishes."""

    def __init__(self, bootstrap: str, topic: str, home: Path, workers: dict[str, subprocess.Popen]) -> None:
        from kafka import KafkaConsumer, TopicPartition

        self._home, self._workers = home, workers
        self._consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
        place = TopicPartition(topic, 0)
        self._consumer.assign([place])
        self._consumer.seek_to_beginning(place)

    def close(self) -> None:
        self._consumer.close()

    def wait(self, ends: int) -> tuple[float, int]:
        """(when parameters were seen that are of so many ends of the log, time.monotonic(); rows learned by then)."""
        moved = time.monotonic()
        while True:
            for records in self._consumer.poll(timeout_ms=500).values():
                moved = time.monotonic()
                for key in (record.key for record in records if record.key):
                    done, rows = map(int, key.split())
                    if done >= ends:
                        return moved, rows
            for part, worker in self._workers.items():
                if worker.poll() is not None or time.monotonic() > moved + STALL_S:
                    said = (self._home / f"{part}.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
                    raise BenchError(f"plain Faust comes to no end; its {part} worker said last: {said[-1]}")


# --- the reference ----------------------------------------------------------------------------------------------------


def _reference_part(events: int) -> dict[str, Any]:
    """Joiner and bare loop on the measured part's records: seconds an event of each."""
    import torch

    from deploy.bench.alone import join_alone
    from replay.joining import partition_of
    from streams.events import Tick, encode
    from streams.joiner import JoinSettings

    torch.set_num_threads(1)
    settings, count = JoinSettings(), 0
    (mix,) = _phases(events, 0, settings.closing_ms)[1:]
    span_ms = events * 1000 // EVENTS_PER_S
    lanes: list[list[bytes]] = [[] for _ in range(PARTITIONS)]
    for _, user, record in timed_mix(events, PAGE, mix["end_ms"] - span_ms, span_ms):
        lanes[partition_of(user, PARTITIONS)].append(record)
        count += PAGE if b'"items":' in record else 1
    for lane in lanes:
        lane.append(encode(Tick(event_id="last", ts=mix["end_ms"] + settings.closing_ms)))
    blocks, join_s = join_alone(settings, lanes)
    rows = sum(len(block.examples) for block in blocks)
    train_s = _bare_row_s([block.examples for block in blocks])
    return {"join_s": [s / count for s in join_s], "train_s": [s * rows / count for s in train_s], "rows": rows}


def _bare_row_s(examples: list[Any]) -> list[float]:
    """Seconds a row (by the clock, of the processor) of the bare loop."""
    from deploy.bench.alone import Stopwatch, largest_batch
    from deploy.bench.plain_ranker import PlainRanker, batch_of
    from online_model.examples import Examples
    from online_model.settings import TrainerSettings

    model, rows = TrainerSettings(), Examples.concat(examples)
    rows = rows.take(rows.closed.argsort(kind="stable"))  # as from all partitions at once
    plain, size, ready = PlainRanker(model), largest_batch(model), []
    starts = range(0, len(rows) - size + 1, size)
    if not starts:
        raise BenchError(f"{len(rows)} rows are less than a batch: take more events")
    for start in starts[-READY_BATCHES:]:  # histories are full by then
        ready.append(plain.ready(*batch_of(rows.take(slice(start, start + size)))))
    for batch in ready[:20]:
        plain.learn(batch)
    watch = Stopwatch()
    for _ in range(max(1, READY_BATCHES // len(ready))):
        with watch.running():
            for batch in ready:
                plain.learn(batch)
    learned = max(1, READY_BATCHES // len(ready)) * len(ready) * size
    return list(watch.seconds / learned)


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"produce": _produce, "reference": _reference_part}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
