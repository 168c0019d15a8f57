"""From a backfill to the live stream, on a real Kafka: nothing is lost, nothing learned twice, whatever is killed."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, TopicPartition

from embedding_store.delta import Assembler, Version
from embedding_store.faults import VARIABLE
from online_model.examples import Counts, ExamplesDigest
from replay import backfill as backfilling
from replay.backfill import Task, backfill, join_locally, ranges_of
from replay.oracle import Rules, compare, expect, read_topic
from replay.recording import EVENTS, HOUR_MS, ITEMS, Recorded, RecordedTopic, Recording, RecordingWriter
from streams.backfill import Manifest, Origin
from streams.blocks import decode_block
from streams.events import Item, encode
from streams.join_snapshots import settings_hash
from streams.joiner import JoinSettings
from streams.topics import TopicSettings, create_topics, delete_topics, end_offsets
from tests.streams.children import Child, convert, read_all, running, wait_for
from tests.streams.joining import JOIN, PARTITIONS, Players

pytestmark = [pytest.mark.broker, pytest.mark.partitions(PARTITIONS)]

SETTINGS = convert(JOIN, JoinSettings)
MODEL = {"features": {"dim": 8, "users": 4_000, "items": 4_000, "categories": 100}, "batch_size": 64}
KILLED = "commit.written:2"


def _record(broker: str, topics: TopicSettings, path: Path) -> Recording:
    """What is in the topic of events now, and a catalogue."""
    about = {EVENTS: RecordedTopic(topics.events, (0,) * PARTITIONS), ITEMS: RecordedTopic(topics.items, (0,))}
    writer = RecordingWriter(path, about)
    for partition, records in read_all(broker, topics.events).items():
        for _, some in itertools.groupby(records, key=lambda record: record.timestamp // HOUR_MS):
            rows = [Recorded(r.offset, r.timestamp, r.key, r.value) for r in some]
            writer.write(EVENTS, partition, writer.next_offset(EVENTS, partition), rows[-1].offset + 1, rows)
    items = [Recorded(n, 0, str(n).encode(), encode(Item(item=n, title=f"item {n}"))) for n in range(40)]
    writer.write(ITEMS, 0, 0, len(items), items)
    return Recording(path)


def _backfill(recording: Recording, topics: TopicSettings, out: Path, join: JoinSettings = SETTINGS) -> Manifest:
    origin = Origin(topics.events, [recording.path], settings_hash(join), join)
    return backfill(Task(str(out), origin, ranges_of(recording, before_the_topic=False)), recording, join_locally)


@pytest.fixture
def made(broker: str, topics: TopicSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A backfill of what users did so far, in small blocks."""
    monkeypatch.setattr(backfilling, "SLICE", 50)
    Players(broker, topics.events, 1, 1_500, pause=0.001, last=False).play()
    return _backfill(_record(broker, topics, tmp_path / "recording"), topics, tmp_path / "backfill")


def _newest(broker: str, topics: TopicSettings) -> Version | None:
    assembler = Assembler()
    found = [v for record in read_all(broker, topics.parameters)[0] if (v := assembler.add(record.value)) is not None]
    return found[-1] if found else None


def _has_all(broker: str, topics: TopicSettings) -> bool:
    newest, ends = _newest(broker, topics), end_offsets(broker, topics.events)
    return newest is not None and {int(p): at for p, at in newest.positions.items()} == ends


def _check(broker: str, topics: TopicSettings, made: Manifest) -> None:
    """By the oracle: what was learned, and the balance. By the digest: backfill and topic together are the examples."""
    newest = _newest(broker, topics)
    assert newest is not None
    about = newest.info["partitions"]
    trained = {int(p): (at["rows"], at["sum"]) for p, at in about.items()}
    expected = expect(read_topic(broker, topics.events), Rules.of(SETTINGS))
    verdict = compare(expected, trained)
    assert (verdict.lost, verdict.duplicated, verdict.differing) == (0, 0, [])
    counts: dict[int, Counts] = {}
    live = ExamplesDigest()
    for partition, records in read_all(broker, topics.examples).items():
        at = made.parts[partition].next_offset
        for record in records:
            block = decode_block(record.value)
            assert block.from_offset == at, "the topic begins where the backfill ends"
            at, counts[partition] = block.to_offset, block.counts
            live.add(block.examples)
    assert sum(part.rows for part in made.parts) + live.rows == verdict.expected_rows
    assert live.rows > 1_000
    for name, wanted in verdict.balance.items():
        assert sum(getattr(count, name) for count in counts.values()) == wanted, name


@pytest.mark.nightly
def test_a_trainer_begins_with_a_backfill_and_goes_on_with_the_stream_though_it_is_killed_in_both(
    broker: str, topics: TopicSettings, made: Manifest, tmp_path: Path
) -> None:
    shared = {
        "bootstrap": broker, "data_dir": tmp_path / "data", "backfill": str(tmp_path / "backfill"),
        "topics": {"prefix": topics.prefix, "partitions": PARTITIONS},
    }  # fmt: skip
    train = Child(
        "train", tmp_path / "train.log", {VARIABLE: KILLED}, **shared, model=MODEL, device="cpu"
    )  # fmt: skip
    assert train.wait(60) == -signal.SIGKILL, train.said
    assert "learning the backfill" in train.said
    assert "going on from the backfill" not in train.said, "killed in its middle"
    with running("join", tmp_path / "join.log", **shared, join=JOIN) as join:
        with running("train", tmp_path / "train.log", **shared, model=MODEL, device="cpu") as child:
            wait_for(lambda: "training on partitions" in child.says, child=child)
            Players(broker, topics.events, 2, 300, pause=0.01, last=False).play()
            child.fail_if_ended()
            child.kill()  # after the hand-over
            join.kill()
            Players(broker, topics.events, 3, 200, pause=0.01).play()
            child.start()
            join.start()
            wait_for(lambda: _has_all(broker, topics), 90, child)
            assert child.stop() == 0, child.said
        assert join.stop() == 0, join.said
    assert join.said.count("going on from the backfill at") == PARTITIONS, "once each: it is behind only then"
    _check(broker, topics, made)


def test_a_topic_that_does_not_go_on_where_the_backfill_ends_is_refused(
    broker: str, topics: TopicSettings, made: Manifest, tmp_path: Path
) -> None:
    """Retention has deleted what comes next, or the topic is another one."""
    about = {"prefix": topics.prefix, "partitions": PARTITIONS}
    shared = {"bootstrap": broker, "backfill": str(tmp_path / "backfill"), "topics": about, "join": JOIN}
    delete_topics(broker, topics)
    create_topics(broker, topics)
    with running("join", tmp_path / "empty.log", data_dir=tmp_path / "empty", **shared) as join:
        assert join.wait(60) == 1, join.said
        assert "Kafka has records from 0 to 0: make one that ends there" in join.said
    Players(broker, topics.events, 2, 3_000, pause=0.001, last=False).play()
    place = {TopicPartition(topics.events, p): made.parts[p].next_offset + 1 for p in range(PARTITIONS)}
    client = KafkaAdminClient(bootstrap_servers=broker)
    client.delete_records(place)
    client.close()
    with running("join", tmp_path / "short.log", data_dir=tmp_path / "short", **shared) as join:
        assert join.wait(60) == 1, join.said
        at = next(part.next_offset for part in made.parts if f"partition {part.partition}:" in join.said)
        assert f"ends at {at}, Kafka has records from {at + 1} to" in join.said
