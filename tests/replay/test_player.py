"""The player: every record once, in order, where all producers put it; and time carried to every partition."""

from __future__ import annotations

import gzip
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from kafka.partitioner import DefaultPartitioner

from deploy.broker import Broker
from deploy.processes import free_port
from embedding_store.errors import BrokerError, LogError
from replay.player import Played, PlaySettings, play
from replay.readers import Record, in_time_order, open_log
from replay.sinks import JsonlSink, KafkaSink
from streams.events import Click, Event, Impression, Item, Tick, decode, decode_item, encode
from streams.topics import TopicSettings, create_topics
from tests.replay.conftest import TAOBAO_BY_TIME

Topic = list[tuple[int, bytes | None, bytes]]


class ListSink:
    """What it was given, in order: records, and ticks as their times."""

    def __init__(self, partitions: int = 4) -> None:
        self.partitions = partitions
        self.sent: list[Record | int] = []
        self.flushed = 0

    def send(self, record: Event | Item) -> None:
        self.sent.append(record)

    def tick(self, ts: int) -> int:
        self.sent.append(ts)
        return self.partitions

    def flush(self) -> None:
        self.flushed = len(self.sent)

    def close(self) -> None:
        pass


class FakeClock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds


def click(ts: int, user: int = 1) -> Click:
    return Click(event_id=f"e{ts}", ts=ts, user=user, item=7)


def times(sent: Iterable[Record | int]) -> list[tuple[str, int]]:
    return [("tick", r) if isinstance(r, int) else ("event", r.ts) for r in sent if not isinstance(r, Item)]


# --- without Kafka


def test_the_summary_counts_what_was_played(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("1,10,100,pv,5\n1,10,100,look,6\n" + "2,11,100,buy,7\n" * 150)
    sink = ListSink()
    played = play(open_log("taobao", path), sink)
    assert (played.events, played.records, played.items, played.rejected) == (151, 151, 2, {"behaviour": 1})
    assert (played.from_ms, played.to_ms, played.disordered) == (5000, 7000, 0)
    assert sink.flushed == len(sink.sent)
    shown = Impression(event_id=1, ts=5, user=1, request_id=1, items=[1, 2, 3])
    assert play([shown], ListSink()).events == 3, "an impression counts its items"


def test_the_last_tick_is_past_everything_that_is_open() -> None:
    sink = ListSink()
    played = play([click(1000), click(5000)], sink, PlaySettings(closing_ms=60_000))
    assert times(sink.sent) == [("event", 1000), ("event", 5000), ("tick", 65_000)]
    assert played.ticks == 4
    assert play([], ListSink()).ticks == 0, "without events there is no time to tell"


def test_ticks_carry_time_but_never_past_what_is_to_come_and_are_few() -> None:
    records = [click(ts) for ts in range(0, 3_000_000, 700)]
    sink = ListSink()
    played = play(records, sink)
    told = 0
    for what, ts in times(sink.sent)[:-1]:
        assert ts >= told, "no event may come after a tick that is past it"
        if what == "tick":
            assert ts % 1000 == 0
            told = ts
    assert told > records[-1].ts - 100_000
    assert 0.02 * len(records) < played.ticks < 0.05 * len(records)


def test_a_pace_keeps_the_gaps_and_ticks_through_them() -> None:
    clock, sink = FakeClock(), ListSink()
    arrived: list[float] = []
    sink.send = lambda record: (arrived.append(clock.now()), sink.sent.append(record))[0]  # type: ignore[method-assign]
    records = [click(0), click(500), click(10_000), click(10_000)]
    play(records, sink, PlaySettings(speed=2.0), clock=clock)
    assert arrived == pytest.approx([100.0, 100.25, 105.0, 105.0], abs=0.002)
    sent = times(sink.sent)
    assert sent[:2] == [("event", 0), ("event", 500)]
    assert sent[2:11] == [("tick", ts) for ts in range(1000, 10_000, 1000)]
    assert sent[-3:] == [("event", 10_000), ("event", 10_000), ("tick", 10_000 + 35 * 60_000)]


def test_disorder_is_played_as_it_comes_and_counted() -> None:
    sink = ListSink()
    played = play([click(5000), click(4000), click(6000)], sink)
    assert [ts for what, ts in times(sink.sent) if what == "event"] == [5000, 4000, 6000]
    assert (played.disordered, played.from_ms, played.to_ms) == (1, 4000, 6000)


def test_ticks_of_a_recorded_log_are_not_played() -> None:
    sink = ListSink()
    played = play([click(1), Tick(event_id="t", ts=5_000_000), click(2)], sink)
    assert (played.records, played.to_ms) == (2, 2)


def test_progress_is_told_while_it_goes_on() -> None:
    clock, told = FakeClock(), []
    play(
        [click(0), click(1000), click(2000)],
        ListSink(), PlaySettings(speed=1.0), lambda played: told.append((played.records, played.seconds)), clock,
    )  # fmt: skip
    assert told[-1] == (3, pytest.approx(2.0, abs=0.01))
    assert 5 < len(told) < 13


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
        import threading

        def hang_up() -> None:
            try:
                while True:
                    server.accept()[0].close()
            except OSError:
                pass

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(BrokerError, match=r"takes no records") as caught:
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


def test_played_rates() -> None:
    assert Played().events_per_s == 0.0
    assert Played(events=10, seconds=2.0).events_per_s == 5.0
