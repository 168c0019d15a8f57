"""The processes of `headrace bench serve`: a made model, its versions, the bare forward, the load, a bare sleeper."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import psutil

from deploy.bench.common import finish, part_command
from deploy.processes import ends_with_parent
from embedding_store.columns import WEIGHTS, TableRows
from embedding_store.delta import Version, encode
from embedding_store.ids import feature_id
from online_model.features import CARD, CATEGORY, ITEM, SELLER, TITLE_WORDS, USER, WORD, table_specs
from online_model.history import HISTORY, HISTORY_BYTES, HISTORY_DTYPE, RECENT
from online_model.neighbours import KEPT
from online_model.settings import TrainerSettings

CANDIDATES = 500  # of a request
CATEGORIES, SELLERS, WORDS = 200, 2_000, 5_000
VERSIONS_PER_S, DENSE_S = 5, 1.0  # as the trainer makes them while it keeps up
TOUCHED = {USER: 1_000, ITEM: 1_000, CATEGORY: 100, SELLER: 300, WORD: 500}  # rows of a version
EPOCH = 1
TIMEOUT_S = 10.0  # a request that takes longer is an error
RSS_EVERY_S = 10.0
FORWARD_REQUESTS, FORWARD_TIMES = 20, 30
_DAY_MS = 86_400_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Model:
    """A made model of the default settings: all of its ids and, by a seed, rows of them that look like learned ones."""

    def __init__(self, items: int, users: int) -> None:
        raw: dict[str, Sequence[str | int]] = {
            USER: [f"u{i}" for i in range(users)], ITEM: range(items), CATEGORY: range(CATEGORIES),
            SELLER: range(SELLERS), WORD: [f"w{i}" for i in range(WORDS)],
        }  # fmt: skip
        self.ids = {table: np.array([feature_id(table, r) for r in some], np.int64) for table, some in raw.items()}
        self.settings = TrainerSettings()
        self._layouts = {spec.name: (spec.settings.dim, spec.extras) for spec in table_specs(self.settings.features)}
        self._dice = np.random.default_rng(1)
        about = np.random.default_rng(2)  # what the catalogue says: the same in every version
        self._category = self.ids[CATEGORY][about.integers(CATEGORIES, size=items)]
        self._seller = self.ids[SELLER][about.integers(SELLERS, size=items)]
        self._words = self.ids[WORD][about.integers(WORDS, size=(items, TITLE_WORDS))]

    def snapshot(self) -> Version:
        """Everything, as version EPOCH.1."""
        every = {table: np.arange(len(ids)) for table, ids in self.ids.items()}
        cards = {int(i): orjson.dumps({"kind": "item", "item": n}) for n, i in enumerate(self.ids[ITEM])}
        return self._version(1, None, every, dense=True, blobs={CARD: cards})

    def delta(self, sequence: int, dense: bool) -> Version:
        """The next version: TOUCHED rows of each table, drawn."""
        some = {table: self._dice.permutation(len(self.ids[table]))[:n] for table, n in TOUCHED.items()}
        return self._version(sequence, (EPOCH, sequence - 1), some, dense)

    def _version(
        self, sequence: int, base: tuple[int, int] | None, places: dict[str, np.ndarray], dense: bool, **more: Any
    ) -> Version:
        from online_model.feedback import strategy
        from online_model.ranker import Ranker

        ranker = self.settings.ranker
        info: dict[str, Any] = {"settings": msgspec.to_builtins(self.settings), "event_time_ms": now_ms()}
        weights: dict[str, np.ndarray] = {}
        if dense:
            extra = strategy(self.settings.feedback, entire=ranker.entire_space).extra
            made = Ranker(self.settings.features.dim, ranker, len(extra)).weights()
            weights = {n: w + self._dice.normal(0, 0.01, w.shape).astype(np.float32) for n, w in made.items()}
            weights["rated"] = np.array([[3_000, 300], [3_000, 900]], np.float32)
        tables = {table: self._rows(table, at) for table, at in places.items()}
        return Version(EPOCH, sequence, base, now_ms(), {0: sequence}, info, weights, tables, **more)

    def _rows(self, table: str, at: np.ndarray) -> TableRows:
        """Rows of the ids in these places, with everything that scoring reads."""
        (dim, extras), n, dice = self._layouts[table], len(at), self._dice
        columns = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in extras.items()}
        columns[WEIGHTS] = dice.normal(0, 0.2, (n, dim)).astype(np.float32)
        if "impressions" in columns:
            columns["impressions"] = dice.integers(1, 1_000, n)
            columns["clicks"] = columns["impressions"] // 10
        if table == USER:
            columns["history"] = self._histories(n)
        if table == ITEM:
            columns |= {
                "category": self._category[at], "seller": self._seller[at], "words": self._words[at],
                "created": now_ms() - dice.integers(0, 90 * _DAY_MS, n), "heat_ms": np.full(n, now_ms()),
                "heat": dice.random((n, 2)).astype(np.float32),
                "neighbours": self.ids[ITEM][dice.integers(len(self.ids[ITEM]), size=(n, KEPT))],
                "nearness": np.sort(dice.random((n, KEPT)))[:, ::-1].astype(extras["nearness"][0]),
                "taken": (30 * dice.random(n)).astype(extras["taken"][0]),
            }  # fmt: skip
        return TableRows(self.ids[table][at], columns)

    def _histories(self, n: int) -> np.ndarray:
        """States uint8 [n, HISTORY_BYTES] of users with full histories, the last action a minute ago."""
        states = np.zeros((n, HISTORY_BYTES), np.uint8)
        state, newest = states.view(HISTORY_DTYPE)[:, 0], now_ms() // 1000 - 60
        state["newest"] = newest
        for name, size, kind in (("recent", RECENT, 1), ("intent", HISTORY - RECENT, 3)):
            state[name]["item"] = self.ids[ITEM][self._dice.integers(len(self.ids[ITEM]), size=(n, size))]
            state[name]["second"] = newest - 600 * np.arange(size)
            state[name]["kind"] = kind
        state["counts"] = self._dice.integers(0, 9, state["counts"].shape)
        return states


def _snapshot(folder: str, items: int, users: int) -> dict[str, Any]:
    from embedding_store.snapshot import write_snapshot

    path = write_snapshot(Path(folder), Model(items, users).snapshot())
    return {"bytes": sum(file.stat().st_size for file in path.iterdir())}


def _publish(bootstrap: str, topic: str, items: int, users: int) -> dict[str, Any]:
    """Versions at the trainer's pace, each in a transaction as the trainer's are, until this process is ended."""
    from streams.outlet import Message, Outlet

    async def publish() -> None:
        model, sequence = Model(items, users), 1
        outlet = Outlet(bootstrap, f"{topic}-bench")
        await outlet.start()
        due = time.monotonic()
        while True:
            sequence += 1
            version = model.delta(sequence, dense=sequence % round(VERSIONS_PER_S * DENSE_S) == 0)
            parts = encode(version)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await outlet.send([Message(topic, part, partition=0) for part in parts])
            due = max(due + 1 / VERSIONS_PER_S, time.monotonic())

    asyncio.run(publish())
    return {}


def _forward(snapshots: str, items: int, users: int) -> dict[str, Any]:
    """The ranker alone, on what a replica hands to it for requests like those of the load: median ms of one thread."""
    import torch

    from embedding_store.snapshot import latest_snapshot, read_snapshot
    from online_model.serving.replica import Replica
    from online_model.serving.settings import ReplicaSettings

    torch.set_num_threads(1)
    model = TrainerSettings()
    path = latest_snapshot(Path(snapshots))
    assert path is not None
    replica = Replica(ReplicaSettings(), model.features, model.ranker, feedback=model.feedback)
    replica.apply(read_snapshot(path))
    ranker, given = replica.state.ranker, []
    seen = ranker.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    requests = _Requests(items, users)
    for _ in range(FORWARD_REQUESTS):
        replica.rank(requests.request())
    seen.remove()
    took = []
    with torch.inference_mode():
        for _ in range(FORWARD_TIMES):
            for args, kwargs in given:
                began = time.perf_counter()
                ranker(*args, **kwargs)
                took.append(time.perf_counter() - began)
    return {"bare_forward_ms": float(np.median(took)) * 1e3}


class _Requests:
    """Users and distinct candidates, drawn uniformly: nothing is hot."""

    def __init__(self, items: int, users: int, seed: int = 1) -> None:
        self._dice, self._items, self._users = random.Random(seed), range(items), users

    def body(self) -> bytes:
        candidates = self._dice.sample(self._items, CANDIDATES)
        return orjson.dumps({"user": f"u{self._dice.randrange(self._users)}", "candidates": candidates})

    def request(self) -> Any:
        """The next body as the app decodes it."""
        from online_model.serving.api import RankRequest

        return msgspec.json.decode(self.body(), type=RankRequest)


class Load:
    """Requests to a replica, timed from when they were due to the last byte of their answers."""

    def __init__(self, port: int, items: int, users: int, seed: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/rank"
        self.requests = _Requests(items, users, seed)
        self.took: list[float] = []  # s
        self.errors: dict[str, int] = {}

    async def send(self, session: Any, body: bytes, due: float) -> None:
        import aiohttp

        try:
            async with session.post(self.url, data=body) as response:
                answer, status = await response.read(), response.status
            self.took.append(time.perf_counter() - due)
            if status != 200 or answer.count(b'"item":') != CANDIDATES:
                self._failed(f"{status} {answer[:100]!r}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self.took.append(time.perf_counter() - due)
            self._failed(type(error).__name__)

    async def closed(self, session: Any, seconds: float) -> None:
        """One after the other."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            await self.send(session, self.requests.body(), time.perf_counter())

    async def open(self, session: Any, seconds: float, rate: float, arrivals: str) -> None:
        """At their due times, whether or not those before were answered."""
        dice, flying, began = random.Random(1), set(), time.perf_counter()
        due = began
        while True:
            due += dice.expovariate(rate) if arrivals == "poisson" else 1 / rate
            if due >= began + seconds:
                break
            body = self.requests.body()
            await _until(due)
            task = asyncio.create_task(self.send(session, body, due))
            flying.add(task)
            task.add_done_callback(flying.discard)
        await asyncio.gather(*flying)

    def _failed(self, why: str) -> None:
        self.errors[why] = self.errors.get(why, 0) + 1


