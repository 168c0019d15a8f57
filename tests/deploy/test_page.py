"""The live page: whoever opens it, whenever, sees the whole run; in a real browser it draws without an error."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.page import LivePage
from deploy.page.history import History
from embedding_store.errors import UsageError
from tests.deploy.browsing import opened, with_chromium
from tests.deploy.samples import sample

TRACES = 21  # lines in the seven plots


@pytest.fixture
def page() -> Iterator[LivePage]:
    live = LivePage()
    yield live
    live.stop()


class Reader(threading.Thread):
    """Reads server-sent events until the stream ends: (event, id, samples)."""

    def __init__(self, url: str, last_event_id: str = "") -> None:
        super().__init__(daemon=True)
        self.url, self.headers = url, {"Last-Event-ID": last_event_id} if last_event_id else {}
        self.events: list[tuple[str, str, Any]] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("GET", f"{self.url}samples", headers=self.headers, timeout=20) as answer:
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "data" in fields:
                    self.events.append(
                        (fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"]))
                    )
                    fields = {}

    def times(self) -> list[float]:
        return [s["t"] for kind, _, samples in self.events if kind != "end" for s in samples]

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + 10
        while len(self.times()) < count and time.monotonic() < end:
            time.sleep(0.01)
        assert len(self.times()) >= count


def test_a_late_opener_sees_the_whole_run_then_what_is_new_and_that_it_ended(page: LivePage) -> None:
    url = page.start()
    for t in range(1, 11):
        page.publish(sample(t))
    reader = Reader(url)
    reader.wait_for(10)
    page.publish(sample(11))
    reader.wait_for(11)
    page.stop()
    reader.join(10)
    assert reader.times() == list(range(1, 12))
    assert [kind for kind, _, _ in reader.events] == ["all", "message", "end"]


def test_a_browser_that_reconnects_gets_what_it_missed_and_nothing_twice(page: LivePage) -> None:
    url = page.start()
    page.publish(sample(1))
    first = Reader(url)
    first.wait_for(1)
    page.publish(sample(2))
    page.publish(sample(3))
    again = Reader(url, first.events[0][1])
    again.wait_for(2)
    assert again.times() == [2, 3]
    assert again.events[0][0] == "message"


def test_a_browser_left_open_from_an_earlier_run_starts_afresh(page: LivePage) -> None:
    url = page.start()
    page.publish(sample(1))
    reader = Reader(url, "0ldrun-7")
    reader.wait_for(1)
    assert [(kind, samples[0]["t"]) for kind, _, samples in reader.events] == [("all", 1.0)]


def test_what_is_published_before_the_start_is_kept_and_nan_is_null(page: LivePage) -> None:
    page.publish(sample(1) | {"ctr": float("nan")})
    url = page.start()
    (only,) = httpx.get(f"{url}samples.json").json()
    assert only["ctr"] is None


def test_nothing_comes_from_elsewhere_and_nobody_else_may_ask(page: LivePage) -> None:
    url = page.start()
    answer = httpx.get(url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http-equiv", "").split("<body>")[0]
    for path in ("", "plotly.js", "samples", "samples.json", "static/page.css"):
        for headers in ({"Host": "elsewhere.example"}, {"Origin": "https://elsewhere.example"}):
            assert httpx.get(url + path, headers=headers).status_code == 403
            assert httpx.post(url + path, headers=headers).status_code == 403
        assert httpx.post(url + path).status_code == 405
    assert httpx.get(f"{url}static/../app.py").status_code == 404
    assert httpx.get(f"{url}static/..%2Fapp.py").status_code == 404
    assert b"plotly.js" in httpx.get(f"{url}plotly.js").content[:200]


def test_a_port_that_is_taken_is_one_line_with_a_remedy(page: LivePage) -> None:
    port = int(page.start().rsplit(":", 1)[1].strip("/"))
    with pytest.raises(UsageError, match=f"port {port} .*--port"):
        LivePage(port).start()


def test_stopping_frees_the_port_and_twice_is_harmless() -> None:
    live = LivePage()
    port = int(live.start().rsplit(":", 1)[1].strip("/"))
    live.stop()
    live.stop()
    with LivePage(port) as _:
        assert httpx.get(f"http://127.0.0.1:{port}/samples.json").json() == []


def test_a_long_run_stays_whole_but_coarser() -> None:
    history = History(limit=100, recent=20)
    for t in range(1000):
        history.add(b"%d" % t)
    newest, samples = history.after(0)
    kept = [int(s) for s in samples]
    assert newest == 1000
    assert len(kept) <= 100
    assert kept[0] == 0
    assert kept[-20:] == list(range(980, 1000))
    assert kept == sorted(set(kept))
    assert history.after(990)[1] == [b"%d" % t for t in range(990, 1000)]


@with_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_browser_draws_every_plot_without_an_error(page: LivePage, scheme: str) -> None:
    url = page.start()
    for t in range(1, 91):
        page.publish(sample(t))
    with opened(url, 1440, scheme) as it:
        tab = it.tab
        tab.locator(".plot .scatterlayer .trace").nth(TRACES - 1).wait_for(state="attached")
        points = tab.evaluate(
            "[...document.querySelectorAll('.plot')].map(p => p.data.map(d => d.y.filter(v => v != null).length))"
        )
        # A table of figures, a sentence in place of each plot, units on every axis.
        sentences = tab.evaluate("[...document.querySelectorAll('.plot')].map(p => p.getAttribute('aria-label'))")
        units = tab.evaluate("[...document.querySelectorAll('.plot')].map(p => p.layout.annotations.map(a => a.text))")
        tiles = tab.locator("#tiles .figure").all_inner_texts()
        page.publish(sample(91))
        tab.locator("#clock", has_text="1:31").wait_for()
        page.stop()
        tab.locator("#state", has_text="run ended").wait_for()
    assert it.problems == []
    assert (len(points), sum(map(len, points))) == (7, TRACES)
    assert all(count >= 80 for plot in points for count in plot)
    assert all("after 90 s" in sentence for sentence in sentences)
    assert all(texts and all(texts) for texts in units)
    assert "90,000" in tiles
