"""What is refused is kept whole, with its place and reason, and what stands between it is joined."""

from __future__ import annotations

import socket
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from replay.oracle import Rules, expect
from replay.sinks import KafkaSink
from streams.blocks import decode_block
from streams.dead_letters import DeadLetter
from streams.events import MAX_EVENT_BYTES, REASONS
from streams.topics import MAX_RECORD_BYTES, TopicSettings, create_topics
from tests.streams.children import group_offsets, read_all, running, wait_for
from tests.streams.mutations import MUTATED, bad_between_good

BAD, PARTITIONS = 20_000, 2
JOIN = {"disorder_ms": MUTATED.disorder_ms, "wait_ms": MUTATED.wait_ms, "open_ms": MUTATED.open_ms,
        "future_ms": MUTATED.future_ms}  # fmt: skip
numbers = st.integers(0, 1 << 62)
letters = st.builds(
    DeadLetter, st.sampled_from(sorted(REASONS)), st.text(st.characters(codec="utf-8")), numbers, numbers,
    st.none() | numbers, st.none() | st.binary(),
)  # fmt: skip


@given(letters)
def test_a_letter_comes_back_from_its_headers(letter: DeadLetter) -> None:
    assert DeadLetter.of(letter.headers(), letter.value) == letter


def test_a_record_that_is_no_letter_is_told() -> None:
    with pytest.raises(ValueError, match="reason"):
        DeadLetter.of([("offset", b"1")], b"")


def _send(broker: str, topics: TopicSettings) -> int:
    """Mutated records between good ones, and what only Kafka can hold; how many."""
    log = bad_between_good(BAD, int(time.time() * 1000) - BAD // 4)
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for n, (_, _, value) in enumerate(log[:-1]):
            sink.send_raw(value, n // 5)
    producer = KafkaProducer(bootstrap_servers=broker, max_request_size=2 * MAX_RECORD_BYTES)
    odd = [(b"key", None), (None, b""), (None, b"x" * MAX_EVENT_BYTES), (None, b"x" * (MAX_RECORD_BYTES - 100))]
    for key, value in odd:
        producer.send(topics.events, value, key=key, partition=1).get(10)
    for partition in range(PARTITIONS):
        producer.send(topics.events, log[-1][2], partition=partition).get(10)  # of the future: refused too
    producer.close()
    return len(log) - 1 + len(odd) + PARTITIONS


def _refused_by_reason(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [s for family in families for s in family.samples if s.name == "headrace_join_rejected_total"]
    return {sample.labels["reason"]: sample.value for sample in samples}


@pytest.mark.broker
def test_mutated_records_are_kept_whole_and_all_between_them_are_joined(
    broker: str, topic_prefix: str, tmp_path: Path
) -> None:
    topics = TopicSettings(prefix=topic_prefix, partitions=PARTITIONS)
    create_topics(broker, topics)
    sent = _send(broker, topics)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"prefix": topics.prefix, "partitions": PARTITIONS}
    with running(
        "join", tmp_path / "log", bootstrap=broker, data_dir=tmp_path / "data", topics=about, join=JOIN, ticks="log",
        metrics_port=port,
    ) as child:  # fmt: skip
        group = f"{topics.prefix}headrace-join.store"
        wait_for(lambda: sum(o or 0 for o in group_offsets(broker, group, topics.events, PARTITIONS)) == sent,
                 child=child)  # fmt: skip
        metric = wait_for(lambda: sum((told := _refused_by_reason(port)).values()) > BAD / 2 and told, child=child)
        assert child.stop() == 0, child.said

    events = read_all(broker, topics.events)
    expected = expect(
        ((p, record.value, record.timestamp) for p, records in events.items() for record in records), Rules.of(MUTATED)
    )
    blocks = {p: [decode_block(r.value) for r in records] for p, records in read_all(broker, topics.examples).items()}
    for partition, want in expected.items():
        got = [block.examples.row_id for block in blocks[partition]]
        assert sum(map(len, got)) == want.rows > BAD // 20
        assert sum(int(ids.astype("uint64").sum()) for ids in got) % (1 << 64) == want.sum
        counts = blocks[partition][-1].counts
        assert {name: getattr(counts, name) for name in want.balance} == want.balance

    where = {(p, record.offset): record for p, records in events.items() for record in records}
    dead = [DeadLetter.of(r.headers, r.value) for r in read_all(broker, topics.events_dead)[0]]
    assert len({(letter.partition, letter.offset) for letter in dead}) == len(dead)
    assert len(dead) == sum(want.balance["rejected"] for want in expected.values()) > BAD / 2
    for letter in dead:
        record = where[letter.partition, letter.offset]
        assert (letter.value, letter.timestamp_ms) == (record.value, record.timestamp)
    assert {reason: sum(letter.reason == reason for letter in dead) for reason in REASONS} == metric
    assert all(metric.values())
