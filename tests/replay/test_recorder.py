"""The recorder: killed at any moment, and whatever Kafka does meanwhile, the recording is the topic."""

from __future__ import annotations

import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from embedding_store.errors import BrokerError, LogError, UsageError
from replay import recorder
from replay.live_topics import LiveTopics, OffsetsGone
from replay.merging import Merge, Merged
from replay.oracle import read_topic
from replay.recorder import Recorder, RecorderSettings
from replay.recording import EVENTS, ITEMS, Recording
from replay.sinks import KafkaSink
from streams.events import Impression, Item
from streams.topics import TopicSettings, create_topics, delete_topics
from tests.processes import processes

KILLS = 4
MANY = RecorderSettings(rows_per_file=40, file_seconds=0.3)


@pytest.fixture
def topics(request: pytest.FixtureRequest, broker: str, topic_prefix: str) -> TopicSettings:
    """Of one partition, or of as many as the test's mark says."""
    mark = request.node.get_closest_marker("partitions")
    settings = TopicSettings(topic_prefix, mark.args[0] if mark else 1)
    create_topics(broker, settings)
    return settings


def never() -> bool:
    return False


def send(broker: str, topics: TopicSettings, numbers: range) -> None:
    """For each number an impression of two items, or a broken record; for some an item."""
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for n in numbers:
            if n % 10 == 0:
                sink.send(Item(item=n % 50, title=f"title {n}"))
            if n % 25 == 0:
                sink.send_raw(b"{", n)
            else:
                sink.send(Impression(event_id=f"e{n}", ts=n, user=n % 17, request_id=n, items=[1, 2]))


def read(broker: str, topic: str) -> list[tuple[int, int, bytes | None, int | None]]:
    """The topic, read by another client, by partition and offset."""
    return sorted(read_topic(broker, topic), key=lambda record: record[:2])


def recorded(path: Path, role: str) -> list[tuple[int, int, bytes | None, int]]:
    recording = Recording(path)
    return [
        (p, r.offset, r.value, r.stamp) for p in range(len(recording.begin(role))) for r in recording.records(role, p)
    ]


def test_it_records_to_the_end_goes_on_and_counts(broker: str, topics: TopicSettings, tmp_path: Path) -> None:
    send(broker, topics, range(100))
    done = Recorder(broker, topics, tmp_path, MANY, from_beginning=True).run(never, to_end=True)
    assert (done.events, done.records, done.items) == (4 + 2 * 96, 100, 10)
    assert done.files == len([*Recording(tmp_path).files(EVENTS), *Recording(tmp_path).files(ITEMS)])
    assert max(f.to_offset - f.from_offset for f in Recording(tmp_path).files(EVENTS)) <= 40
    send(broker, topics, range(100, 150))
    done = Recorder(broker, topics, tmp_path, MANY).run(never, to_end=True)
    assert done.records == 50
    assert recorded(tmp_path, EVENTS) == read(broker, topics.events)
    assert recorded(tmp_path, ITEMS) == read(broker, topics.items)
    assert Recorder(broker, topics, tmp_path).run(never, to_end=True).files == 0
    others = TopicSettings(f"{topics.prefix}other.")
    create_topics(broker, others)
    with pytest.raises(UsageError, match="another directory"):
        Recorder(broker, others, tmp_path)


