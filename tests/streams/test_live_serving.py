"""A served replica and the topic `events`: it hears what users do, and tells what it has shown."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from aiokafka.partitioner import murmur2
from kafka import KafkaProducer
from prometheus_client import CollectorRegistry

from embedding_store.ids import feature_id
from online_model.history import Kind, UserHistory, history_hash
from online_model.serving.api import Context, Ranked, Ranking, RankRequest, Recommendation, RecommendRequest, Shown
from streams import impressions
from streams.events import Impression, decode, encode
from streams.impressions import ImpressionLog, impression_of
from streams.settings import ServeWorkerSettings
from streams.topics import TopicSettings, create_topics
from tests.streams.children import read_all, wait_for
from tests.streams.test_serve_worker import Source, served, settings, source

__all__ = ["served", "settings", "source"]  # fixtures

NOW = 1_700_000_000_000
ABOUT: dict[str, Any] = {
    "request_id": "r", "model_version": "1.2", "model_age_ms": 1, "learned_to_ms": 2, "feature_hash": -5,
    "moment_ms": NOW, "arm": "b", "degraded": False,
}  # fmt: skip


def shown(*propensities: float | None) -> list[Shown]:
    return [Shown(f"i{n}", 1.0, 0.1, 0, 0, None, n, propensity) for n, propensity in enumerate(propensities)]


def test_an_impression_says_what_was_shown_where_and_how_likely() -> None:
    asked = RecommendRequest("u", "search", Context("red shoes"), 2)
    assert impression_of(asked, Recommendation(**ABOUT, candidates=9, items=shown(0.5, 0.25))) == Impression(
        event_id="r", user="u", ts=NOW, scenario="search", request_id="r", items=["i0", "i1"], positions=[0, 1],
        propensities=[0.5, 0.25], model_version="1.2", feature_hash=-5, context={"query": "red shoes", "arm": "b"},
    )  # fmt: skip
    unsure = impression_of(asked, Recommendation(**ABOUT, candidates=9, items=shown(0.5, None)))
    assert unsure is not None
    assert unsure.propensities is None


def test_only_what_is_shown_is_an_impression() -> None:
    page = Recommendation(**ABOUT, candidates=9, items=shown(0.5, 0.25))
    assert impression_of(RecommendRequest("u", log=False), page) is None
    ranking = Ranking(**ABOUT, items=[Ranked(item, 1.0, 0.1, 0, 0) for item in ("x", 7, "y")])
    assert impression_of(RankRequest("u", ["x", "y", 7]), ranking) is None
    best = impression_of(RankRequest("u", ["x", "y", 7], shown=2), ranking)
    assert best is not None
    assert (best.items, best.positions, best.propensities) == (["x", 7], [0, 1], None)


def test_without_a_broker_impressions_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(impressions, "WAITING", 3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    registry = CollectorRegistry()

    async def serve() -> float:
        log = ImpressionLog(ServeWorkerSettings(bootstrap=nobody, data_dir=tmp_path), registry)
        task = asyncio.create_task(log.run())
        await asyncio.sleep(0)
        start = time.perf_counter()
        for _ in range(5):
            log.served(RecommendRequest("u"), Recommendation(**ABOUT, candidates=9, items=shown(0.5)))
        took = time.perf_counter() - start
        assert log.waiting == 3
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return took

    assert asyncio.run(serve()) < 1
    assert registry.get_sample_value("headrace_serve_impressions_dropped_total") == 2


# --- on the real broker ---------------------------------------------------------------------------------------------


@pytest.fixture
def replica(source: Source, served: Callable) -> tuple[httpx.Client, Source]:
    """A replica at its first version."""
    source.send(*source.version())
    child, client = served()
    wait_for(lambda: client.get("/v1/model").json()["sequence"] == 1, child=child)
    return client, source


def user_elsewhere(partitions: int) -> str:
    """A user whose events are not in partition 0, of which the model believes to know the first ones."""
    users = (f"guest {n}" for n in range(1_000))
    return next(u for u in users if (murmur2(u.encode()) & 0x7FFFFFFF) % partitions)


@pytest.mark.broker
@pytest.mark.partitions(4)
def test_a_click_changes_that_users_next_answer(replica: tuple, broker: str, topics: TopicSettings) -> None:
    client, _ = replica
    user, other, ts = user_elsewhere(topics.partitions), "somebody else", int(time.time() * 1000) - 5
    click = {"kind": "click", "event_id": "c1", "user": user, "item": 5, "ts": ts}
    expected = UserHistory()
    expected.push(feature_id("item", 5), ts, Kind.CLICK)

    def answer(who: str) -> dict[str, Any]:
        return client.post("/v1/rank", json={"user": who, "candidates": [1, 5]}).json()

    before = answer(user), answer(other)
    producer = KafkaProducer(bootstrap_servers=broker)
    for value in (b"poison", orjson.dumps(click), orjson.dumps(click)):
        producer.send(topics.events, value, key=user.encode())
    producer.flush()
    wait_for(lambda: answer(user)["feature_hash"] == history_hash(expected.latest()))
    after = answer(user), answer(other)
    assert after[0]["model_version"] == before[0]["model_version"], "nothing was learned"
    assert {i["item"]: i["score"] for i in after[0]["items"]} != {i["item"]: i["score"] for i in before[0]["items"]}
    assert after[1]["feature_hash"] == before[1]["feature_hash"]
    producer.close()


@pytest.mark.broker
@pytest.mark.partitions(4)
def test_answers_are_in_the_log_as_impressions(replica: tuple, broker: str, topics: TopicSettings) -> None:
    client, _ = replica
    user = user_elsewhere(topics.partitions)
    asked = {"user": user, "scenario": "video", "context": {"query": "tea"}, "candidates": [3, 4, 5]}
    client.post("/v1/rank", json=asked)
    answer = client.post("/v1/rank", json=asked | {"shown": 2}).json()
    wait_for(lambda: "headrace_serve_impressions_total 1.0" in client.get("/metrics").text)
    records = {partition: some for partition, some in read_all(broker, topics.events).items() if some}
    assert list(records) == [(murmur2(user.encode()) & 0x7FFFFFFF) % topics.partitions]
    (record,) = next(iter(records.values()))
    assert record.key == user.encode()
    event = decode(record.value)
    assert isinstance(event, Impression)
    assert event.items == [item["item"] for item in answer["items"][:2]]
    assert (event.request_id, event.feature_hash, event.ts, event.model_version, event.context) == (
        answer["request_id"], answer["feature_hash"], answer["moment_ms"], answer["model_version"], {"query": "tea"}
    )  # fmt: skip


@pytest.mark.broker
@pytest.mark.partitions(4)
def test_requests_of_late_warm_it_up_and_leave_no_trace(
    source: Source, served: Callable, broker: str, topics: TopicSettings
) -> None:
    shown = Impression(
        event_id="i", user="u", ts=int(time.time() * 1000), scenario="search", request_id="r", items=[3, "x"],
        context={"query": "tea"},
    )  # fmt: skip
    producer = KafkaProducer(bootstrap_servers=broker)
    producer.send(topics.events, encode(shown), key=b"u")
    producer.flush()
    producer.close()
    source.send(*source.version())
    child, client = served()
    wait_for(lambda: client.get("/readyz").status_code == 200, child=child)
    assert "requests (of late) in" in child.said
    assert sum(map(len, read_all(broker, topics.events).values())) == 1
    assert "headrace_serve_requests_total{route=\"/v1/rank" not in client.get("/metrics").text


@pytest.mark.broker
@pytest.mark.partitions(4)
def test_a_shadow_is_compared_on_what_was_shown_and_clicked(
    settings: dict, source: Source, served: Callable, broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    theirs = TopicSettings(f"{topics.prefix}b.")
    create_topics(broker, theirs)
    settings |= {"shadow_topic": theirs.parameters, "shadow_snapshots": str(tmp_path / "b" / "data" / "snapshots")}
    second = Source(broker, theirs, tmp_path / "b")
    source.send(*source.version())
    second.send(*second.version(), *second.version())
    child, client = served()

    def figures() -> dict[str, Any]:
        return client.get("/v1/model").json()["info"]["shadow"]

    wait_for(lambda: client.get("/readyz").status_code == 200 and figures()["version"] == "1.2", child=child)
    user, asked = user_elsewhere(topics.partitions), {"candidates": [3, 4, 5], "shown": 2}
    pages = [client.post("/v1/rank", json=asked | {"user": user}).json() for _ in range(3)]
    producer = KafkaProducer(bootstrap_servers=broker)
    last = pages[-1]
    click = {"kind": "click", "event_id": "c", "user": user, "item": last["items"][0]["item"],
             "ts": last["moment_ms"] + 1, "request_id": last["request_id"]}  # fmt: skip
    producer.send(topics.events, orjson.dumps(click), key=user.encode())
    producer.flush()
    wait_for(lambda: int(time.time() * 1000) > last["moment_ms"] + 1_000)
    tick = {"kind": "tick", "event_id": "t", "ts": int(time.time() * 1000) + 59_900}  # and not too far ahead
    producer.send(topics.events, orjson.dumps(tick), partition=0)
    producer.flush()
    producer.close()
    wait_for(lambda: figures()["requests"] == 3, child=child)
    found = figures()
    p = [[item["click"] for item in page["items"][:2]] for page in pages]
    losses = [-math.log(1 - x) for page in p for x in page]
    losses[4] = -math.log(p[2][0])
    assert found["log_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert found["low"] < found["difference"] < found["high"]
    assert "headrace_shadow_log_loss_difference_low" in client.get("/metrics").text
    second.close()


@pytest.mark.broker
def test_a_shadow_that_fails_harms_nobody(settings: dict, source: Source, served: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    settings |= {"shadow_topic": "no topic can be named so", "shadow_snapshots": str(tmp_path / "file")}
    source.send(*source.version())
    child, client = served()
    wait_for(lambda: client.get("/readyz").status_code == 200, child=child)
    assert client.post("/v1/rank", json={"user": 1, "candidates": [1, 2], "shown": 1}).status_code == 200
    assert client.get("/v1/model").json()["info"]["shadow"]["version"] == ""