async def _until(due: float) -> None:
    """A loop's timer is a millisecond late: of the last two it looks at the clock itself."""
    if (left := due - time.perf_counter()) > 0.002:
        await asyncio.sleep(left - 0.002)
    while time.perf_counter() < due:
        await asyncio.sleep(0)


def _load(
    port: int, pid: int, items: int, users: int, seconds: float, rate: float, arrivals: str, seed: int
) -> dict[str, Any]:
    """`rate` 0: one after the other. What a bare sleeper beside it and the memory of process `pid` did meanwhile."""
    import aiohttp
    import uvloop

    memory: list[tuple[float, float]] = []  # (s since the start, MB)

    async def watch() -> None:
        process, began = psutil.Process(pid), time.perf_counter()
        while True:
            memory.append((time.perf_counter() - began, process.memory_info().rss / 1e6))
            await asyncio.sleep(RSS_EVERY_S)

    async def run(load: Load) -> None:
        watching = asyncio.create_task(watch())
        timeout = aiohttp.ClientTimeout(TIMEOUT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await (load.open(session, seconds, rate, arrivals) if rate else load.closed(session, seconds))
        watching.cancel()

    load, module = Load(port, items, users, seed), "deploy.bench.serve_parts"
    with subprocess.Popen(
        part_command(module, "sleeper", seconds=seconds), stdout=subprocess.PIPE, preexec_fn=ends_with_parent()
    ) as sleeper:
        gc.collect()
        gc.freeze()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(load))
        stalls = json.loads(sleeper.communicate()[0])
    p50, p99 = (float(p) * 1e3 for p in np.percentile(load.took, [50, 99]))
    memory.append((seconds, psutil.Process(pid).memory_info().rss / 1e6))
    return {
        "requests": len(load.took), "rps": len(load.took) / seconds, "p50_ms": p50, "p99_ms": p99,
        "mean_ms": float(np.mean(load.took)) * 1e3, "max_ms": max(load.took) * 1e3,
        "errors": sum(load.errors.values()), "why": load.errors, "memory": memory, **stalls,
    }  # fmt: skip


def _sleeper(seconds: float) -> dict[str, Any]:
    """By how much a sleep of a millisecond is too long: what the machine takes from everybody."""
    late, end = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        time.sleep(0.001)
        late.append(time.perf_counter() - began - 0.001)
    return {"stall_p99_ms": float(np.percentile(late, 99)) * 1e3}


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "snapshot": _snapshot, "publish": _publish, "forward": _forward, "load": _load, "sleeper": _sleeper,
    }  # fmt: skip
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
