"""Figures of a replica: how soon a large one serves, and that no read is ever of two versions."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
from kafka import KafkaProducer

from deploy import broker
from deploy.processes import free_port
from embedding_store.columns import TableRows
from embedding_store.delta import Version, encode
from embedding_store.snapshot import write_snapshot
from online_model.features import CARD, CATEGORY, EXTRAS, ITEM, SELLER, TITLE_WORDS, USER, WORD
from online_model.ranker import Ranker
from online_model.settings import TrainerSettings
from streams.topics import TopicSettings
from tests.figures.common import Bench, Line, Row, at_least, at_most, equal, headrace, program, started

MILLION = 1_000_000
READS = 1_000_000
FRESH_SECONDS, TOUCHED = 0.2, 2_000  # between two versions, the least that a trainer takes; rows of each
WAITING = 60  # versions that are in the topic when the replica starts
SETTINGS = TrainerSettings()


class _Trainer:
    """Versions as one with so many users and items makes them: rows around 64 topics, clicks by a power law."""

    def __init__(self, users: int, items: int) -> None:
        self._dice = np.random.default_rng(0)
        self._topics = self._dice.normal(0, 0.3, (64, SETTINGS.features.dim))
        sizes = {USER: users, ITEM: items, CATEGORY: 200, SELLER: 2_000, WORD: 5_000}
        self._ids = {table: np.sort(self._dice.integers(1, 1 << 62, n)) for table, n in sizes.items()}
        self._dense = Ranker(SETTINGS.features.dim, SETTINGS.ranker).weights()
        self.sequence = 1

    def first(self) -> Version:
        """All of it."""
        cards = {item: orjson.dumps({"kind": "item", "item": n, "title": "What it is called", "category": n % 200})
                 for n, item in enumerate(self._ids[ITEM].tolist())}  # fmt: skip
        tables = {table: self._rows(table, ids) for table, ids in self._ids.items()}
        return self._version(tables=tables, dense=self._dense, blobs={CARD: cards})

    def next(self) -> Version:
        """What a trainer at full rate sends."""
        self.sequence += 1
        tables = {}
        for table in (USER, ITEM):
            at = self._dice.choice(len(self._ids[table]), TOUCHED, replace=False)
            tables[table] = self._rows(table, self._ids[table][np.sort(at)])
        dense = self._dense if self.sequence % 5 == 0 else {}
        return self._version(base=(1, self.sequence - 1), tables=tables, dense=dense)

    def _version(self, **fields: Any) -> Version:
        now_ms = time.time_ns() // 1_000_000
        about = {"settings": msgspec.to_builtins(SETTINGS)}
        return Version(1, self.sequence, created_ms=now_ms, info=about, **fields)

    def _rows(self, table: str, ids: np.ndarray) -> TableRows:
        n = len(ids)
        weights = self._topics[self._dice.integers(64, size=n)] + self._dice.normal(0, 0.15, (n, len(self._topics[0])))
        columns = {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in EXTRAS[table].items()}
        columns["weights"] = weights.astype(np.float32)
        if table == ITEM:
            columns["impressions"] = (self._dice.pareto(1, n) * 20).astype(np.int64)
            linked = (("category", CATEGORY, ()), ("seller", SELLER, ()), ("words", WORD, (TITLE_WORDS,)))
            for name, of, shape in linked:
                columns[name] = self._ids[of][self._dice.integers(len(self._ids[of]), size=(n, *shape))]
        return TableRows(ids, columns)


def ready(bench: Bench) -> list[Row]:
    """A replica of a million rows, until it is ready and caught up, while versions come at a trainer's full rate"""
    rows = []
    for users, items in ((MILLION, 20_000), (20_000, MILLION)):
        folder, what = bench.empty("replica"), f"{users:,} users, {items:,} items"
        trainer, port = _Trainer(users, items), free_port()
        path = write_snapshot(folder / ".headrace" / "snapshots", trainer.first())
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        (folder / "headrace.toml").write_text(f"[serve]\nport = {port}\n")
        with _publishing(folder, trainer):
            begun = time.monotonic()
            with started(folder, "serve", says="serving on") as process:
                serving = time.monotonic()
                while not _is_ready(port):
                    assert process.poll() is None, "the replica ended"
                    time.sleep(0.02)  # what is waited for is in another process
                seconds = time.monotonic() - serving
                held = int(_get(port, "/v1/model")["sequence"])
                resident = _resident(process.pid)
        rows += [
            Row(f"{what}, the snapshot", f"{size:,.0f} MB", "", True),
            at_most(f"{what}, from listening to ready", seconds, 10, " s"),
            Row(f"{what}, from the process's start", f"{seconds + serving - begun:.1f} s", "", True),
            at_least(f"{what}, the version held then", held, WAITING),
            Row(f"{what}, memory at its highest", f"{resident:,.0f} MB", "", True),
        ]
    return rows


def torn(bench: Bench) -> list[Row]:
    """Reads (a read: one request, all of its candidates), with a version every 20 of them"""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        each = list(pool.map(lambda seed: program(_TORN, READS // cores, seed), range(cores)))
    total = {name: sum(one[name] for one in each) for name in each[0]}
    return [
        at_least("reads", total["reads"], READS),
        Row("versions, and of these snapshots", f"{total['versions']:,}, {total['swaps']:,}", "", True),
        equal("reads that were not wholly of the version they name", total["mixed"], 0),
    ]


_TORN = """
import dataclasses, json, sys
import torch
from tests.online_model.serving.torn import torn_reads
torch.set_num_threads(1)
print(json.dumps(dataclasses.asdict(torn_reads(int(sys.argv[1]), int(sys.argv[2])))))
"""


@contextlib.contextmanager
def _publishing(folder: Path, trainer: _Trainer) -> Iterator[None]:
    """A broker in which versions are, and to which more come."""
    end = threading.Event()
    try:
        headrace(folder, "broker", "start")
        headrace(folder, "topics", "create")
        running = broker.status(folder / ".headrace")
        assert running is not None
        producer = KafkaProducer(bootstrap_servers=running.bootstrap)

        def send() -> None:
            for part in encode(trainer.next()):
                producer.send(TopicSettings().parameters, part, partition=0)
            producer.flush()

        def publish() -> None:
            while not end.wait(FRESH_SECONDS):
                send()

        for _ in range(WAITING):
            send()
        with ThreadPoolExecutor(1) as pool:
            publishing = pool.submit(publish)
            try:
                yield
            finally:
                end.set()
            publishing.result()
        producer.close()
    finally:
        headrace(folder, "broker", "stop")


def _get(port: int, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return orjson.loads(answer.read())


def _is_ready(port: int) -> bool:
    try:
        return bool(_get(port, "/readyz")["ok"])
    except urllib.error.HTTPError:
        return False


def _resident(pid: int) -> float:
    """MB that a process had in memory at its highest."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3


LINES: dict[str, Line] = {"ready": ready, "torn": torn}
