"""The life of a worker process: its name in its group, its log lines, its signals, and its end by one line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Lock
from typing import NoReturn

import filelock
import xxhash

from embedding_store.errors import HeadraceError

log = logging.getLogger("headrace")

_member_locks: list[filelock.BaseFileLock] = []  # held until the process ends


def member_name(kind: str, folder: Path) -> str:
    """A name for this process in its group, the same when it is started again over `folder`.

    Kafka then gives it its partitions back at once, instead of waiting for the session of the one that was killed.
    Several workers may share the folder: each holds a lock there, as long as it lives, that numbers it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = xxhash.xxh3_64_hexdigest(f"{socket.gethostname()}\0{folder.resolve()}".encode())
    for number in itertools.count():
        lock = filelock.FileLock(folder / f"worker-{number}.lock")
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(blocking=False)
            _member_locks.append(lock)
            return f"{kind}-{where}-{number}"
    raise AssertionError("not reached")


_dying = Lock()


def die(error: BaseException) -> NoReturn:
    """End the process at once: one line on stderr, exit 1. What is on disk and in Kafka is sound at any moment."""
    if isinstance(error, HeadraceError):
        line = str(error)
    else:
        log.error("not foreseen", exc_info=error)
        line = f"{type(error).__name__}: {error}"
    _dying.acquire()  # and never released: of several threads that find something out one speaks
    sys.stderr.write(f"headrace: {line}\n")
    sys.stderr.flush()
    os._exit(1)


def fail_loudly(task: asyncio.Task) -> None:
    """For `add_done_callback` of a task that nobody awaits: its error is the end of the process."""
    if not task.cancelled() and (error := task.exception()) is not None:
        die(error)


class _Sparse(logging.Filter):
    """Of the libraries' lines of a kind one in ten seconds: they repeat themselves while a broker is away."""

    def __init__(self) -> None:
        super().__init__()
        self._again: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == log.name:
            return True
        kind, now = str(record.msg), time.monotonic()
        if now < self._again.get(kind, 0.0):
            return False
        self._again[kind] = now + 10.0
        return True


def settle() -> None:
    """What is loaded stays: a full collection need not walk through all of torch (a stall of half a second).

    And they become rarer: a slice of records makes and drops tens of thousands of objects and no cycles, so that
    collecting after each 700 of them, as Python does, cost the joiner a quarter of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def configure_logging() -> None:
    """Our own lines on stderr, of the libraries only what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Sparse())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    # it logs each topic that it was told not to create, and each rejoin
    logging.getLogger("faust").setLevel(logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    logging.getLogger("aiokafka.producer.sender").setLevel(logging.CRITICAL)  # tracebacks of what it raises anyway


def run(
    main: Callable[[asyncio.Event], Awaitable[None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run `main(stop)` on an event loop of its own until it returns; SIGTERM and SIGINT set `stop`.

    Any error that `main` raises ends the process (`die`).
    """

    async def supervised() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        settle()
        await main(stop)

    configure_logging()
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(supervised())
    except Exception as error:  # noqa: BLE001 - the end of the process, whatever it is
        die(error)
