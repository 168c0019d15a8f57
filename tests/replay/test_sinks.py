"""Sinks: every record once, in the order given, where all producers put it; and no more of them than can be held."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from kafka.partitioner import DefaultPartitioner

from deploy.broker import Broker
from deploy.processes import free_port
from embedding_store.errors import BrokerError, LogError
from replay.faults import FaultSettings, Garbage, with_faults
from replay.player import Played, PlaySettings, play
from replay.readers import Record, in_time_order, open_log
from replay.sinks import DELIVERY_S, JsonlSink, KafkaSink
from streams.events import MAX_EVENT_BYTES, Item, Rejected, Tick, decode, decode_item, encode
from streams.topics import TopicSettings, create_topics
from tests.public_logs import TAOBAO_BY_TIME
from tests.replay.test_player import click

Topic = list[tuple[int, bytes | None, bytes]]


def test_a_file_takes_the_records_and_is_the_same_each_time(tmp_path: Path) -> None:
    records: list[Record] = [Item(item=7, category="c"), click(1), click(2)]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.gz"):
        with JsonlSink(tmp_path / name) as sink:
            play(records, sink)
    plain = (tmp_path / "a.jsonl").read_bytes()
    assert plain.splitlines() == [encode(record) for record in records]
    packed = (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == plain
    assert packed == (tmp_path / "c.jsonl.gz").read_bytes()
    with pytest.raises(LogError, match=r"choose a place that can be written"):
        JsonlSink(tmp_path / "nowhere" / "x.jsonl")


# --- on Kafka



def test_on_kafka_every_record_is_there_once_where_its_key_belongs(
    broker: str, topics: TopicSettings, read_topic: Callable[[str], Topic], public_log: Callable[[str], Path]
) -> None:
    log = open_log("taobao", public_log(TAOBAO_BY_TIME))
    with KafkaSink(broker, topics.events, topics.items) as sink:
        played = play(log, sink)
    assert (played.events, played.items, played.rejected) == (96_168, 75_384, {})

    expected = [record for record in in_time_order(log) if not isinstance(record, Item)]
    place = {event.event_id: number for number, event in enumerate(expected)}
    last_of_partition: dict[int, int] = defaultdict(lambda: -1)
    ticks: dict[int, list[int]] = defaultdict(list)
    seen = 0
    for partition, key, value in read_topic(topics.events):
        event = decode(value)
        if isinstance(event, Tick):
            assert key is None
            ticks[partition].append(event.ts)
            continue
        assert expected[place[event.event_id]] == event
        assert place[event.event_id] > last_of_partition[partition], "out of order, or twice"
        last_of_partition[partition] = place[event.event_id]
        if seen < 2000:
            assert key == str(event.user).encode()
            assert partition == DefaultPartitioner().partition("t", None, key, None, value, _Cluster())
        seen += 1
    assert seen == len(expected)
    assert set(ticks) == {0, 1, 2, 3}
    assert sum(map(len, ticks.values())) == played.ticks
    for partition in ticks:
        assert ticks[partition] == ticks[0]
    assert played.to_ms is not None
    assert ticks[0][-1] == played.to_ms + PlaySettings().closing_ms

    items = [(key, decode_item(value)) for _, key, value in read_topic(topics.items)]
    assert len(items) == played.items
    assert all(key == str(item.item).encode() for key, item in items)


class _Cluster:
    """What kafka-python's default partitioner asks of a cluster."""

    def topics(self) -> set[str]:
        return {"t"}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0, 1, 2, 3}

    available_partitions_for_topic = partitions_for_topic


def test_a_record_of_the_largest_size_passes_and_one_past_it_is_an_error(broker: str, topics: TopicSettings) -> None:
    def big(size: int) -> Item:
        return Item(item=1, title="x" * size)

    with KafkaSink(broker, topics.events, topics.items) as sink:
        sink.send(big(999_900))
        sink.send(big(10))
    sink = KafkaSink(broker, topics.events, topics.items)
    sink.send(big(1_100_000))
    with pytest.raises(BrokerError):
        sink.close()


def test_what_is_outstanding_is_bounded(
    broker: str, topics: TopicSettings, monkeypatch: pytest.MonkeyPatch, read_topic: Callable[[str], Topic]
) -> None:
    monkeypatch.setattr("replay.sinks.OUTSTANDING", 100)
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for ts in range(2000):
            sink.send(click(ts, user=ts))
            assert sink._sent - sink._kept <= 100
    assert len(read_topic(topics.events)) == 2000


