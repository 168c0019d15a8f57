"""What is refused is kept whole, with its place and reason, and what stands between it is joined."""

from __future__ import annotations

import os
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from deploy.processes import free_port
from online_model.examples import Block
from replay.oracle import Rules, expect
from replay.sinks import KafkaSink
from streams.blocks import decode_block
from streams.dead_letters import DeadLetter
from streams.events import MAX_EVENT_BYTES, REASONS, Tick, encode
from streams.joiner import Joiner, Record
from streams.topics import MAX_RECORD_BYTES, TopicSettings, create_topics
from tests.streams.children import read_all, running, wait_for
from tests.streams.mutations import MUTATED, bad_between_good

BAD, PARTITIONS = int(os.environ.get("MUTATED_RECORDS", "20000")), 2
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


def _send(broker: str, topics: TopicSettings) -> set[bytes]:
    """Mutated records between good ones, and what only Kafka can hold; returns the good ones."""
    log = bad_between_good(BAD, int(time.time() * 1000))[:-1]
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for n, (_, stamp, value) in enumerate(log):
            time.sleep(max(0.0, stamp / 1000 - time.time()))  # as time goes: not of the future, and not late
            sink.send_raw(value, n // 25)  # a page view, whole
    ahead = encode(Tick(event_id="ahead", ts=int(time.time() * 1000) + 3_600_000))
    odd = [(b"key", None), *[(None, v) for v in (ahead, b"x" * MAX_EVENT_BYTES, b"x" * (MAX_RECORD_BYTES - 100))]]
    with closing(KafkaProducer(bootstrap_servers=broker, max_request_size=2 * MAX_RECORD_BYTES)) as producer:
        for key, value in odd:
            producer.send(topics.events, value, key=key, partition=1).get(10)
    return {value for good, _, value in log if good}


def _metrics(port: int, name: str, label: str) -> Counter[str]:
    """label → sum of the samples of that name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: Counter[str] = Counter()
    for sample in (sample for family in families for sample in family.samples if sample.name == name):
        found[sample.labels[label]] += int(sample.value)
    return found


def _all_joined(port: int) -> bool:
    balance = _metrics(port, "headrace_join_events", "outcome")
    return balance["events_in"] > BAD and balance["open"] == 0


@pytest.mark.broker
def test_mutated_records_are_kept_whole_and_all_between_them_are_joined(
    broker: str, topic_prefix: str, tmp_path: Path
) -> None:
    topics = TopicSettings(prefix=topic_prefix, partitions=PARTITIONS)
    create_topics(broker, topics)
    good = _send(broker, topics)
    port = free_port()
    about = {"prefix": topics.prefix, "partitions": PARTITIONS}
    with running(
        "join", tmp_path / "log", bootstrap=broker, data_dir=tmp_path / "data", topics=about,
        join=msgspec.to_builtins(MUTATED), ticks="live", metrics_port=port,
    ) as child:  # fmt: skip
        wait_for(lambda: "joining partitions" in child.said, child=child)
        wait_for(lambda: _all_joined(port), 300, child=child)
        metric = _metrics(port, "headrace_join_rejected_total", "reason")
        assert child.stop() == 0, child.said

    blocks = {p: [decode_block(r.value) for r in records] for p, records in read_all(broker, topics.examples).items()}
    events = {
        p: [record for record in records if record.offset < blocks[p][-1].to_offset]
        for p, records in read_all(broker, topics.events).items()
    }
    _check_rows(events, blocks, good)
    where = {(p, record.offset): record for p, records in events.items() for record in records}
    dead = [DeadLetter.of(r.headers, r.value) for r in read_all(broker, topics.events_dead)[0]]
    assert len({(letter.partition, letter.offset) for letter in dead}) == len(dead)
    assert len(dead) == sum(blocks[p][-1].counts.rejected for p in blocks) > BAD / 2
    for letter in dead:
        record = where[letter.partition, letter.offset]
        assert (letter.value, letter.timestamp_ms) == (record.value, record.timestamp)
    assert {reason: sum(letter.reason == reason for letter in dead) for reason in REASONS} == metric
    assert all(metric.values())


def _check_rows(events: dict[int, list], blocks: dict[int, list[Block]], good: set[bytes]) -> None:
    """Balance and rows are the oracle's, and all rows of a log of the good records alone are among them."""
    read = ((p, record.offset, record.value, record.timestamp) for p, records in events.items() for record in records)
    for partition, want in expect(read, Rules.of(MUTATED)).items():
        counts = blocks[partition][-1].counts
        assert {name: getattr(counts, name) for name in want.balance} == want.balance
        rows = np.concatenate([block.examples.row_id for block in blocks[partition]])
        assert (len(rows), int(rows.astype(np.uint64).sum(dtype=np.uint64))) == (want.rows, want.sum)
        alone = Joiner(MUTATED, partition).process(
            Record(r.offset, r.timestamp, r.value)
            for r in events[partition]
            if r.value in good or (r.value or b"").startswith(b'{"kind":"tick","event_id":"tick-')
        )
        assert set(alone.block.examples.row_id.tolist()) <= set(rows.tolist())
        assert alone.block.counts.joined > BAD // 8
        assert alone.block.counts.joined == 7 * alone.block.counts.history_only  # but the favourites
        assert alone.block.counts.late == alone.block.counts.rejected == alone.block.counts.open == 0
