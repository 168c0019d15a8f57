"""The HTTP face: right answers, and one clear line for everything else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from embedding_store.delta import Version
from online_model.serving.api import MAX_BODY_BYTES
from online_model.serving.app import create_app
from online_model.serving.holder import Holder
from online_model.serving.problems import KINDS, Problem
from online_model.serving.replica import Replica
from online_model.serving.settings import Limits
from tests.online_model.serving.world import NOW, delta, rank, replica, world

pytestmark = pytest.mark.usefixtures("one_thread")  # as the worker has it


@contextlib.asynccontextmanager
async def client(made: Replica, now_ms: int = NOW + 1000) -> AsyncIterator[tuple[httpx.AsyncClient, Holder]]:
    holder = Holder(made)
    app = create_app(holder, made.settings.max_age_ms, clock=lambda: now_ms / 1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        yield http, holder


def asks(
    method: str, path: str, made: Replica | None = None, now_ms: int = NOW + 1000, **kwargs: Any
) -> httpx.Response:
    """One request to an app over `made`, else over a replica of the usual world."""

    async def run() -> httpx.Response:
        async with client(replica(world()) if made is None else made, now_ms) as (http, _):
            return await http.request(method, path, **kwargs)

    return asyncio.run(run())


def assert_refused(response: httpx.Response, status: int, words: str = "", type_: str = "") -> None:
    """By a problem document; `type_`: of which kind."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = msgspec.convert(response.json(), Problem, strict=True)
    assert problem.status == status
    assert problem.type == "about:blank" or problem.type in {kind.type for kind in KINDS if kind.status == status}
    assert type_ in problem.type
    assert words in problem.detail
    assert "\n" not in problem.detail


ANSWER = {
    "request_id", "model_version", "model_age_ms", "learned_to_ms", "feature_hash", "moment_ms", "arm", "degraded",
}  # fmt: skip


def test_rank():
    items: list[str | int] = [3, "4", "unknown"]
    response = asks("POST", "/v1/rank", json={"user": "u1", "scenario": "live", "candidates": items})
    assert response.status_code == 200
    body = response.json()
    assert set(body) == ANSWER | {"items"}
    assert body["model_version"] == "1.1"
    assert [set(item) for item in body["items"]] == [{"item", "score", "click", "watch", "purchase", "explanation"}] * 3
    assert sorted(map(str, items)) == sorted(str(item["item"]) for item in body["items"])
    scores = [item["score"] for item in body["items"]]
    assert scores == sorted(scores, reverse=True)
    assert [i.item for i in rank(replica(world()), "u1", "live", items).items] == [i["item"] for i in body["items"]]


def test_recommend():
    body = asks("POST", "/v1/recommend", json={"user": "u1", "scenario": "video", "k": 7}).json()
    assert set(body) == ANSWER | {"candidates", "items"}
    assert [item["position"] for item in body["items"]] == list(range(7))
    assert len({item["item"] for item in body["items"]}) == 7
    assert all(isinstance(item["item"], int) and 0 < item["propensity"] <= 1 for item in body["items"])


def test_what_is_left_out_is_as_in_the_events():
    body = asks("POST", "/v1/recommend", json={"user": 5}).json()
    assert len(body["items"]) == 10


def test_similar():
    """"7" and 7 are one id."""
    body = asks("GET", "/v1/items/7/similar?k=3").json()
    assert set(body) == {"item", "model_version", "model_age_ms", "learned_to_ms", "items"}
    assert body["item"] == 7
    assert body["model_version"] == "1.1"
    assert len(body["items"]) == 3
    assert 7 not in [alike["item"] for alike in body["items"]]
    assert [set(alike) for alike in body["items"]] == [{"item", "score", "together", "alike"}] * 3
    assert len(asks("GET", "/v1/items/7/similar").json()["items"]) == 10


def test_similar_to_what_is_not_there():
    for item in ("unknown", "07", "7%0A", "a%2Fb"):
        assert_refused(asks("GET", f"/v1/items/{item}/similar"), 404, "", "unknown-item")
    assert_refused(asks("GET", "/v1/items/7/similar", replica()), 503, "no model yet", "not-ready")
    assert_refused(asks("GET", "/v1/items/7/similar?k=0"), 422, "$.k")
    assert_refused(asks("GET", "/v1/items/7/similar?n=3"), 422, "unknown field `n`")
    assert_refused(asks("GET", f"/v1/items/{'x' * 257}/similar"), 422, "1 to 256 characters")
    assert_refused(asks("GET", "/v1/items//similar"), 422, "1 to 256 characters")


