"""A small system behind the live page: a real replica over HTTP that hears `events` and tells what it shows; the
trainer's part is a version that comes a moment after each click, and lifts what was clicked."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import uvicorn
from kafka import KafkaProducer

from embedding_store.delta import Version
from online_model.positions import Position
from online_model.serving.app import create_app
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from streams.events import Click, Item, encode
from streams.impressions import ImpressionLog
from streams.live_events import LiveEvents
from streams.settings import ServeWorkerSettings
from streams.topics import TopicSettings
from tests.online_model.serving.world import DIM, FEATURES, RANKER, item_rows, world

LEARNED_S = 0.3  # from a click to the version that has learned of it
FAR = 1 << 40


class Shop(threading.Thread):
    """Runs in a thread of its own until `close`. `url`: of the replica."""

    def __init__(self, broker: str, topics: TopicSettings, folder: Path, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._settings = ServeWorkerSettings(bootstrap=broker, data_dir=folder, topics=topics)
        self._ready, self.url = threading.Event(), ""
        producer = KafkaProducer(bootstrap_servers=broker)
        for item in range(40):
            card = Item(item=item, title=f"Thing {item}", category=f"c{item % 4}", price=item + 0.5)
            producer.send(topics.items, encode(card), key=str(item).encode())
        producer.close()
        self.start()
        assert self._ready.wait(20)

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        live = LiveUsers(1_000, self._settings.disorder_ms)
        self._replica = Replica(ReplicaSettings(), FEATURES, RANKER, live=live)
        self._replica.apply(world())
        self._holder = Holder(self._replica)
        caught_up = asyncio.Event()
        caught_up.set()
        events = LiveEvents(self._settings, self._holder, live, caught_up)
        events.clicked = self._clicked
        impressions = ImpressionLog(self._settings, self._holder.metrics.registry)
        self._holder.served.append(impressions.served)
        tasks = [asyncio.create_task(part.run()) for part in (events, impressions)]
        listening = socket.create_server(("127.0.0.1", self._port))
        app = create_app(self._holder, max_age_ms=FAR)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=2))
        serving = asyncio.create_task(server.serve([listening]))
        self.url = "http://{}:{}".format(*listening.getsockname())
        self._ready.set()
        await self._over.wait()
        self._holder.close()
        server.should_exit = True
        await serving
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _clicked(self, click: Click) -> None:
        self._loop.call_later(LEARNED_S, self._learn, click)

    def _learn(self, click: Click) -> None:
        """The version that has learned of the click: its item has another embedding, its position is past it. No user's
        row comes with it, so no event is in one (`next`)."""
        sequence = self._replica.sequence
        weights = np.random.default_rng(sequence).normal(0, 1.5, (1, DIM))
        learned = asdict(Position(next=0, first=0, handled=FAR, watermark=click.ts + 2))
        self._holder.apply(
            Version(
                epoch=1, sequence=sequence + 1, base=(1, sequence), created_ms=time.time_ns() // 1_000_000,
                positions={0: FAR}, info={"partitions": {"0": learned}},
                tables={"item": item_rows([click.item], weights, [int(click.item) % 4])},
            )
        )  # fmt: skip

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self.join(20)


@contextmanager
def shop(broker: str, topics: TopicSettings, folder: Path, port: int = 0) -> Iterator[Shop]:
    """A shop, as long as it lasts; the replica at `port`."""
    made = Shop(broker, topics, folder, port)
    try:
        yield made
    finally:
        made.close()