def test_without_from_beginning_it_starts_now_and_keeps_that_start(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    send(broker, topics, range(50))
    Recorder(broker, topics, tmp_path)  # killed before it had a record
    send(broker, topics, range(50, 80))
    Recorder(broker, topics, tmp_path).run(never, to_end=True)
    new = [record for record in read(broker, topics.events) if b'"e' in (record[2] or b"")]
    assert recorded(tmp_path, ITEMS) == read(broker, topics.items), "the catalogue is whole"
    sent = {f"e{n}".encode() for n in range(50, 80) if n % 25}
    kept = [record for record in recorded(tmp_path, EVENTS) if record[2] != b"{"]
    assert kept == [r for r in new if any(b'"%s"' % name in (r[2] or b"") for name in sent)]


def _record(broker: str, topics: TopicSettings, path: str, says: Connection) -> None:
    settings = RecorderSettings(rows_per_file=50, file_seconds=0.05)
    Recorder(broker, topics, path, settings, True).run(never, progress=lambda so_far: says.send(so_far.files))


@pytest.mark.nightly
@pytest.mark.partitions(2)
def test_killed_at_random_moments_it_loses_and_doubles_nothing(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    dice = random.Random(8)
    for run in range(KILLS):
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=_record, args=(broker, topics, str(tmp_path), theirs))
        child.start()
        send(broker, topics, range(800 * run, 800 * run + 800))
        while not ours.recv():
            pass
        time.sleep(dice.uniform(0, 0.1))  # it writes some twenty files now
        child.kill()
        child.join()
        ours.close()
    kept = recorded(tmp_path, EVENTS)
    Recorder(broker, topics, tmp_path, MANY, True).run(never, to_end=True)
    assert len(kept) >= 15 * KILLS
    assert recorded(tmp_path, EVENTS) == read(broker, topics.events)
    assert recorded(tmp_path, ITEMS) == read(broker, topics.items)


def delete_before(broker: str, topic: str, offset: int) -> None:
    """As retention does."""
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.delete_records({TopicPartition(topic, 0): offset})


def test_what_kafka_had_deleted_is_a_gap_that_is_stated_and_said(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    send(broker, topics, range(40))
    Recorder(broker, topics, tmp_path, MANY, True).run(never, to_end=True)
    send(broker, topics, range(40, 100))
    delete_before(broker, topics.events, 70)
    said: list[str] = []
    done = Recorder(broker, topics, tmp_path, MANY, said=said.append).run(never, to_end=True)
    assert done.gaps == [(topics.events, 0, 40, 70)]
    assert "had deleted the records 40 to 70" in said[0]
    assert [r[1] for r in recorded(tmp_path, EVENTS)] == [*range(40), *range(70, 100)]
    assert [(g.from_offset, g.to_offset) for g in Recording(tmp_path).gaps(EVENTS)] == [(40, 70)]
    with pytest.raises(OffsetsGone, match="has deleted the records 40 to 70: raise retention"):
        LiveTopics(broker, {(topics.events, 0): 40})


def test_deleted_while_it_runs(broker: str, topics: TopicSettings, tmp_path: Path) -> None:
    send(broker, topics, range(40))
    recording = Recorder(broker, topics, tmp_path, MANY, True)
    with recording._connected() as live:
        send(broker, topics, range(40, 90))
        delete_before(broker, topics.events, 60)
        deadline = time.monotonic() + 20
        while recording._next((topics.events, 0)) < 90:
            assert time.monotonic() < deadline
            recording._read(live)
            recording._write((topics.events, 0))
    assert [gap[2:] for gap in recording.so_far.gaps] == [(0, 60)]
    assert [r[1] for r in recorded(tmp_path, EVENTS)] == list(range(60, 90))


def test_another_cluster_is_refused(broker: str, topics: TopicSettings, tmp_path: Path) -> None:
    send(broker, topics, range(40))
    Recorder(broker, topics, tmp_path, MANY, True).run(never, to_end=True)
    delete_topics(broker, topics)
    create_topics(broker, topics)
    with pytest.raises(LogError, match="of another cluster"):
        Recorder(broker, topics, tmp_path, MANY).run(never, to_end=True)
    with pytest.raises(BrokerError, match="has no topic"):
        LiveTopics(broker, {(topics.prefix + "none", 0): 0})


def test_transactions_leave_holes_and_what_was_undone_is_left_out(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    producer = KafkaProducer(bootstrap_servers=broker, transactional_id=f"{topics.prefix}t")
    producer.init_transactions()
    for value, kept in ((b"one", True), (b"undone", False), (b"two", True), (b"undone too", False)):
        producer.begin_transaction()
        producer.send(topics.events, value, partition=0)
        producer.commit_transaction() if kept else producer.abort_transaction()
    Recorder(broker, topics, tmp_path, MANY, True).run(never, to_end=True)
    assert [r[2] for r in recorded(tmp_path, EVENTS)] == [b"one", b"two"]
    producer.begin_transaction()
    producer.send(topics.events, b"three", partition=0).get(10)
    open_ = Recorder(broker, topics, tmp_path, MANY).run(never, to_end=True)
    producer.commit_transaction()
    producer.close()
    assert open_.records == 0, "it is not committed yet"
    Recorder(broker, topics, tmp_path, MANY).run(never, to_end=True)
    assert recorded(tmp_path, EVENTS) == read(broker, topics.events)


def test_files_end_with_their_hour(broker: str, topics: TopicSettings, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The broker's clock cannot be set: hours of a fifth of a second instead."""
    monkeypatch.setattr(recorder, "HOUR_MS", 200)
    first = Recorder(broker, topics, tmp_path, RecorderSettings(), True)
    for n in range(3):
        send(broker, topics, range(30 * n, 30 * n + 30))
        time.sleep(0.25)
    first.run(never, to_end=True)
    files = Recording(tmp_path).files(EVENTS)
    assert 3 <= len(files) <= 6
    stamps = [[r.stamp // 200 for r in Recording(tmp_path).records(EVENTS, 0, f.from_offset) if r.offset < f.to_offset]
              for f in files]  # fmt: skip
    assert all(len(set(some)) == 1 for some in stamps)


# --- the order in which live records come ---------------------------------------------------------------------------


def plainly_merged(path: Path) -> list[Merged]:
    """The order of `merging` as its docstring says it: all records, sorted."""
    recording, keyed = Recording(path), []
    for topic in (EVENTS, ITEMS):
        for p in range(len(recording.begin(topic))):
            largest = 0
            for record in recording.records(topic, p):
                largest = max(largest, record.stamp)
                keyed.append(((largest, topic == EVENTS, p, record.offset), Merged(topic, p, record)))
    return [merged for _, merged in sorted(keyed, key=lambda entry: entry[0])]


@pytest.mark.partitions(3)
def test_live_records_come_in_the_order_that_the_whole_recording_gives(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    """Whatever was recorded, and however they were polled: they are sent while they are read."""
    send(broker, topics, range(300))
    Recorder(broker, topics, tmp_path / "part", MANY, True).run(never, to_end=True)
    seen: list[Merged] = []
    whole = 900 + 90
    merge = Merge(
        Recording(tmp_path / "part"), lambda starts: LiveTopics(broker, starts), stop=lambda: len(seen) >= whole
    )
    rounds = iter(range(300, 900, 100))
    for merged in merge:
        seen.append(merged)
        if len(seen) > 100 and (first := next(rounds, None)) is not None:
            send(broker, topics, range(first, first + 100))
    assert merge.stopped
    assert merge.live_records >= 600
    Recorder(broker, topics, tmp_path / "whole", MANY, True).run(never, to_end=True)
    assert seen == plainly_merged(tmp_path / "whole") == list(Merge(Recording(tmp_path / "whole")))


def test_until_a_time_ends_also_where_nothing_comes(broker: str, topics: TopicSettings, tmp_path: Path) -> None:
    send(broker, topics, range(30))
    Recorder(broker, topics, tmp_path, MANY, True).run(never, to_end=True)
    last = max(r[3] for role in (EVENTS, ITEMS) for r in recorded(tmp_path, role))  # Kafka stamps them when they come
    assert len(list(Merge(Recording(tmp_path), until_ms=last + 1))) == 33
    assert len(list(Merge(Recording(tmp_path), until_ms=last))) < 33
    soon = int(time.time() * 1000) + 500
    with KafkaProducer(bootstrap_servers=broker) as producer:
        producer.send(topics.events, b"before", partition=0).get(10)
        merge = Merge(Recording(tmp_path), lambda starts: LiveTopics(broker, starts), until_ms=soon)
        assert [merged.record.value for merged in merge][-1] == b"before"
    assert time.time() * 1000 > soon
    assert not merge.stopped
