"""A broker that dies while a log is read: who reads says so, and does not wait for what will not come."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kafka import KafkaProducer

from deploy.broker import Broker
from deploy.recount import told_of_kafka
from deploy.settings import Settings
from embedding_store.errors import BrokerError
from replay import dead, live_topics, oracle
from streams.topics import TopicSettings, create_topics

RECORDS, BYTES = 60, 900_000  # more than a client fetches at once
TOPICS = TopicSettings(prefix="away.", partitions=1)


def live(bootstrap: str) -> Iterator[Any]:
    with live_topics.LiveTopics(bootstrap, {(TOPICS.events_dead, 0): 0}) as topics:
        while True:
            for _, records in topics.poll(0.2):
                yield from records


def recounted(bootstrap: str) -> Iterator[Any]:
    with told_of_kafka(Settings([]).with_flags({"bootstrap": bootstrap})):
        yield from oracle.read_topic(bootstrap, TOPICS.events_dead)


def letters(bootstrap: str) -> Iterator[Any]:
    with dead.NewLetters(bootstrap, TOPICS, again=True) as topic:
        yield from topic


READERS: list[Callable[[str], Iterator[Any]]] = [recounted, letters, live]


def test_who_reads_a_log_whose_broker_dies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((oracle, "SILENT_S"), (dead, "OUTAGE_SECONDS"), (live_topics, "OUTAGE_SECONDS")):
        monkeypatch.setattr(module, name, 2.0)
    monkeypatch.setattr(live_topics, "QUIET_SECONDS", 0.5)
    with Broker.start(tmp_path) as broker:
        create_topics(broker.bootstrap, TOPICS)
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap, max_request_size=2 * BYTES)
        for _ in range(RECORDS):
            producer.send(TOPICS.events_dead, os.urandom(BYTES))
        producer.flush()
        producer.close()
        reading = [reader(broker.bootstrap) for reader in READERS]
        for records in reading:
            next(records)
        process = psutil.Process(broker.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        for records in reading:
            with pytest.raises(BrokerError, match=r"broker status|does not answer"):
                assert sum(1 for _ in records) < RECORDS - 1
