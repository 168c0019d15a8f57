"""A train worker with a budget too small for its rows: when nothing new comes, or it ends, replicas get the rest."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from kafka import KafkaProducer

from embedding_store.checkpoint import CheckpointStore
from embedding_store.columns import WEIGHTS
from embedding_store.delta import Assembler, Version
from streams.blocks import encode_block
from streams.topics import TopicSettings, create_topics
from tests.online_model.logs import make_blocks, make_rows
from tests.streams.children import read_all, running, wait_for

pytestmark = pytest.mark.broker

TRAINED = 2_400


def _versions(broker: str, topics: TopicSettings) -> list[Version]:
    assembler = Assembler()
    return [v for record in read_all(broker, topics.parameters)[0] if (v := assembler.add(record.value)) is not None]


def _send(broker: str, topics: TopicSettings, first: int, stop: int) -> None:
    producer = KafkaProducer(bootstrap_servers=broker, linger_ms=0)
    for block in make_blocks(make_rows(TRAINED, users=500, items=300), 60)[first:stop]:
        producer.send(topics.examples, encode_block(block), partition=0)
    producer.close()


def _weights(versions: list[Version]) -> dict[tuple[str, int], bytes]:
    """What a replica that applied all of them has."""
    return {
        (table, i): rows.columns[WEIGHTS][n].tobytes()
        for version in versions
        for table, rows in version.tables.items()
        for n, i in enumerate(rows.ids.tolist())
    }


@pytest.mark.parametrize("refresh_s", [3.0, 3_600.0])
def test_a_quiet_stream_and_an_orderly_end_leave_nothing_owed(
    refresh_s: float, broker: str, topic_prefix: str, tmp_path: Path
) -> None:
    topics = TopicSettings(prefix=topic_prefix, partitions=1)
    create_topics(broker, topics)
    budget = {"row_bytes_per_s": 2_000, "refresh_s": refresh_s, "features": {"dim": 8}, "batch_size": 256}
    settings = {
        "bootstrap": broker, "data_dir": tmp_path / "data", "model": budget, "device": "cpu",
        "topics": {"prefix": topics.prefix, "partitions": 1},
    }  # fmt: skip

    def last() -> Version | None:
        return max(_versions(broker, topics), key=lambda v: v.sequence, default=None)

    with running("train", tmp_path / "log", **settings) as child:
        _send(broker, topics, 0, 20)
        wait_for(lambda: (v := last()) and v.info["trained_rows"] == TRAINED // 2, child=child)
        _send(broker, topics, 20, 40)  # after the first version, which holds everything
        wait_for(lambda: (v := last()) and v.info["owed"]["rows"], child=child)
        wait_for(lambda: (v := last()) and v.info["trained_rows"] == TRAINED and not v.dense, child=child)
        if refresh_s < 60:
            wait_for(lambda: (v := last()) and not v.info["owed"]["rows"], child=child)
        assert child.stop() == 0, child.said
    versions = _versions(broker, topics)
    assert versions[-1].info["owed"] == {"rows": 0, "oldest_ms": 0}
    assert all(b.base == (a.epoch, a.sequence) for a, b in pairwise(versions))
    with CheckpointStore(tmp_path / "data" / "train", None, read_only=True) as store:
        stored = [Version(1, 1, tables={t: rows}) for t in store.layouts for rows in store.iter_rows(t)]
        assert _weights(versions) == _weights(stored)
