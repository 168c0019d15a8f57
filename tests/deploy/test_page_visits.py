"""Whoever looks at the live page can be a user: what they do is an event like any, and they see what it changes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from deploy.page import LivePage, Visited
from deploy.page.cards import Cards
from deploy.page.visit_routes import HEADER, MAX_BODY_BYTES
from streams.events import Item, encode
from streams.topics import TopicSettings
from tests.deploy.browsing import click_as, opened, shown, with_chromium
from tests.deploy.samples import sample
from tests.deploy.shop import shop
from tests.streams.children import read_all, wait_for

OURS = {HEADER: "1"}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def page(broker: str, topics: TopicSettings, tmp_path: Path) -> Iterator[LivePage]:
    """The page of a small shop with a real replica, on a real Kafka."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(shop(broker, topics, tmp_path))
        page = stack.enter_context(LivePage(visited=Visited(made.url, broker, topics, 100, ("u0",))))
        page.publish(sample(30))
        yield page


@pytest.fixture
def closed() -> Iterator[LivePage]:
    """A page in front of nothing."""
    with LivePage(visited=Visited(NOWHERE, "127.0.0.1:9", TopicSettings(), 100)) as page:
        yield page


def client(page: LivePage) -> httpx.Client:
    return httpx.Client(base_url=page.url, headers=OURS, timeout=40)


def recommend(http: httpx.Client, **asked: Any) -> dict[str, Any]:
    answer = http.post("/visit/recommend", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def act(http: httpx.Client, shown: dict[str, Any], place: int, kind: str) -> dict[str, dict[str, Any]]:
    """What came of it, by stage."""
    asked = {"request_id": shown["request_id"], "place": place, "kind": kind}
    with http.stream("POST", "/visit/act", json=asked) as answer:
        assert answer.status_code == 200, answer.read()
        said = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    return {one["stage"]: one for one in said}


def test_what_is_done_is_an_event_of_the_page_it_was_done_on(
    page: LivePage, broker: str, topics: TopicSettings
) -> None:
    with client(page) as http:
        assert http.get("/visit").json()["users"] == ["u0"]
        wait_for(lambda: "Thing" in recommend(http, user="x")["items"][0]["title"])
        shown = recommend(http, user="u0", scenario="search", query="tea", k=5)
        bought = act(http, shown, 2, "purchase")
    assert bought.keys() == {"sent", "history", "learned"}
    assert 0 < bought["sent"]["ms"] < bought["history"]["ms"] < bought["learned"]["ms"]
    events = [orjson.loads(record.value or b"") for record in read_all(broker, topics.events)[0]]
    click, purchase = [event for event in events if event["kind"] in ("click", "purchase")]
    (impression,) = [event for event in events if event.get("request_id") == click["request_id"] and "items" in event]
    assert [str(item) for item in impression["items"]] == [item["item"] for item in shown["items"]]
    for event in (click, purchase):
        assert (event["user"], event["scenario"]) == ("u0", "search")
        assert (event["item"], event["request_id"]) == (impression["items"][2], impression["request_id"])
        assert event["ts"] > impression["ts"]
    assert purchase["price"] == purchase["item"] + 0.5
    # What is shown again afterwards is an impression too; what was asked only to look is none.
    again = {bought[stage]["page"]["request_id"] for stage in ("history", "learned")}
    shown_ids = [event["request_id"] for event in events if "items" in event]
    assert again <= set(shown_ids)
    assert len(shown_ids) == len(set(shown_ids)) < 10


def test_a_watch_counts_as_learned_when_its_wait_is_over(page: LivePage) -> None:
    """The shop's versions never come to the time of a watch's end: that of a click is not enough."""
    with client(page) as http:
        shown = recommend(http, user="u1")
        asked = {"request_id": shown["request_id"], "place": 0, "kind": "watch"}
        with http.stream("POST", "/visit/act", json=asked) as answer:
            lines = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
            assert [next(lines)["stage"], next(lines)["stage"]] == ["sent", "history"]
            answer.close()
        assert http.get("/visit").json()["open"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b'{"user": "u"}', 403),
        (OURS | {"Origin": "http://elsewhere.example"}, b'{"user": "u"}', 403),
        (OURS | {"Origin": "null"}, b'{"user": "u"}', 403),
        (OURS | {"Sec-Fetch-Site": "cross-site"}, b'{"user": "u"}', 403),
        (OURS | {"Host": "elsewhere.example"}, b'{"user": "u"}', 403),
        (OURS, b'{"user": "' + b"u" * MAX_BODY_BYTES + b'"}', 413),
        (OURS, b'{"user": "u"', 400),
        (OURS, b'{"user": "u", "url": "http://elsewhere.example"}', 422),
        (OURS, b'{"user": ""}', 422),
        (OURS, b'{"user": "u", "scenario": "none"}', 422),
        (OURS, b'{"user": "u"}', 503),
    ],
)
def test_only_the_page_itself_may_ask(closed: LivePage, headers: dict[str, str], body: bytes, status: int) -> None:
    answer = httpx.post(f"{closed.url}visit/recommend", headers=headers, content=body)
    assert answer.status_code == status
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"request_id": "r", "place": 0, "kind": "refund"}, 422),
        ({"request_id": "r", "place": -1, "kind": "click"}, 422),
        ({"request_id": "r", "place": 0, "kind": "click", "topic": "examples"}, 422),
        ({"request_id": "not ours", "place": 0, "kind": "click"}, 409),
    ],
)
def test_only_what_the_page_has_shown_can_be_acted_on(closed: LivePage, asked: dict[str, Any], status: int) -> None:
    assert httpx.post(f"{closed.url}visit/act", headers=OURS, json=asked).status_code == status


