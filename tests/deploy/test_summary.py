"""The terminal's summary: one line every five seconds, a table on a terminal, and no word about what is not known."""

from __future__ import annotations

import io

from deploy.summary import Summary, line
from tests.deploy.samples import sample


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_one_plain_line_every_five_seconds() -> None:
    out, now = io.StringIO(), [0.0]
    with Summary("http://127.0.0.1:1/", stream=out, clock=lambda: now[0]) as summary:
        for second in range(11):
            now[0] = float(second)
            summary.publish(sample(second + 1))
    lines = out.getvalue().splitlines()
    assert lines[0] == "live page: http://127.0.0.1:1/"
    assert [text.split(" ·")[0] for text in lines[1:]] == ["1 s", "6 s", "11 s"]
    assert "\x1b" not in out.getvalue()


def test_a_worker_that_is_down_is_named() -> None:
    down = sample(60)
    down["processes"][2]["state"] = "down"
    assert line(down).endswith("train down")
    assert "train" not in line(sample(60)).rsplit("CTR")[1]


def test_what_is_waited_for_is_said() -> None:
    assert " · draining" in line(sample(60) | {"note": "draining"})
    assert line(sample(60) | {"note": ""}).endswith("%)")


def test_on_a_terminal_the_table_holds_the_figures(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Summary(stream=out) as summary:
        summary.publish({"t": 1.0})  # nothing is known yet
        summary.publish(sample(60))
    assert "60,000" in out.getvalue()
    assert "AUC, click" in out.getvalue()
