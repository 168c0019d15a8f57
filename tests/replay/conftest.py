"""Where the public logs are, and a topic to play into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition

from streams.topics import TopicSettings, create_topics, end_offsets
from tests.public_logs import DATA


@pytest.fixture
def public_log() -> Callable[[str], Path]:
    """The path of a public log by its place in HEADRACE_DATA; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        if not (DATA / name).is_file():
            pytest.skip(f"{name} is not in {DATA}: set HEADRACE_DATA to the folder of the public logs")
        return DATA / name

    return find


@pytest.fixture
def topics(broker: str, topic_prefix: str) -> TopicSettings:
    settings = TopicSettings(topic_prefix, partitions=4)
    create_topics(broker, settings)
    return settings


@pytest.fixture
def read_topic(broker: str) -> Callable[[str], list[tuple[int, bytes | None, bytes]]]:
    """All (partition, key, value) of a topic, each partition's in order."""

    def read(topic: str) -> list[tuple[int, bytes | None, bytes]]:
        ends = {TopicPartition(topic, p): end for p, end in end_offsets(broker, topic).items()}
        with KafkaConsumer(
            bootstrap_servers=broker, enable_auto_commit=False, auto_offset_reset="earliest"
        ) as consumer:
            consumer.assign(list(ends))
            found: list[tuple[int, bytes | None, bytes]] = []
            while any(consumer.position(p) < end for p, end in ends.items()):
                for records in consumer.poll(1000).values():
                    found += [(r.partition, r.key, r.value) for r in records]
            return found

    return read