def test_a_missing_topic_and_a_missing_broker_are_one_line(broker: str) -> None:
    with pytest.raises(BrokerError, match=r"has no topic nowhere") as caught:
        KafkaSink(broker, "nowhere", "nothing")
    assert "\n" not in str(caught.value)
    start = time.monotonic()
    with pytest.raises(BrokerError, match=r"headrace broker start"):
        KafkaSink(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - start < 10


def test_something_that_is_not_kafka_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        def hang_up() -> None:
            try:
                while True:
                    server.accept()[0].close()
            except OSError:
                pass

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(BrokerError, match=r"does not answer as Kafka with PLAINTEXT") as caught:
            KafkaSink(f"127.0.0.1:{server.getsockname()[1]}")
        assert "\n" not in str(caught.value)


def test_a_broker_that_goes_away_is_one_line_and_soon(
    tmp_path: Path, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.sinks.DELIVERY_S", 3.0)
    topics = TopicSettings(topic_prefix, partitions=2)
    with Broker.start(tmp_path) as own:
        create_topics(own.bootstrap, topics)
        sink = KafkaSink(own.bootstrap, topics.events, topics.items)
        sink.send(click(0))
        sink.flush()
    start = time.monotonic()
    with pytest.raises(BrokerError, match=r"takes no records") as caught:
        play((click(ts) for ts in range(1_000_000_000)), sink)
    sink.abort()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 60


def test_an_error_in_the_log_leaves_what_was_sent_and_comes_through(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"1,10,100,pv,1511658000\n" * 50_000)[:-20])
    with pytest.raises(LogError, match=r"cut short"), KafkaSink(broker, topics.events, topics.items) as sink:
        play(open_log("taobao", path), sink)


def test_garbage_goes_where_its_user_goes_and_keeps_its_place(
    broker: str, topics: TopicSettings, tmp_path: Path, read_topic: Callable[[str], Topic]
) -> None:
    """Onto Kafka, the huge ones too, and into a file: the same records in the same order."""
    log = [click(ts, user=ts % 7) for ts in range(600)]
    dealt = FaultSettings(seed=1, garbage=0.5, duplicates=0.2, shuffle_ms=50)
    dealt_out = [r if isinstance(r, Garbage) else Garbage(encode(r), r.user) for r in with_faults(log, dealt)]  # type: ignore[union-attr]
    sent = [value for value, _ in dealt_out]
    assert any(len(value) > MAX_EVENT_BYTES for value in sent)
    with KafkaSink(broker, topics.events, topics.items) as sink:
        played = play(log, sink, PlaySettings(faults=dealt))
        expected: dict[int, list[bytes]] = defaultdict(list)
        for value, user in dealt_out:
            expected[sink.place(topics.events, user)[1]].append(value)
    found: dict[int, list[bytes]] = defaultdict(list)
    refused = 0
    for partition, key, value in read_topic(topics.events):
        if key is None:
            continue  # a tick
        found[partition].append(value)
        try:
            decode(value)
        except Rejected:
            refused += 1
    assert refused == played.faults.garbage > 200
    assert found == expected
    assert len(found) > 1
    with JsonlSink(tmp_path / "log.jsonl") as file:
        play(log, file, PlaySettings(faults=dealt))
    assert (tmp_path / "log.jsonl").read_bytes().split(b"\n") == [*sent, b""]


@pytest.mark.parametrize(("records", "size"), [(50, 1 << 30), (40_000, 10_000)])
def test_a_play_waits_while_the_broker_is_slow(
    broker: str, topics: TopicSettings, monkeypatch: pytest.MonkeyPatch, read_topic: Callable[[str], Topic],
    records: int, size: int,
) -> None:  # fmt: skip
    """At full speed the log is read no further than what may be outstanding, by records or by bytes."""
    monkeypatch.setattr("replay.sinks.OUTSTANDING", records)
    monkeypatch.setattr("replay.sinks.OUTSTANDING_BYTES", size)
    open_gate, blocked = threading.Event(), threading.Event()
    really = AIOKafkaProducer.send_batch

    async def slowly(self, *args, **kwargs):
        await asyncio.to_thread(open_gate.wait)
        return await really(self, *args, **kwargs)

    monkeypatch.setattr(AIOKafkaProducer, "send_batch", slowly)
    value = len(encode(click(1)))
    most = min(records, size // value) + 1
    read, done = 0, list[Played]()

    def log():
        nonlocal read
        for ts in range(1_000):
            read += 1
            yield click(ts, user=ts)

    with KafkaSink(broker, topics.events, topics.items) as sink:
        wait = sink._wait_for_at_most

        def waits(*outstanding: int) -> None:
            blocked.set()
            wait(*outstanding)

        monkeypatch.setattr(sink, "_wait_for_at_most", waits)
        player = threading.Thread(target=lambda: done.append(play(log(), sink)))
        player.start()
        try:
            assert blocked.wait(20)
            assert most - 20 <= read <= most + 5, "ids and times differ in length"
            assert not done
        finally:
            open_gate.set()
            player.join(60)
    assert done[0].records == 1_000
    events = [decode(value) for _, key, value in read_topic(topics.events) if key is not None]
    assert {event.ts for event in events} == set(range(1_000))
    assert len(events) == 1_000


def test_a_partition_without_a_leader_is_waited_for_as_long_as_a_broker_is(broker: str, topics: TopicSettings) -> None:
    """A busy one has none for ten seconds after its start; the client itself gives a batch up that finds none."""
    with KafkaSink(broker, topics.events, topics.items) as sink:
        assert sink._producer._message_accumulator._batch_ttl == DELIVERY_S


def test_a_process_that_was_stopped_goes_on(
    broker: str, topics: TopicSettings, monkeypatch: pytest.MonkeyPatch, read_topic: Callable[[str], Topic]
) -> None:
    """Ctrl-Z with a batch on its way, for longer than the broker has for it: here only its thread stands still."""
    monkeypatch.setattr("replay.sinks.DELIVERY_S", 0.5)
    really, stops = AIOKafkaProducer.send_batch, iter([0.8])

    async def stopped(self, *args, **kwargs):
        time.sleep(next(stops, 0.0))
        return await really(self, *args, **kwargs)

    monkeypatch.setattr(AIOKafkaProducer, "send_batch", stopped)
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for ts in range(100):
            sink.send(click(ts, user=ts))
    assert next(stops, None) is None
    assert len(read_topic(topics.events)) == 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(LogError, match="make room"), JsonlSink("/dev/full") as sink:
        sink.send(click(1))
