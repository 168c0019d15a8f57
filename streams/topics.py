"""The Kafka topics: their names and settings, how they are made, and the check that those in place keep the promises.

Retention is part of the rules (docs: "Moved partitions"): a worker that starts from the shared snapshot reads on from
there, so what was sent since must still be in its topic. A topic that is too short is refused at start, not found out
after a crash.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, OffsetSpec
from kafka.errors import KafkaError, for_code

from embedding_store.errors import BrokerError, UsageError
from streams.events import MAX_EVENT_BYTES
from streams.kafka_clients import KNOCK_SECONDS, Bootstrap, NotKafka, client_arguments, is_guarded, knock, servers
from streams.outlet import MAX_MESSAGE_BYTES

PURCHASE_WINDOW_MS = 3 * 24 * 3_600_000
SNAPSHOT_INTERVAL_MS = 15 * 60_000
DEAD_RETENTION_MS = 7 * 24 * 3_600_000

# 1 MiB and the 12 bytes before each batch, Kafka's default: an event of MAX_EVENT_BYTES with its key and headers fits.
MAX_RECORD_BYTES = (1 << 20) + 12
assert MAX_RECORD_BYTES > MAX_EVENT_BYTES + 32_000
# One record that moves the time can close everything that waited: such a block cannot be cut smaller.
MAX_BLOCK_BYTES = 16 << 20

# The largest that the join worker can send: whoever lets `events` take larger records still has them all here.
MAX_DEAD_BYTES = MAX_MESSAGE_BYTES

CONNECT_TIMEOUT_S = 3.0
_REQUEST_TIMEOUT_MS = 10_000
_TOPIC_EXISTS = 36
_NO_SUCH_TOPIC = 3


@dataclass(frozen=True)
class TopicSettings:
    """Which topics a set of workers uses: `prefix` goes before each name, `partitions` is of `events` and `examples`.

    Raises UsageError at construction for a prefix that Kafka cannot take or a number of partitions below 1.
    """

    prefix: str = ""
    partitions: int = 4

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,200}", self.prefix):
            raise UsageError(f"topic prefix {self.prefix!r}: use at most 200 letters, digits, dots, - and _")
        if self.partitions < 1:
            raise UsageError(f"{self.partitions} partitions: use 1 or more")

    @property
    def events(self) -> str:
        """What was shown and done; keyed by user."""
        return self.prefix + "events"

    @property
    def items(self) -> str:
        """The catalogue; keyed by item, compacted."""
        return self.prefix + "items"

    @property
    def examples(self) -> str:
        """Blocks of joined examples, partition by partition as the events they came from."""
        return self.prefix + "examples"

    @property
    def parameters(self) -> str:
        """The deltas of the model, one partition: their order is the versions'."""
        return self.prefix + "parameters"

    @property
    def events_dead(self) -> str:
        """Records of `events` that were refused, as they were, with the reason and their place in the headers."""
        return self.prefix + "events.dead"


@dataclass(frozen=True)
class _Topic:
    """`made_with`: set where we make the topic, and not asked of one that is there."""

    name: str
    partitions: int
    configs: dict[str, str]
    made_with: dict[str, str] = field(default_factory=dict)


def create_topics(
    bootstrap: Bootstrap,
    settings: TopicSettings,
    *,
    purchase_window_ms: int = PURCHASE_WINDOW_MS,
    snapshot_interval_ms: int = SNAPSHOT_INTERVAL_MS,
    join_interval_ms: int = SNAPSHOT_INTERVAL_MS,
    replication: int = 1,
) -> None:
    """Create the topics that are missing and check those that exist; several workers may do it at once.

    `snapshot_interval_ms`: of the trainer's snapshots; `join_interval_ms`: of the join stores'.

    Raises UsageError for an existing topic that does not fit (see `check_topics`), BrokerError when Kafka cannot be
    reached or refuses.
    """
    wanted = _topics(settings, purchase_window_ms, snapshot_interval_ms, join_interval_ms)
    with _admin(bootstrap) as admin:
        # Asked first: on a cluster where we may not create topics, those that its owner made are as good.
        there = {topic["name"] for topic in _described(admin, [topic.name for topic in wanted])}
        missing = {
            topic.name: {
                "num_partitions": topic.partitions,
                "replication_factor": replication,
                "configs": topic.configs | topic.made_with,
            }
            for topic in wanted
            if topic.name not in there
        }
        if missing:
            answers = admin.create_topics(missing, raise_errors=False)["topics"]
            for answer in answers:
                if answer["error_code"] not in (0, _TOPIC_EXISTS):  # exists: another worker was quicker
                    raise _refused(bootstrap, f"topic {answer['name']}", answer["error_code"], answer["error_message"])
            admin.wait_for_topics(list(missing))
        _check(admin, bootstrap, wanted)