def test_model():
    body = asks("GET", "/v1/model").json()
    assert body == {
        "version": "1.1", "epoch": 1, "sequence": 1, "created_ms": NOW, "applied_ms": body["applied_ms"],
        "positions": {"0": 10, "1": 20}, "info": {"rows": 7},
        "rows": {"user": 6, "item": 40, "category": 4, "seller": 2, "word": 3, "card": 40},
        "policy": replica().policy.fingerprint,
    }  # fmt: skip


def test_before_the_first_version():
    for path, body in (("/v1/rank", {"user": 1, "candidates": [1]}), ("/v1/recommend", {"user": 1})):
        response = asks("POST", path, replica(), json=body)
        assert_refused(response, 503, "no model yet")
        assert response.headers["retry-after"] == "1"
    assert asks("GET", "/v1/model", replica()).json()["sequence"] == -1
    assert asks("GET", "/healthz", replica()).status_code == 200
    assert_refused(asks("GET", "/readyz", replica()), 503, "no version yet")
    assert asks("GET", "/metrics", replica()).status_code == 200


def test_before_the_first_item():
    first = world()
    first.blobs = {}
    response = asks("POST", "/v1/recommend", replica(first), json={"user": 1})
    assert_refused(response, 503, "catalogue")
    assert response.headers["retry-after"] == "1"


def test_ready_says_why_not():
    assert asks("GET", "/readyz").json() == {"ok": True}
    assert_refused(asks("GET", "/readyz", now_ms=NOW + 61_000), 503, "61,000 ms old")

    async def run() -> None:
        async with client(replica(world())) as (http, holder):
            holder.behind = "a version is missing: loading the newest snapshot"
            assert_refused(await http.get("/readyz"), 503, "a version is missing")
            holder.apply(delta(2))
            assert (await http.get("/readyz")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'{"user": "\xff"}', 400, "not JSON"),
        (b"[]", 422, "Expected `object`"),
        (b"{}", 422, "missing required field `user`"),
        (b'{"user": null}', 422, "$.user"),
        (b'{"user": ""}', 422, "$.user"),
        (b'{"user": 1.5}', 422, "$.user"),
        (b'{"user": true}', 422, "$.user"),
        (b'{"user": 9223372036854775808}', 422, "$.user"),
        (b'{"user": 1, "k": 0}', 422, "$.k"),
        (b'{"user": 1, "k": 101}', 422, "$.k"),
        (b'{"user": 1, "k": "5"}', 422, "$.k"),
        (b'{"user": 1, "scenario": "cinema"}', 422, "$.scenario"),
        (b'{"user": 1, "who": 1}', 422, "unknown field `who`"),
        (b'{"user": 1, "a\\nb": 1}', 422, "unknown field"),
        (b'{"user": 1, "' + b"x" * 1000 + b'": 1}', 422, "unknown field"),
        (b'{"user":' * 100_000, 422, "$.user"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "larger than"),
    ],
)
def test_a_wrong_body_is_refused_in_one_line(body, status, words):
    assert_refused(asks("POST", "/v1/recommend", content=body), status, words)


def test_rank_takes_one_to_a_thousand_items():
    assert asks("POST", "/v1/rank", json={"user": 1, "candidates": list(range(1000))}).status_code == 200
    assert_refused(asks("POST", "/v1/rank", json={"user": 1, "candidates": list(range(1001))}), 422, "$.candidates")
    assert_refused(asks("POST", "/v1/rank", json={"user": 1, "candidates": []}), 422, "$.candidates")


@pytest.mark.parametrize("query", ["newer_than=x", "wait_ms=-1", "wait_ms=30001", "older_than=3"])
def test_a_wrong_question_for_the_model_is_refused(query):
    assert_refused(asks("GET", f"/v1/model?{query}"), 422)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1/rank/", 404), ("POST", "/v2/rank", 404), ("GET", "/v1/rank", 405),
        ("POST", "/v1/model", 405), ("DELETE", "/metrics", 405), ("PUT", "/v1/recommend", 405),
    ],
)  # fmt: skip
def test_unknown_paths_and_methods(method, path, status):
    response = asks(method, path)
    assert_refused(response, status, "see /docs", "about:blank")
    assert ("allow" in response.headers) == (status == 405)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
