"""Log lines as text and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LINES = """
import logging, sys
from embedding_store.errors import StoreError
from streams import app
async def main(stop):
    log = logging.getLogger("headrace")
    log.info("partition %s: snapshot at %s", 3, 812, extra={"partition": 3, "offset": 812})
    logging.getLogger("faust").error("three lines\\nof\\ntext")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("that was not foreseen")
    raise StoreError("the store is gone: look for it")
app.run(main, worker="join", logs=sys.argv[1])
"""


def _said(style: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LINES, style], capture_output=True, text=True, check=False, env=os.environ, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    return [json.loads(line) for line in _said("json")]


def test_each_line_is_one_json_object_with_its_fields(lines: list[dict]) -> None:
    first, library, failed, last = lines
    assert first.pop("ts").endswith("Z")
    assert first == {
        "level": "info", "worker": "join", "message": "partition 3: snapshot at 812", "partition": 3, "offset": 812
    }  # fmt: skip
    assert (library["logger"], library["message"]) == ("faust", "three lines\nof\ntext")
    assert failed["exception"].endswith("ZeroDivisionError: division by zero")
    assert {line["worker"] for line in (library, failed, last)} == {"join"}


def test_the_end_of_a_process_is_json_too(lines: list[dict]) -> None:
    assert (lines[-1]["level"], lines[-1]["message"]) == ("critical", "the store is gone: look for it")


def test_text_is_for_people() -> None:
    said = _said("text")
    assert said[0].endswith(" I partition 3: snapshot at 812")
    assert said[-1] == "headrace: the store is gone: look for it"