def check_topics(
    bootstrap: Bootstrap,
    settings: TopicSettings,
    *,
    purchase_window_ms: int = PURCHASE_WINDOW_MS,
    snapshot_interval_ms: int = SNAPSHOT_INTERVAL_MS,
    join_interval_ms: int = SNAPSHOT_INTERVAL_MS,
) -> None:
    """Raise UsageError, naming the topic, its setting and what to set, unless every topic is there and fits.

    It fits if its partitions are as in `settings`, it keeps records for as long as a restart may need them, takes
    records of MAX_EVENT_BYTES, and its cleanup and timestamps are as the rules say. Raises BrokerError when Kafka
    cannot be reached.
    """
    with _admin(bootstrap) as admin:
        _check(admin, bootstrap, _topics(settings, purchase_window_ms, snapshot_interval_ms, join_interval_ms))


def delete_topics(bootstrap: Bootstrap, settings: TopicSettings) -> None:
    """Delete those of the topics that exist. Raises BrokerError when Kafka cannot be reached or refuses."""
    with _admin(bootstrap) as admin:
        names = [topic["name"] for topic in _described(admin, [topic.name for topic in _topics(settings, 0, 0, 0)])]
        if names:
            for answer in admin.delete_topics(names, raise_errors=False)["topics"]:
                if answer["error_code"] not in (0, _NO_SUCH_TOPIC):
                    raise _refused(bootstrap, f"topic {answer['name']}", answer["error_code"], answer["error_message"])


def end_offsets(bootstrap: Bootstrap, topic: str) -> dict[int, int]:
    """partition → the offset that the next record gets. Markers of transactions count: offsets may have gaps.

    Raises BrokerError when Kafka cannot be reached or has no such topic.
    """
    with _admin(bootstrap) as admin:
        described = _described(admin, [topic])
        if not described:
            raise BrokerError(f"topic {topic} does not exist at {bootstrap}: create it, or look at the topic prefix")
        partitions = [TopicPartition(topic, p["partition_index"]) for p in described[0]["partitions"]]
        found = admin.list_partition_offsets({partition: OffsetSpec.LATEST for partition in partitions})
        return {partition.partition: found[partition].offset for partition in sorted(partitions)}


def overview(bootstrap: Bootstrap, settings: TopicSettings) -> dict[str, dict[str, Any]]:
    """JSON-ready, of those of the topics that exist: partitions, configs that are set, ends, the newest stamp.

    `newest_ms`, UTC, is None where there is no record. Raises BrokerError when Kafka cannot be reached.
    """
    names = [topic.name for topic in _topics(settings, 0, 0, 0)]
    with _admin(bootstrap) as admin:
        found: dict[str, dict[str, Any]] = {}
        for topic in _described(admin, names):
            name, count = topic["name"], len(topic["partitions"])
            partitions = [TopicPartition(name, number) for number in range(count)]
            ends = admin.list_partition_offsets({p: OffsetSpec.LATEST for p in partitions})
            newest = admin.list_partition_offsets({p: OffsetSpec.MAX_TIMESTAMP for p in partitions})
            found[name] = {
                "partitions": count,
                "replicas": min(len(p["replica_nodes"]) for p in topic["partitions"]),
                "ends": {p.partition: ends[p].offset for p in partitions},
                "newest_ms": max((o.timestamp for o in newest.values() if o.timestamp >= 0), default=None),
            }
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in found]
        configs = admin.describe_configs(resources)["topic"] if resources else {}
        for name, told in found.items():
            told["configs"] = {key: config["value"] for key, config in configs.get(name, {}).items()}
        return found


def wait_for_broker(bootstrap: Bootstrap) -> None:
    """Return as soon as one of the brokers in `bootstrap` ("HOST:PORT" or several, with commas) answers us.

    Raises BrokerError after CONNECT_TIMEOUT_S, and at once where the certificate, the user or the password is
    refused; UsageError if `bootstrap` is no such list, or [kafka] names files that are not what they should be.
    """
    # Before a client is asked: they try on for their whole timeout, log each attempt, and some leave a thread.
    addresses = [_address(server, bootstrap) for server in servers(bootstrap)]
    deadline, why = time.monotonic() + CONNECT_TIMEOUT_S, ""
    while True:
        for host, port in addresses:
            left = max(0.1, deadline - time.monotonic())
            try:
                socket.create_connection((host, port), timeout=left).close()
                knock(bootstrap, host, port)
                return
            except NotKafka as error:
                why = str(error)
            except OSError:
                pass
        if time.monotonic() + 0.1 > deadline:
            raise BrokerError(why) if why else _no_answer(bootstrap)
        time.sleep(0.1)


