"""Topics on a real Kafka: made once, checked ever after; and errors that say what to do, soon."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from kafka import KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError

from deploy.processes import free_port
from embedding_store.errors import BrokerError, UsageError
from streams.events import MAX_EVENT_BYTES
from streams.topics import (
    SNAPSHOT_INTERVAL_MS,
    TopicSettings,
    check_topics,
    create_topics,
    delete_topics,
    end_offsets,
    wait_for_broker,
)

pytestmark = pytest.mark.partitions(3)


def configs(bootstrap: str, topic: str) -> dict[str, str]:
    with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic)
        found = admin.describe_configs([resource], config_filter="all")["topic"][topic]
    return {key: value["value"] for key, value in found.items()}


def set_config(bootstrap: str, topic: str, key: str, value: str) -> None:
    with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {key: value})])
    deadline = time.monotonic() + 10
    while configs(bootstrap, topic)[key] != value:  # the broker learns it from the controller a little later
        assert time.monotonic() < deadline


def test_topics_are_made_as_the_rules_ask(broker: str, topics: TopicSettings) -> None:
    assert topics.events_dead.endswith(".events.dead")
    names = (topics.events, topics.items, topics.examples, topics.parameters, topics.events_dead)
    assert [len(end_offsets(broker, name)) for name in names] == [3, 1, 3, 1, 1]
    events = configs(broker, topics.events)
    assert events["message.timestamp.type"] == "LogAppendTime"
    assert int(events["retention.ms"]) >= 3 * 86_400_000 + SNAPSHOT_INTERVAL_MS
    assert int(configs(broker, topics.parameters)["retention.ms"]) == 3 * SNAPSHOT_INTERVAL_MS
    items = configs(broker, topics.items)
    assert (items["cleanup.policy"], items["message.timestamp.type"]) == ("compact", "LogAppendTime")


def test_creating_again_changes_nothing_and_delete_removes_them(broker: str, topics: TopicSettings) -> None:
    with KafkaProducer(bootstrap_servers=broker) as producer:
        producer.send(topics.events, b"kept", partition=1).get(10)
    create_topics(broker, topics)
    check_topics(broker, topics)
    assert end_offsets(broker, topics.events) == {0: 0, 1: 1, 2: 0}
    delete_topics(broker, topics)
    delete_topics(broker, topics)
    with pytest.raises(UsageError, match="does not exist"):
        check_topics(broker, topics)
    with pytest.raises(BrokerError, match="does not exist"):
        end_offsets(broker, topics.events)


def test_workers_may_create_them_at_the_same_time(broker: str, topic_prefix: str) -> None:
    failed: list[BaseException] = []

    def create() -> None:
        try:
            create_topics(broker, TopicSettings(topic_prefix))
        except (BrokerError, UsageError) as error:
            failed.append(error)

    workers = [threading.Thread(target=create) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == []
    check_topics(broker, TopicSettings(topic_prefix))


def test_another_number_of_partitions_is_refused(broker: str, topics: TopicSettings) -> None:
    with pytest.raises(UsageError) as error:
        create_topics(broker, TopicSettings(topics.prefix, partitions=4))
    assert f"{topics.events} has 3 partitions" in str(error.value)
    assert "partitions = 3" in str(error.value)


def test_a_limit_of_bytes_is_refused_as_it_takes_what_was_not_read(broker: str, topics: TopicSettings) -> None:
    set_config(broker, topics.examples, "retention.bytes", str(1 << 30))
    with pytest.raises(UsageError, match=rf"examples has retention\.bytes={1 << 30}: set it to -1$"):
        check_topics(broker, topics)


def test_retention_that_does_not_cover_the_rules_is_refused(broker: str, topics: TopicSettings) -> None:
    week = 7 * 86_400_000
    with pytest.raises(UsageError) as error:
        check_topics(broker, topics, purchase_window_ms=week)
    assert f"{topics.events} has retention.ms=" in str(error.value)
    assert f"set it to {week + SNAPSHOT_INTERVAL_MS} or more" in str(error.value)
    set_config(broker, topics.events, "retention.ms", "-1")
    set_config(broker, topics.examples, "retention.ms", str(week + SNAPSHOT_INTERVAL_MS))
    check_topics(broker, topics, purchase_window_ms=week)
    with pytest.raises(UsageError, match=rf"parameters has retention\.ms=.* set it to {6 * SNAPSHOT_INTERVAL_MS} or"):
        check_topics(broker, topics, snapshot_interval_ms=2 * SNAPSHOT_INTERVAL_MS)
    set_config(broker, topics.events, "retention.ms", str(week + SNAPSHOT_INTERVAL_MS))
    with pytest.raises(UsageError, match=rf"events has retention\.ms=.* set it to {week + 2 * SNAPSHOT_INTERVAL_MS}"):
        check_topics(broker, topics, purchase_window_ms=week, join_interval_ms=2 * SNAPSHOT_INTERVAL_MS)


def test_events_that_are_not_timed_by_the_broker_are_refused(broker: str, topics: TopicSettings) -> None:
    set_config(broker, topics.events, "message.timestamp.type", "CreateTime")
    with pytest.raises(UsageError, match=r"events has message\.timestamp\.type=CreateTime: set it to LogAppendTime"):
        check_topics(broker, topics)


def test_the_largest_event_fits_with_its_key(broker: str, topics: TopicSettings) -> None:
    with KafkaProducer(bootstrap_servers=broker, max_request_size=4 << 20) as producer:
        producer.send(topics.events, b"x" * MAX_EVENT_BYTES, key=b"k" * 256).get(10)
        with pytest.raises(KafkaError):
            producer.send(topics.events, b"x" * (MAX_EVENT_BYTES + 50_000)).get(10)


@pytest.mark.parametrize("what", ["a closed port", "a server that says nothing", "no such host"])
def test_where_no_kafka_answers_the_error_is_one_line_within_seconds(
    what: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    threads = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        bootstrap = {
            "a closed port": f"127.0.0.1:{free_port()}",
            "a server that says nothing": f"127.0.0.1:{silent.getsockname()[1]}",
            "no such host": "no-such-host.invalid:9092",
        }[what]
        began = time.monotonic()
        with pytest.raises(BrokerError) as error:
            create_topics(bootstrap, TopicSettings())
    assert time.monotonic() - began < 15
    assert str(error.value) == (
        f"no Kafka answers at {bootstrap}: start one with `headrace broker start` or give --bootstrap"
    )
    assert capfd.readouterr() == ("", "")
    if what != "a server that says nothing":  # there kafka-python has to be asked, which logs and leaves a thread
        assert caplog.records == []
        assert threading.active_count() == threads


def test_a_broker_that_is_up_is_not_waited_for(broker: str) -> None:
    began = time.monotonic()
    wait_for_broker(f"127.0.0.1:{free_port()},{broker}")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("bootstrap", ["", "nonsense", "host:port", ":9092", "host:0", "a:1,b"])
def test_a_bootstrap_that_is_no_address_is_wrong_usage(bootstrap: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        wait_for_broker(bootstrap)


@pytest.mark.parametrize("wrong", [{"prefix": "a b"}, {"prefix": "x" * 201}, {"partitions": 0}])
def test_settings_are_checked_at_construction(wrong: dict) -> None:
    with pytest.raises(UsageError):
        TopicSettings(**wrong)
