"""`headrace bench intake`: whole batches through Faust, beside Faust an event at a time and beside the bare client.

One topic of 4 partitions, the same records of the standard mix in it for all (an impression of one item, so that a
record is an event). Each part is a process of its own on one core, and decodes what it reads:

- faust:    a stock Faust agent, one event at a time, Faust's own JSON codec; it reads the first `faust_events`;
- client:   aiokafka's `getmany`, `orjson.loads` per record: the limit;
- headrace: `BatchApp` with a feed that decodes a batch as the join worker does, in one piece, to typed events.

Timed is from the moment when the first records have been handled to the last record of the topic, so that starting and
joining a group are left out; those first records (one batch, or one event) are not counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from deploy.bench.common import bare_topics, finish, median, run_part
from deploy.bench.mix import standard_mix
from deploy.bench.stock_faust import run_stock_faust
from streams.events import decode_many

PARTITIONS = 4
FETCH_BYTES = 4 << 20
BATCH_RECORDS = 5_000


def bench_intake(
    bootstrap: str, events: int, faust_events: int, runs: int, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The figures of the command, medians of `runs`. `step` is called after each of the 3 * runs parts."""
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    measured: dict[str, list[dict[str, Any]]] = {"faust": [], "client": [], "headrace": []}
    with bare_topics(bootstrap, {topic: PARTITIONS}):
        _fill(bootstrap, topic, events)
        for _ in range(runs):
            for part, found in measured.items():
                few = min(faust_events, events) if part == "faust" else events
                found.append(run_part(__name__, part, bootstrap=bootstrap, topic=topic, events=few))
                step()
    faust, client, ours = (median(measured[part], "per_s") for part in ("faust", "client", "headrace"))
    return {
        "faust_per_event_per_s": faust,
        "client_limit_per_s": client,
        "headrace_per_s": ours,
        "ratio_to_faust": ours / faust,
        "ratio_to_limit": ours / client,
    }


def _fill(bootstrap: str, topic: str, events: int) -> None:
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=50, batch_size=256 << 10)
    for i, raw in enumerate(standard_mix(events, page=1, span_ms=events)):
        # in turns of 100, so that the first `faust_events` of the partitions are alike
        producer.send(topic, raw, partition=i // 100 % PARTITIONS)
    producer.close()


class _Clock:
    """Events per second, from after the first records to the last."""

    def __init__(self, events: int) -> None:
        self._left, self._counted, self._began = events, 0, 0.0

    def saw(self, count: int) -> bool:
        """Some more records were handled. True at the end."""
        if not self._began:
            self._began = time.perf_counter()
        else:
            self._counted += count
        self._left -= count
        if self._left > 0:
            return False
        self.per_s = self._counted / (time.perf_counter() - self._began)
        return True


def _end(clock: _Clock) -> None:
    """Print the figure and leave at once: what a worker does to stop is not measured."""
    finish({"per_s": clock.per_s})
    os._exit(0)


def _faust(bootstrap: str, topic: str, events: int) -> None:
    clock = _Clock(events)

    async def take(stream: Any) -> None:
        async for _ in stream:
            if clock.saw(1):
                _end(clock)

    run_stock_faust(bootstrap, topic, lambda app: app.agent(app.topic(topic, value_serializer="json"))(take))


def _client(bootstrap: str, topic: str, events: int) -> None:
    import orjson
    from aiokafka import AIOKafkaConsumer

    async def main() -> None:
        clock = _Clock(events)
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", max_partition_fetch_bytes=FETCH_BYTES
        )
        async with consumer:
            while True:
                for records in (await consumer.getmany(timeout_ms=200, max_records=BATCH_RECORDS)).values():
                    for record in records:
                        orjson.loads(record.value)
                    if clock.saw(len(records)):
                        _end(clock)

    asyncio.run(main())


class _Decoding:
    """A feed that decodes its batches, and keeps nothing."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    async def open(self, partitions: set[int]) -> Mapping[int, int]:
        return dict.fromkeys(partitions, 0)

    async def take(self, partition: int, records: list) -> int | None:
        decode_many([record.value for record in records])
        if self._clock.saw(len(records)):
            _end(self._clock)
        return None

    async def close(self, partitions: set[int]) -> None:
        pass


def _headrace(bootstrap: str, topic: str, events: int) -> None:
    from streams import app
    from streams.batches import Intake, serve_feed

    feed = _Decoding(_Clock(events))
    intake = Intake(
        bootstrap, topic, f"{topic}-{uuid.uuid4().hex}", max_partition_bytes=FETCH_BYTES, max_records=BATCH_RECORDS
    )
    app.run(lambda stop: serve_feed(intake, feed, stop))


if __name__ == "__main__":
    {"faust": _faust, "client": _client, "headrace": _headrace}[sys.argv[1]](**json.loads(sys.argv[2]))