def test_a_page_that_only_looks_has_no_such_routes_and_one_that_is_over_says_so(closed: LivePage) -> None:
    closed.close_visits("the run is over")
    assert httpx.get(f"{closed.url}visit").json() == {"open": False, "why": "the run is over"}
    answer = httpx.post(f"{closed.url}visit/recommend", headers=OURS, json={"user": "u"})
    assert (answer.status_code, answer.json()) == (409, {"detail": "the run is over"})
    with LivePage() as looking:
        assert httpx.get(f"{looking.url}visit").json() == {"open": False, "why": ""}
        assert httpx.post(f"{looking.url}visit/recommend", headers=OURS, json={"user": "u"}).status_code == 404


def test_cards_follow_the_catalogue_and_stay_few() -> None:
    cards = Cards("", TopicSettings(), kept=2)
    for item in ("a", "b", 3):
        cards.put(str(item).encode(), encode(Item(item=item, title=f"the {item}", price=1.5)))
    assert [cards.of(item)["title"] for item in ("a", "b", 3)] == ["a", "the b", "the 3"]
    cards.put(b"b", None)
    cards.put(b"c", b"no card")
    assert cards.of("b") == {"title": "b"}
    assert cards.of(3) == {"title": "the 3", "price": 1.5}


@with_chromium
def test_the_click_of_a_user_changes_the_list_and_is_said(page: LivePage) -> None:
    with opened(page.url) as it:
        tab = it.tab
        tab.locator("#visit-form").wait_for()
        clicked = click_as(tab, "u2", 6)
        said = tab.locator("#visit-result").inner_text()
        assert clicked.changed
        assert clicked.history_ms < clicked.learned_ms
        assert "Your history is in the answer" in said
        assert "The model has learned it" in said
        assert tab.locator("#visit-list .mark").count() > 0
        assert it.unreadable() == []
        it.keep("page-user-light")
    assert it.problems == []


@with_chromium
def test_a_narrow_dark_page_is_readable_and_a_keyboard_is_enough(page: LivePage) -> None:
    with opened(page.url, width=360, scheme="dark") as it:
        tab = it.tab
        tab.locator("#visit-form").wait_for()
        focus(tab, "#visit-user")
        tab.keyboard.press("Control+A")
        tab.keyboard.type("u3")
        tab.keyboard.press("Enter")
        items(tab, 10)
        focus(tab, "#visit-list li:nth-child(4) button")
        title = tab.locator("#visit-list li:nth-child(4) b").inner_text()
        ring = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        tab.keyboard.press("Enter")
        tab.locator("#visit-result", has_text="The model has learned it").wait_for()
        held = tab.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")
        assert ring == "solid"
        assert held in (f"Click: {title}", "visit-page")  # on the item where it is now, or on the list it has left
        assert it.unreadable() == []
        it.keep("page-user-narrow-dark")
    assert it.problems == []


def items(tab: Any, count: int) -> list[str]:
    """The items shown, once there are so many."""
    tab.locator("#visit-list li").nth(count - 1).wait_for()
    return shown(tab)


def focus(tab: Any, selector: str) -> None:
    """Tab, until it is there."""
    for _ in range(60):
        if tab.evaluate("(selector) => document.activeElement === document.querySelector(selector)", selector):
            return
        tab.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached with Tab")