ids = st.integers() | st.text(max_size=300) | json_values
nearly_right = st.fixed_dictionaries(
    {},
    optional={
        "user": ids,
        "candidates": st.lists(ids, max_size=8) | json_values,
        "k": st.integers(-5, 200) | json_values,
        "scenario": st.sampled_from(["live", "video", "shelf", "Shelf"]) | json_values,
        "other": json_values,
    },
)


def as_json(value: object) -> bytes:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS) if _small(value) else repr(value).encode()


def _small(value: object) -> bool:
    """orjson writes integers of 64 bits only."""
    if isinstance(value, dict):
        return all(_small(v) for v in value.values())
    if isinstance(value, list):
        return all(_small(v) for v in value)
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 64


bodies = st.one_of(
    st.binary(max_size=200),
    json_values.map(as_json),
    nearly_right.map(as_json),
    st.tuples(nearly_right.map(as_json), st.integers(0, 80), st.binary(max_size=3)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
    ),
)


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(["/v1/rank", "/v1/recommend"]), body=bodies)
def test_whatever_is_sent_gets_an_answer_or_one_line(path, body):
    response = asks("POST", path, SHARED, content=body)
    if response.status_code == 200:
        assert response.json()["model_version"] == "1.1"
    else:
        assert response.status_code in (400, 422)
        assert_refused(response, response.status_code)


SHARED = replica(world())


def test_a_long_poll_ends_with_the_next_version():
    async def run() -> None:
        async with client(replica(world())) as (http, holder):
            at_once = await http.get("/v1/model?newer_than=0&wait_ms=30000")
            assert at_once.json()["sequence"] == 1
            waiting = [asyncio.create_task(http.get(f"/v1/model?newer_than={n}&wait_ms=30000")) for n in (1, 1, 2)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting)
            holder.apply(delta(2))
            assert (await waiting[0]).json()["sequence"] == (await waiting[1]).json()["sequence"] == 2
            await asyncio.sleep(0.02)
            assert not waiting[2].done()
            holder.apply(delta(3))
            assert (await waiting[2]).json()["sequence"] == 3

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_long_poll_ends_after_its_time_and_when_the_server_stops():
    async def run() -> None:
        async with client(replica(world())) as (http, holder):
            assert (await http.get("/v1/model?newer_than=9&wait_ms=30")).json()["sequence"] == 1
            waiting = asyncio.create_task(http.get("/v1/model?newer_than=9&wait_ms=30000"))
            await asyncio.sleep(0.02)
            holder.close()
            assert (await waiting).json()["sequence"] == 1

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_long_poll_ends_when_another_epoch_begins():
    async def run() -> None:
        async with client(replica(world())) as (http, holder):
            waiting = asyncio.create_task(http.get("/v1/model?newer_than=50&wait_ms=30000"))
            await asyncio.sleep(0.02)
            rolled_back = world()
            rolled_back.epoch, rolled_back.sequence = 2, 1
            holder.swap(replica(rolled_back))
            assert (await waiting).json()["version"] == "2.1"

    asyncio.run(asyncio.wait_for(run(), 10))


def samples(text: str) -> dict[tuple, float]:
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_metrics_count_what_happened():
    async def run() -> None:
        async with client(replica(world())) as (http, holder):
            for _ in range(3):
                await http.post("/v1/recommend", json={"user": 1})
            await http.post("/v1/rank", json={"user": 1, "candidates": [1, 2]})
            await http.post("/v1/rank", json={})
            for n in range(50):
                await http.get(f"/unknown/{n}")
            holder.apply(delta(2))
            holder.apply(delta(2))
            got = samples((await http.get("/metrics")).text)
            assert got["headrace_serve_refused_total", "invalid"] == 1
            assert got["headrace_serve_refused_total", "not-found"] == 50
            assert got["headrace_serve_waiting",] == 0
            assert got["headrace_serve_requests_total", "/v1/recommend", "200"] == 3
            assert got["headrace_serve_requests_total", "/v1/rank", "422"] == 1
            assert got["headrace_serve_requests_total", "404", "other"] == 50
            assert got["headrace_serve_request_seconds_count", "/v1/recommend"] == 3
            assert got["headrace_serve_candidates_sum", "recommend"] == 120
            assert got["headrace_serve_candidates_sum", "rank"] == 2
            assert got["headrace_replica_versions_applied_total",] == 1
            assert got["headrace_replica_apply_seconds_count",] == 1
            assert got["headrace_replica_sequence",] == 2
            assert got["headrace_replica_epoch",] == 1
            assert got["headrace_replica_rows", "item"] == 40
            assert got["headrace_replica_age_seconds",] > 0
            rolled_back = Version(2, 1, dense=world().dense)
            holder.swap(replica(rolled_back))
            got = samples((await http.get("/metrics")).text)
            assert got["headrace_replica_sequence",] == 1
            assert got["headrace_replica_epoch",] == 2
            assert got["headrace_replica_swaps_total",] == 1

    asyncio.run(run())


