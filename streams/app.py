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
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Lock
from typing import NoReturn

import filelock
import xxhash

from embedding_store.errors import HeadraceError
from streams.logs import Style, configure, last_line

log = logging.getLogger("headrace")

STOP_SECONDS = 45.0  # after a signal to end: who has not ended by then waits for something that does not come

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
    sys.stderr.write(last_line(line) + "\n")
    sys.stderr.flush()
    os._exit(1)


def fail_loudly(task: asyncio.Task) -> None:
    """For `add_done_callback` of a task that nobody awaits: its error is the end of the process."""
    if not task.cancelled() and (error := task.exception()) is not None:
        die(error)


def settle() -> None:
    """What is loaded stays: a full collection need not walk through all of torch (a stall of half a second).

    And they become rarer: a slice of records makes and drops tens of thousands of objects and no cycles, so that
    collecting after each 700 of them, as Python does, cost the joiner a quarter of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def run(
    main: Callable[[asyncio.Event], Awaitable[None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
    *,
    worker: str = "",
    logs: Style = "text",
) -> None:
    """Run `main(stop)` on an event loop of its own until it returns; SIGTERM and SIGINT set `stop`.

    Any error that `main` raises ends the process (`die`), and so does a `main` that goes on for STOP_SECONDS after
    `stop` was set (clients of Kafka wait for it without an end). worker, logs: what its log lines say, and how.
    """

    async def supervised() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def end() -> None:
            stop.set()
            why = f"not drained after {STOP_SECONDS:.0f} s, is Kafka away? What was committed is kept; start it again"
            # Not of the loop: the process is to end also where that stands still, or is over and threads are left.
            last = threading.Timer(STOP_SECONDS, die, [HeadraceError(why)])
            last.daemon = True
            last.start()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        settle()
        await main(stop)

    configure(logs, worker)
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(supervised())
    except Exception as error:  # noqa: BLE001 - the end of the process, whatever it is
        die(error)
