"""The log lines of a worker, on stderr: text for people, or one JSON object a line for what collects them.

    {"ts":"2026-11-30T05:28:32.120Z","level":"info","worker":"join","message":"snapshot at 812","partition":3}

A line has those of FIELDS that it is about, by `extra=` of the standard library's logging; its message has them too.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import orjson

Style: TypeAlias = Literal["text", "json"]

OURS = "headrace"  # the name of our own logger
FIELDS = ("partition", "offset", "epoch", "sequence", "request_id", "instance", "method", "route", "status", "seconds")
SPARSE_SECONDS = 10.0

_json: JsonLines | None = None  # how lines are written in this process; None: as text


class JsonLines(logging.Formatter):
    """A record as one line of JSON, time in UTC."""

    def __init__(self, worker: str) -> None:
        """worker: which of the processes says it."""
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        more = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.name != OURS:
            more["logger"] = record.name
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        return self.line(record.created, record.levelname.lower(), record.getMessage(), more)

    def line(self, at: float, level: str, message: str, more: Mapping[str, Any]) -> str:
        """`at`: seconds since 1970."""
        ts = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {"ts": ts, "level": level, "worker": self._worker, "message": message, **more}
        return orjson.dumps({name: _sound(value) for name, value in said.items()}, default=str).decode()


def _sound(value: Any) -> Any:
    """Half of a surrogate pair, as in a path that is no UTF-8, is not JSON's to hold."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def configure(style: Style, worker: str) -> None:
    """Our own lines on stderr, of the libraries only what goes wrong."""
    global _json
    _json = JsonLines(worker) if style == "json" else None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json or logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Sparse())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(OURS).setLevel(logging.INFO)
    # it logs each topic that it was told not to create, and each rejoin
    logging.getLogger("faust").setLevel(logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    logging.getLogger("aiokafka.producer.sender").setLevel(logging.CRITICAL)  # tracebacks of what it raises anyway


def last_line(message: str) -> str:
    """The line with which a process ends."""
    return f"headrace: {message}" if _json is None else _json.line(time.time(), "critical", message, {})


class _Sparse(logging.Filter):
    """Of the libraries' lines of a kind one in ten seconds: they repeat themselves while a broker is away."""

    def __init__(self) -> None:
        super().__init__()
        self._again: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == OURS:
            return True
        kind, now = str(record.msg), time.monotonic()
        if now < self._again.get(kind, 0.0):
            return False
        self._again[kind] = now + SPARSE_SECONDS
        return True
