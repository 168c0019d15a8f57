"""What goes wrong in a running demo: each a context, in which it is wrong, and after which it is right again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiohttp
import psutil
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from deploy.freshness import refund
from deploy.torture.cluster import further_ranks
from deploy.torture.disk import Disk
from replay.sinks import KafkaSink
from streams.events import Click, Event, Impression, encode
from streams.topics import end_offsets
from tests.end_to_end.demos import Demo

PER_S = 200  # of what is sent into `events`
NEW_PER_S = 50  # each a user and an item that stay in the tables
FLOOD_PER_S, PAGE = 9_000, list(range(900))
SLOWED_S = (1.5, 0.5)  # a slow trainer: it stands still and moves in turn
MISSED = 20  # records of `parameters` that a replica has not read when they are deleted
CLIENTS = 128  # twice as many as may wait ([serve.limits] waiting)
AGAIN_S = 0.1  # after a refusal
NEARLY_FULL, FULL, FILLED_PER_S = 24 << 30, 4 << 30, 2 << 30  # bytes of space: from, to, so fast
RATES = re.compile(r"^(learning_rate|wide_rate) = .*$", re.MULTILINE)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """It does not move."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def stopped_worker(demo: Demo, name: str) -> Iterator[None]:
    """A worker does not move."""
    with stopped(demo.until(lambda: demo.worker(name))):
        yield


@contextmanager
def stopped_rank(demo: Demo) -> Iterator[None]:
    """The second rank of the train worker does not move; the first one waits for it."""
    worker = demo.until(lambda: demo.worker("train"))
    with stopped(demo.until(lambda: next(iter(further_ranks(worker.pid)), None))):
        yield


@contextmanager
def stopped_demo(demo: Demo) -> Iterator[None]:
    """The process that sends probes, and users' events, does not move; its workers do."""
    with stopped(psutil.Process(demo.process.pid)):
        yield


@contextmanager
def slowed(demo: Demo, name: str) -> Iterator[None]:
    """A worker moves for a part of the time only."""
    process = demo.until(lambda: demo.worker(name))

    def slow(ended: threading.Event) -> None:
        while not ended.is_set():
            with stopped(process):
                ended.wait(SLOWED_S[0])
            ended.wait(SLOWED_S[1])

    with _meanwhile(slow):
        yield


@contextmanager
def killed(demo: Demo, name: str) -> Iterator[None]:
    """A worker dies; the demo starts another, which takes some seconds."""
    demo.kill(name)
    yield


# --- Kafka ----------------------------------------------------------------------------------------------------------


@contextmanager
def lost_versions(demo: Demo) -> Iterator[None]:
    """A replica stood still until Kafka had deleted the versions that it was to read."""
    versions = TopicPartition(_topic(demo, "parameters"), 0)
    with stopped_worker(demo, "serve"), _admin(demo) as admin:
        end = _end(demo, versions)
        demo.until(lambda: _end(demo, versions) > end + MISSED)
        admin.delete_records({versions: -1})  # all that there are
    yield


