"""What the tests of the join worker share: players who send, and the blocks held against one joiner's."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from threading import Event, Thread

import numpy as np
import orjson
from aiokafka import AIOKafkaProducer, ConsumerRecord

from online_model.examples import Block, Examples
from streams.blocks import decode_block, encode_block
from streams.dead_letters import DeadLetter
from streams.join_store import JoinStore
from streams.joiner import Joined, Joiner, JoinSettings, Record
from streams.topics import TopicSettings
from tests.streams.children import Child, convert, group_offsets, read_all, wait_for

Ranges = list[list[int]]
PARTITIONS = 4
JOIN = {"wait_ms": 2_000, "watch_wait_ms": 1_000, "open_ms": 60_000}


def _session(dice: random.Random, n: int, now: int) -> Iterator[tuple[int, str, dict | bytes]]:
    """What one user does in a page view, and what goes wrong on the way: (when it is sent, user, event)."""
    user, request = f"u{dice.randrange(200)}", f"r{n}"
    items = dice.sample(range(500), 8)
    about = {"user": user, "request_id": request, "scenario": "shelf"}
    yield now, user, about | {"kind": "impression", "event_id": f"i{n}", "ts": now, "items": items}
    for i, item in enumerate(items):
        if dice.random() < 0.15:
            acted = now + dice.randrange(1, 4_000)
            click = about | {"kind": "click", "event_id": f"c{n}.{i}", "ts": acted, "item": item}
            yield acted, user, click
            if dice.random() < 0.1:
                yield acted + 300, user, click  # a duplicate
            if dice.random() < 0.3:
                yield acted + 5 + dice.randrange(400), user, about | {
                    "kind": "watch", "event_id": f"w{n}.{i}", "ts": acted + 5, "item": item, "play_ms": 900,
                    "duration_ms": 1_000,
                }  # fmt: skip
            if dice.random() < 0.2:
                bought = {"kind": "purchase", "event_id": f"p{n}.{i}", "ts": acted + 9, "item": item}
                yield acted + 9, user, about | bought
    if dice.random() < 0.02:
        yield now, user, b"poison %d" % n


class Players:
    """Sends sessions in the background, 50 every `pause` seconds, until there were so many or they are told to `end`;
    then, if they are the last, ends all windows with a tick in each partition."""

    def __init__(
        self, bootstrap: str, topic: str, seed: int, sessions: int, pause: float = 0.05, last: bool = True
    ) -> None:
        self._bootstrap, self._topic, self._seed, self._sessions = bootstrap, topic, seed, sessions
        self._pause, self._last, self._ended = pause, last, Event()
        self.records = 0
        self._thread = Thread(target=lambda: asyncio.run(self._play()))

    def __enter__(self) -> Players:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            self._ended.set()
        self.join()

    def end(self) -> None:
        self._ended.set()
        self.join()

    def join(self) -> None:
        self._thread.join()

    def play(self) -> int:
        with self:
            pass
        return self.records

    async def _play(self) -> None:
        dice, n = random.Random(self._seed), 0
        # Patient: in some tests Kafka goes away.
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap, linger_ms=5, enable_idempotence=True, request_timeout_ms=120_000
        )
        await producer.start()
        now = int(time.time() * 1000) - 3_600_000
        to_send: list[tuple[int, int, str, bytes]] = []
        while n < self._sessions and not self._ended.is_set():
            for _ in range(50):
                n += 1
                for at, user, event in _session(dice, self._seed * 1_000_000 + n, now + n * 5):
                    value = event if isinstance(event, bytes) else orjson.dumps(event)
                    heapq.heappush(to_send, (at, len(to_send) + n * 100, user, value))
            while to_send and to_send[0][0] < now + n * 5:
                _, _, user, value = heapq.heappop(to_send)
                await producer.send(self._topic, value, key=user.encode())
                self.records += 1
            await asyncio.to_thread(self._ended.wait, self._pause)
        tick = {"kind": "tick", "event_id": "end", "ts": now + n * 5 + 3_000_000}
        for partition in range(PARTITIONS if self._last else 0):
            await producer.send(self._topic, orjson.dumps(tick), partition=partition)
            self.records += 1
        await producer.stop()


def blocks(broker: str, topics: TopicSettings) -> dict[int, list[Block]]:
    """All blocks; raises unless each goes on where the one before it ended."""
    blocks: dict[int, list[Block]] = {}
    for partition, records in read_all(broker, topics.examples).items():
        blocks[partition] = [decode_block(record.value) for record in records]
        at = 0
        for block in blocks[partition]:
            assert block.partition == partition
            assert block.from_offset == at, f"partition {partition}: [{block.from_offset}, …) after {at}"
            at = block.to_offset
    return blocks


def joined_up_to(broker: str, topics: TopicSettings) -> list[int]:
    """By partition, how many records have had their effect: the offsets of the group that moves with the blocks."""
    offsets = group_offsets(broker, f"{topics.prefix}headrace-join.store", topics.events, PARTITIONS)
    return [offset or 0 for offset in offsets]


def ready(child: Child) -> None:
    wait_for(lambda: "joining partitions" in child.says, child=child)


def check_against_one_joiner(
    broker: str, topics: TopicSettings, aside: Mapping[int, Ranges] | None = None
) -> dict[int, list[Block]]:
    """Rows, balance and dead letters are those of a joiner that was never interrupted. Returns the blocks.

    `aside`: partition → the offsets [from, to) that this joiner sets aside.
    """
    found, events = blocks(broker, topics), read_all(broker, topics.events)
    dead = []
    for partition in range(PARTITIONS):
        records = [Record(r.offset, r.timestamp, r.value) for r in events[partition]]
        whole = one_joiner(Joiner(convert(JOIN, JoinSettings), partition), records, (aside or {}).get(partition, []))
        got = Examples.concat([block.examples for block in found[partition]])
        want = Examples.concat([joined.block.examples for joined in whole])
        for name in vars(want):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        assert found[partition][-1].counts == whole[-1].block.counts
        assert found[partition][-1].to_offset == whole[-1].block.to_offset
        dead += [letter for joined in whole for letter in joined.dead]
    sent = [record for records in read_all(broker, topics.events_dead).values() for record in records]
    letters = [DeadLetter.of(record.headers, record.value) for record in sent]
    assert sorted(letters, key=_place) == sorted(dead, key=_place)
    assert dead, "no poison was sent"
    return found


def commit_unsent(store: Path, partition: int, records: Sequence[ConsumerRecord]) -> None:
    """What a worker leaves that is killed between commit and publish: a block of what is new in the records."""
    join = convert(JOIN, JoinSettings)
    with JoinStore(store, join) as opened:
        joiner = Joiner(join, partition, opened.next_offset or 0, opened.state())
        joined = joiner.process(Record(r.offset, r.timestamp, r.value) for r in records)
        opened.commit(joined, [encode_block(joined.block), *joined.dead])


def one_joiner(joiner: Joiner, records: list[Record], aside: Ranges) -> list[Joined]:
    """What it makes of the records, of which those in `aside` are set aside."""

    def is_aside(record: Record) -> bool:
        return any(start <= record.offset < end for start, end in aside)

    return [joiner.process(part, set_aside=flag) for flag, part in groupby(records, is_aside)]


def rows(found: Mapping[int, list[Block]]) -> int:
    return sum(len(block.examples) for some in found.values() for block in some)


def _place(letter: DeadLetter) -> tuple[int, int]:
    return letter.partition, letter.offset
