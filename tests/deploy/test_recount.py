"""The recount of `events` after a demo or a replay: exact, or not at all."""

from __future__ import annotations

from contextlib import closing

from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from deploy.recount import figures_of, recounted, said_of
from deploy.replica_figures import Model
from deploy.settings import Settings
from streams.topics import TopicSettings


def test_what_kafka_has_deleted_nobody_recounts(broker: str, topics: TopicSettings) -> None:
    settings = Settings([]).with_flags({"bootstrap": broker, "topics.prefix": topics.prefix, "topics.partitions": 1})
    with closing(KafkaProducer(bootstrap_servers=broker)) as producer:
        for _ in range(5):
            producer.send(topics.events, b"no event")
        producer.flush()
    verdict = recounted(settings, Model(), {0: 5})
    assert verdict is not None
    assert verdict.balance["rejected"] == 5
    assert figures_of(verdict)["lost"] == 0
    with closing(KafkaAdminClient(bootstrap_servers=broker)) as admin:
        admin.delete_records({TopicPartition(topics.events, 0): 2})
    assert recounted(settings, Model(), {0: 5}) is None
    result = {"trained_examples": 1_234, **figures_of(None)}
    assert said_of(result).startswith("1,234 learned; Kafka has deleted the beginning")
