"""The API under requests made from its own description: whatever comes, an answer as described, and no memory lost."""

from __future__ import annotations

import http.client
import random
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import orjson
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks

from online_model.serving.api import MAX_WAIT_MS
from online_model.serving.openapi import document
from online_model.serving.settings import Limits
from tests.online_model.serving.served import Served, served

SCHEMA = schemathesis.openapi.from_dict(document(Limits()))
load_all_checks()
(ACCEPTED,) = CHECKS.get_by_names(["positive_data_acceptance"])
EVERYTHING = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def it() -> Iterator[Served]:
    with served() as it:
        yield it


@pytest.fixture(scope="module")
def web(it: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=it.url, timeout=10) as web:
        yield web


def answered_as_described(case: schemathesis.Case, web: httpx.Client) -> None:
    """Sends it with httpx: with urllib3-future in the place of urllib3, requests cannot be used for that."""
    shorten(case)
    asked = requests.Request(**case.as_transport_kwargs(base_url=str(web.base_url))).prepare()
    assert asked.method
    assert asked.url
    response = web.request(asked.method, asked.url, headers=dict(asked.headers), content=asked.body)
    # To JSON Schema 5.0 is an integer; here integers are written as such.
    case.validate_response(response, excluded_checks=[ACCEPTED] if has_whole_floats(case.body) else [])


def shorten(case: schemathesis.Case) -> None:
    """No long polls: what may be waited for is 5 ms."""
    wait_ms = str((case.query or {}).get("wait_ms", ""))
    if wait_ms.isdigit() and 5 < int(wait_ms) <= MAX_WAIT_MS:
        case.query["wait_ms"] = 5


def has_whole_floats(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(has_whole_floats, value.values()))
    if isinstance(value, list):
        return any(map(has_whole_floats, value))
    return isinstance(value, float) and value.is_integer()


@SCHEMA.parametrize()
@settings(EVERYTHING, max_examples=10)
def test_every_request_is_answered_as_described(case: schemathesis.Case, web: httpx.Client):
    answered_as_described(case, web)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@SCHEMA.parametrize()
@settings(EVERYTHING, max_examples=1000)
def test_every_one_of_many_requests_is_answered_as_described(case: schemathesis.Case, web: httpx.Client):
    answered_as_described(case, web)


# --- memory

Request = tuple[str, str, bytes | None]  # method, path, body


def strange(seed: int) -> Iterator[Request]:
    """Requests without end, right ones and wrong ones, of which no two are the same."""
    rng = random.Random(seed)
    while True:
        word = f"{rng.getrandbits(80):x}"
        yield "POST", "/v1/rank", orjson.dumps({"user": word, "candidates": [word, *rng.sample(range(10_000), 20)]})
        yield "POST", "/v1/recommend", orjson.dumps({"user": word, "scenario": "search", "context": {"query": word}})
        yield "GET", f"/v1/items/{rng.randrange(40)}/similar?k=3", None
        yield "GET", f"/v1/items/{quote(word + '/')}/similar", None
        yield "GET", f"/v1/model?newer_than={rng.getrandbits(70) - (1 << 69)}", None
        yield "GET", f"/v1/model?{word}=1", None
        yield "POST", "/v1/rank", b'{"user": "%s' % word.encode()
        yield "POST", "/v1/recommend", orjson.dumps({"user": 1, word: word * 100})
        yield "GET", f"/{word}", None
        yield "DELETE", f"/v1/model/{word}", None
        yield "PUT", "/v1/rank", word.encode() * 50
        yield "GET", "/metrics", None


def memory_after(it: Served, many: Iterator[Request], n: int, headers: dict[str, str] | None = None) -> int:
    """Bytes that the server holds after n more requests. None of them is a fault of its own."""
    host, port = it.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    for _ in range(n):
        connection.request(*next(many), headers or {})
        response = connection.getresponse()
        response.read()
        assert response.status in (200, 400, 404, 405, 422)
    connection.close()
    return psutil.Process(it.pid).memory_info().rss


@pytest.mark.parametrize(
    ("n", "leak"), [(600, 6_000), pytest.param(60_000, 200, marks=(pytest.mark.nightly, pytest.mark.timeout(1800)))]
)
def test_memory_does_not_grow_with_requests(it, n, leak):
    """Half of a leak of that many bytes a request would be seen: a whole one is planted, and seen."""
    many, allowed = strange(1), n * leak / 2
    at_first = memory_after(it, many, n)
    then = memory_after(it, many, n)
    assert then - at_first < allowed
    leaked = memory_after(it, many, n, {"x-leak": str(leak)})
    assert leaked - then > allowed, "what is allowed hides a leak"


def test_strangers_make_no_metrics(it, web):
    """Each series is held for ever: there are as many as there are routes, statuses and reasons."""
    many = strange(2)
    memory_after(it, many, 24)
    before = len(web.get("/metrics").text.splitlines())
    memory_after(it, many, 240)
    assert len(web.get("/metrics").text.splitlines()) == before
    assert 'route="/v1/items/{id}/similar",status="404"' in web.get("/metrics").text