@contextmanager
def flooded(demo: Demo) -> Iterator[None]:
    """A source sends one large page again and again, much faster than it can be joined. That it is the same page costs
    the joiner nearly as much as another would, and teaches the trainer nothing."""
    settings, run = demo.settings, time.time_ns()
    now, number = run // 1_000_000, b"0" * 12
    page = Impression(event_id=f"flood-{run}-{number.decode()}", ts=now, user="flood", request_id=f"flood-{run}",
                      items=PAGE)  # fmt: skip
    before, after = encode(page).split(number)
    events, items = (settings["topics"]["prefix"] + name for name in ("events", "items"))

    def send(ended: threading.Event) -> None:
        numbers = itertools.count()
        with KafkaSink(settings["bootstrap"], events, items) as sink:
            while not ended.wait(0.1):
                for n in itertools.islice(numbers, FLOOD_PER_S // 10):
                    sink.send_raw(before + b"%012d" % n + after, "flood")

    with _meanwhile(send):
        yield


@contextmanager
def clock_stands_still(demo: Demo) -> Iterator[None]:
    """All that comes is of a source whose clock has stopped."""
    run, stopped_at = time.time_ns(), time.time_ns() // 1_000_000
    with stopped_demo(demo), sent(demo, lambda n, now: [encode(refund(f"stopped-{run}-{n}", stopped_at))]):
        yield


@contextmanager
def sent(demo: Demo, records: Callable[[int, int], list[bytes]], per_s: int = PER_S) -> Iterator[None]:
    """Into `events`, `per_s` times a second: what `records` makes of a number and the time (ms UTC)."""
    settings, topic = demo.settings, _topic(demo, "events")
    partitions = settings["topics"]["partitions"]
    producer = KafkaProducer(bootstrap_servers=settings["bootstrap"])

    def send(ended: threading.Event) -> None:
        n = 0
        while not ended.wait(0.1):
            for _ in range(per_s // 10):
                for value in records(n, time.time_ns() // 1_000_000):
                    producer.send(topic, value, partition=n % partitions)
                n += 1

    try:
        with _meanwhile(send):
            yield
    finally:
        producer.close()


def clicked(n: int, now: int) -> list[bytes]:
    """What one of a crowd is shown, and the click on it."""
    return _click(f"crowd-{n % 400}", n % 50, f"crowd-{now}-{n}", now)


def clicked_new(n: int, now: int) -> list[bytes]:
    """The same of somebody new, on an item that is new too: no statistics tell of them."""
    return _click(f"new-{now}-{n}", f"new-{now}-{n}", f"new-{now}-{n}", now)


def _click(user: str, item: str | int, name: str, now: int) -> list[bytes]:
    events: list[Event] = [
        Impression(event_id=f"{name}-shown", ts=now, user=user, request_id=name, items=[item]),
        Click(event_id=f"{name}-click", ts=now, user=user, request_id=name, item=item),
    ]
    return [encode(event) for event in events]


@contextmanager
def _admin(demo: Demo) -> Iterator[KafkaAdminClient]:
    admin = KafkaAdminClient(bootstrap_servers=demo.settings["bootstrap"])
    try:
        yield admin
    finally:
        admin.close()


def _end(demo: Demo, place: TopicPartition) -> int:
    """The offset that the next record gets."""
    return end_offsets(demo.settings["bootstrap"], place.topic)[place.partition]


def _topic(demo: Demo, name: str) -> str:
    return demo.settings["topics"]["prefix"] + name


# --- model, disk, requests ------------------------------------------------------------------------------------------


@contextmanager
def not_learning(demo: Demo) -> Iterator[None]:
    """Somebody sets learning rates that are far too small, and starts the train worker anew; later the right ones."""
    file = demo.data_dir / "demo" / "headrace.toml"
    right = file.read_text("utf-8")
    file.write_text(RATES.sub(r"\1 = 1e-12", right), "utf-8")
    demo.kill("train")
    try:
        yield
    finally:
        file.write_text(right, "utf-8")
        demo.kill("train")


@contextmanager
def snapshots_away(demo: Demo) -> Iterator[None]:
    """Where snapshots are written is gone, as a network drive that is not mounted: what is left leads nowhere."""
    folder = demo.data_dir / "demo" / "snapshots"
    kept = folder.with_name("snapshots.away")
    demo.until(folder.exists)
    folder.rename(kept)
    folder.symlink_to(folder.with_name("not-mounted") / "snapshots")
    try:
        yield
    finally:
        folder.unlink()
        kept.rename(folder)


@contextmanager
def filling(disk: Disk) -> Iterator[None]:
    """The disk becomes full, but for some GiB."""

    def fill(ended: threading.Event) -> None:
        for space in range(NEARLY_FULL, FULL - 1, -FILLED_PER_S):
            disk.leave(space)
            if ended.wait(1):
                return

    try:
        with _meanwhile(fill):
            yield
    finally:
        disk.free()


@contextmanager
def overloaded(demo: Demo) -> Iterator[None]:
    """More clients than may wait ask the replica to rank, each again as soon as it has its answer."""
    url = f"http://127.0.0.1:{demo.settings['serve']['port']}/v1/rank"
    asked = {"user": "overload", "candidates": list(range(200))}

    async def ask(session: aiohttp.ClientSession, ended: threading.Event) -> None:
        while not ended.is_set():
            async with session.post(url, json=asked) as answer:
                await answer.read()
            if answer.status != 200:
                await asyncio.sleep(AGAIN_S)

    async def ask_all(ended: threading.Event) -> None:
        connector = aiohttp.TCPConnector(limit=CLIENTS)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(ask(session, ended) for _ in range(CLIENTS)))

    with _meanwhile(lambda ended: asyncio.run(ask_all(ended))):
        yield


@contextmanager
def at_once(*causes: contextlib.AbstractContextManager) -> Iterator[None]:
    """All of them, begun in this order."""
    with contextlib.ExitStack() as stack:
        for cause in causes:
            stack.enter_context(cause)
        yield


@contextmanager
def _meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread, until the event that it is given; what it raises is raised here."""
    ended, failed = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            work(ended)
        except Exception as error:  # noqa: BLE001 - it is raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]