def test_a_broken_replica_is_an_error_without_a_traceback(caplog):
    class Broken(Replica):
        def rank(self, *args, **kwargs):
            raise RuntimeError("secret inside")

    made = replica(world())
    made.__class__ = Broken

    async def run() -> httpx.Response:
        holder = Holder(made)
        transport = httpx.ASGITransport(create_app(holder), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            response = await http.post("/v1/rank", json={"user": 1, "candidates": [1]})
            got = samples((await http.get("/metrics")).text)
            assert got["headrace_serve_requests_total", "/v1/rank", "500"] == 1
            assert got["headrace_serve_refused_total", "internal-server-error"] == 1
            return response

    response = asyncio.run(run())
    assert_refused(response, 500, "internal error", "about:blank")
    assert response.json()["instance"] in caplog.text  # so that it can be found in the log
    assert "secret" not in response.text


def test_a_request_is_told_its_deadline_and_what_was_cut_short_is_counted():
    told: list[float] = []

    class Hurried(Replica):
        def rank(self, request, deadline=math.inf):
            told.append(deadline - time.perf_counter())
            return dataclasses.replace(super().rank(request), degraded=len(told) > 1)

    made = replica(world())
    made.__class__ = Hurried

    async def run() -> None:
        async with client(made) as (http, _):
            answers = [await http.post("/v1/rank", json={"user": 1, "candidates": [1]}) for _ in range(3)]
            assert [answer.json()["degraded"] for answer in answers] == [False, True, True]
            got = samples((await http.get("/metrics")).text)
            assert got["headrace_serve_degraded_total", "rank"] == 2

    asyncio.run(run())
    assert all(0 < seconds <= Limits().deadline_ms / 1000 for seconds in told)


def test_where_many_ask_at_once_versions_come_in_between():
    """However many requests wait, what else the loop has to do waits for one of them."""
    done: list[str] = []

    class Noting(Replica):
        def rank(self, *args, **kwargs):
            done.append("scored")
            return super().rank(*args, **kwargs)

    made = replica(world())
    made.__class__ = Noting

    async def others() -> None:
        while True:
            done.append("other")
            await asyncio.sleep(0)

    async def run() -> None:
        async with client(made) as (http, _):
            other = asyncio.create_task(others())
            ask = {"user": 1, "scenario": "video", "candidates": [1, 2]}
            answers = await asyncio.gather(*(http.post("/v1/rank", json=ask) for _ in range(30)))
            other.cancel()
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(run())
    assert done.count("scored") == 30
    assert "scored scored" not in " ".join(done)


def test_an_access_log_has_a_line_for_each_request_and_nothing_of_what_strangers_send(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: list[dict[str, Any]] = []

    async def run(access_log: bool) -> None:
        holder = Holder(replica(world()))
        app = create_app(holder, clock=lambda: (NOW + 1000) / 1000, access_log=access_log)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            answers.append((await http.post("/v1/rank", json={"user": 1, "candidates": [1]})).json())
            await http.get("/secret?token=hush")

    with caplog.at_level("INFO", logger="headrace"):
        asyncio.run(run(access_log=False))
        assert not caplog.records
        asyncio.run(run(access_log=True))
    ranked, unknown = caplog.records
    assert ranked.getMessage().startswith("POST /v1/rank 200 in ")
    said = [getattr(ranked, name) for name in ("request_id", "route", "status", "epoch", "sequence")]
    assert said == [answers[1]["request_id"], "/v1/rank", 200, 1, 1]
    assert (unknown.status, unknown.route) == (404, "other")  # type: ignore[attr-defined]
    assert "hush" not in unknown.getMessage()
