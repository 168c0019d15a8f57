"""The description of the API: complete, true of the app, and readable without a network."""

from __future__ import annotations

import asyncio
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from online_model.serving import api
from online_model.serving.app import create_app
from online_model.serving.holder import Holder
from online_model.serving.openapi import OPERATIONS, document
from online_model.serving.problems import KINDS, MEDIA_TYPE, Problem
from online_model.serving.replica import Replica
from online_model.serving.settings import Limits
from tests.online_model.serving.world import cards, replica, world

ROOT = Path(__file__).parents[3]
DOCUMENT = document(Limits())
EACH = [
    pytest.param(path, method, operation, id=operation["operationId"])
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]


def known_items() -> Replica:
    """A replica that knows the items of the examples too, of the description and of the docs."""
    made = world()
    made.blobs["card"] |= cards(["tea-7", "i7"])
    return replica(made)


def ask(method: str, path: str, made: Replica | None = None, **more: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        app = create_app(Holder(made or known_items()), max_age_ms=1 << 50)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            return await http.request(method, path, **more)

    return asyncio.run(run())


def test_every_route_is_described_and_every_description_has_a_route():
    app = create_app(Holder(replica()))
    routes = {(route.path_format, method.lower()) for route in app.routes for method in route.methods or ()}
    described = {(operation.path, operation.method) for operation in OPERATIONS}
    assert described == {(path, method) for path, method in routes if method != "head"}


@pytest.mark.parametrize(("path", "method", "operation"), EACH)
def test_the_examples_of_requests_are_answered_as_described(path, method, operation):
    parameters = operation.get("parameters", [])
    named = {p["name"]: p["example"] for p in parameters if p["in"] == "query"}
    path = path.format(**{p["name"]: p["example"] for p in parameters if p["in"] == "path"})
    content = operation.get("requestBody", {}).get("content", {})
    bodies = [example["value"] for kind in content.values() for example in kind["examples"].values()]
    for body in bodies or [None]:
        response = ask(method, path, params=named, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].split(";")[0] in operation["responses"]["200"]["content"]


@pytest.mark.parametrize(("path", "method", "operation"), EACH)
def test_the_examples_of_answers_are_of_their_type(path, method, operation):
    for status, response in operation["responses"].items():
        for media_type, content in response["content"].items():
            name = content.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
            if status == "200" and name in vars(api):
                assert msgspec.convert(content["example"], vars(api)[name])
            if status != "200":
                assert media_type == MEDIA_TYPE
                assert content["examples"]
                for example in content["examples"].values():
                    assert msgspec.convert(example["value"], Problem).status == int(status)


def curls() -> list[list[str]]:
    """The curl lines of the docs, as words."""
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith("curl ")]


@pytest.mark.parametrize("words", curls(), ids=lambda words: words[2].partition("/")[2])
def test_the_curl_lines_of_the_docs_are_answered(words):
    curl, silent, where, *data = words
    assert (curl, silent) == ("curl", "-s")
    method, body = ("POST", data[1]) if data else ("GET", None)
    response = ask(method, "/" + where.partition("/")[2], content=body)
    assert response.status_code == 200, response.text


def test_the_docs_tell_of_every_route_and_every_problem():
    text = (ROOT / "docs" / "serving.md").read_text()
    asked = {words[2].partition("/")[2].partition("?")[0].replace("items/i7/", "items/{id}/") for words in curls()}
    assert asked == {operation.path[1:] for operation in OPERATIONS}
    for kind in KINDS:
        assert f"| {kind.status} | `{kind.type}` |" in text


def test_what_it_refers_to_is_there():
    text = msgspec.json.encode(DOCUMENT).decode()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert names <= set(DOCUMENT["components"]["schemas"])
    assert ask("GET", "/openapi.json").json() == DOCUMENT


def test_every_problem_can_come_from_some_route():
    assert {kind for operation in OPERATIONS for kind in operation.refusals} == set(KINDS)


class Page(HTMLParser):
    """What a page would load or run, and the places in it that can be referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [value for name in ("src", "href", "action", "data") if (value := found.get(name))]
        self.ids += [value for value in [found.get("id")] if value]
        assert tag not in ("script", "iframe", "link", "img")


def test_the_page_needs_nothing_from_outside_and_explains_every_problem():
    response = ask("GET", "/docs")
    assert response.headers["content-type"].startswith("text/html")
    page = Page()
    page.feed(response.text)
    assert page.loads == ["/openapi.json"]
    assert "url(" not in response.text
    assert len(page.ids) == len(set(page.ids))
    assert {kind.type for kind in KINDS} <= {f"/docs#{place}" for place in page.ids}


def test_the_limits_that_are_set_are_said():
    assert "3 requests wait for their turn" in document(Limits(waiting=3))["info"]["description"]
