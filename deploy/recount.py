"""The oracle's recount of `events` beside what a model has learned of it: of a demo, and of a replay onto Kafka."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kafka.errors import KafkaError

from deploy.replica_figures import Model
from deploy.settings import Settings
from embedding_store.errors import BrokerError
from replay.live_topics import offsets
from replay.oracle import Rules, Verdict, compare, expect, read_topic
from streams.kafka_clients import client_arguments


def recounted(settings: Settings, model: Model, until: dict[int, int]) -> Verdict | None:
    """What the oracle makes of `events` up to these offsets, held against what the model has learned. None where Kafka
    has deleted records: what came of them nobody can recount. Raises BrokerError."""
    topic = settings.topics.events
    if any(offsets(settings.connection, topic, beginning=True)):
        return None
    with told_of_kafka(settings):
        records = read_topic(client_arguments(settings.connection), topic, until)
        return compare(expect(records, Rules.of(settings.join.join), model.set_aside), model.trained)


@contextmanager
def told_of_kafka(settings: Settings) -> Iterator[None]:
    """What the oracle's own client says of Kafka becomes a BrokerError."""
    try:
        yield
    except KafkaError as error:
        where = settings.connection.bootstrap
        raise BrokerError(f"Kafka at {where} does not answer ({error}): see `headrace broker status`") from error


def figures_of(verdict: Verdict | None) -> dict[str, Any]:
    """The keys of a result that are the oracle's; all None where it could not recount."""
    if verdict is None:
        return dict.fromkeys(("examples", "lost", "duplicated", "oracle_balance"))
    return {
        "examples": verdict.expected_rows, "lost": verdict.lost, "duplicated": verdict.duplicated,
        "oracle_balance": verdict.balance,
    }  # fmt: skip


def said_of(result: Mapping[str, Any]) -> str:
    """Of a result, in a line.

    >>> said_of({"examples": 1_200, "trained_examples": 1_200, "lost": 0, "duplicated": 0})
    '1,200 examples, 1,200 learned, 0 lost, 0 duplicated'
    >>> said_of({"examples": 9, "trained_examples": 9, "left_out": 4, "lost": 0, "duplicated": 0})
    '9 examples, 9 learned, but 4 of them left out for their loss (see the log), 0 lost, 0 duplicated'
    """
    learned = f"{result['trained_examples']:,} learned"
    if result.get("left_out"):
        learned += f", but {result['left_out']:,} of them left out for their loss (see the log)"
    if result["examples"] is None:
        return f"{learned}; Kafka has deleted the beginning of `events`, so nobody can recount it"
    return f"{result['examples']:,} examples, {learned}, {result['lost']} lost, {result['duplicated']} duplicated"