def _topics(
    settings: TopicSettings, purchase_window_ms: int, snapshot_interval_ms: int, join_interval_ms: int
) -> list[_Topic]:
    window = purchase_window_ms + snapshot_interval_ms
    one, many = 1, settings.partitions
    items = {"cleanup.policy": "compact", "max.message.bytes": str(MAX_RECORD_BYTES)}
    stamped = {"message.timestamp.type": "LogAppendTime"}  # a replay puts items among the events by their stamps
    return [
        _Topic(settings.events, many, _kept_for(purchase_window_ms + join_interval_ms)),
        _Topic(settings.items, one, items, made_with=stamped),
        _Topic(settings.examples, many, _kept_for(window, MAX_BLOCK_BYTES)),
        _Topic(settings.parameters, one, _kept_for(3 * snapshot_interval_ms)),
        _Topic(settings.events_dead, one, _kept_for(DEAD_RETENTION_MS, MAX_DEAD_BYTES)),
    ]


def _kept_for(retention_ms: int, max_bytes: int = MAX_RECORD_BYTES) -> dict[str, str]:
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(retention_ms),
        "retention.bytes": "-1",  # or what has not been read yet goes with load, however long it is to be kept
        # A segment is dropped whole: with the default of a week, 45 minutes of retention could keep a week.
        "segment.ms": str(max(60_000, retention_ms // 4)),
        # By the broker's clock: a replay of old events, or one event from the future, must not move retention.
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": str(max_bytes),
    }


def _check(admin: KafkaAdminClient, bootstrap: Bootstrap, wanted: list[_Topic]) -> None:
    described = {topic["name"]: topic for topic in _described(admin, [topic.name for topic in wanted])}
    for topic in wanted:
        if topic.name not in described:
            raise UsageError(
                f"topic {topic.name} does not exist at {bootstrap}: run `headrace topics create`, or make it with "
                f"{topic.partitions} partitions and "
                + ", ".join(f"{key}={value}" for key, value in topic.configs.items())
            )
        found = len(described[topic.name]["partitions"])
        if found != topic.partitions:
            raise UsageError(
                f"topic {topic.name} has {found} partitions, {topic.partitions} are set: "
                f"set partitions = {found}, or choose another topic prefix"
            )
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name) for topic in wanted]
    configs = admin.describe_configs(resources, config_filter="all")["topic"]
    for topic in wanted:
        for key, needed in topic.configs.items():
            if not _fits(key, (found := configs[topic.name][key]["value"]), needed):
                raise UsageError(f"topic {topic.name} has {key}={found}: set it to {needed}{_or_more(key)}")


def _fits(key: str, found: str, needed: str) -> bool:
    if key == "retention.ms":
        return int(found) == -1 or int(found) >= int(needed)
    if key == "max.message.bytes":
        return int(found) >= int(needed)
    return key == "segment.ms" or found == needed


def _or_more(key: str) -> str:
    return " or more" if key in ("retention.ms", "max.message.bytes") else ""


def _described(admin: KafkaAdminClient, names: list[str]) -> list[dict]:
    """Those of the topics that exist."""
    return [topic for topic in admin.describe_topics(names) if topic["error_code"] != _NO_SUCH_TOPIC]


@contextmanager
def _admin(bootstrap: Bootstrap) -> Iterator[KafkaAdminClient]:
    """A client for the body; whatever Kafka or the connection does wrong in it is a BrokerError of one line."""
    wait_for_broker(bootstrap)
    try:
        admin = KafkaAdminClient(
            **client_arguments(bootstrap),
            bootstrap_timeout_ms=int(1000 * (KNOCK_SECONDS if is_guarded(bootstrap) else CONNECT_TIMEOUT_S)),
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
        )
    except KafkaError:
        raise _no_answer(bootstrap) from None
    try:
        yield admin
    except KafkaError as error:
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
        raise BrokerError(f"Kafka at {bootstrap} did not do what was asked ({reason}): look at its log") from None
    finally:
        admin.close()


def _address(server: str, bootstrap: Bootstrap) -> tuple[str, int]:
    host, _, port = server.strip().rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise UsageError(f"bootstrap {str(bootstrap)!r}: give HOST:PORT, several with commas between them")
    return host.strip("[]"), int(port)


def _no_answer(bootstrap: Bootstrap) -> BrokerError:
    return BrokerError(f"no Kafka answers at {bootstrap}: start one with `headrace broker start` or give --bootstrap")


def _refused(bootstrap: Bootstrap, what: str, code: int, message: str | None) -> BrokerError:
    reason = message or for_code(code).__name__
    return BrokerError(f"Kafka at {bootstrap} refuses {what}: {reason.splitlines()[0]}")
