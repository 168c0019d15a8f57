"""Child processes that end with their parent, ports that are free, and files that are never half written."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import psutil

from embedding_store.errors import HeadraceError, UsageError

# Below Linux's ephemeral range (32768 and up): a port kept for the next start is then never in use as the near end
# of somebody's outgoing connection.
PORTS = range(20_000, 32_000)

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: after a fork is no time to load a library


def ends_with_parent() -> Callable[[], None]:
    """A `preexec_fn` for Popen: the child gets SIGTERM when the thread that started it ends, even by kill -9.

    The kernel ties this to the parent's *thread* (man 2 PR_SET_PDEATHSIG): start such a child from a thread that
    lives as long as the child should, the main thread at best, never from a short-lived pool thread. Linux only.
    """
    parent = os.getpid()

    def in_child() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the line above: no signal will come
            os._exit(1)

    return in_child


def terminate(process: psutil.Process | subprocess.Popen, grace_s: float = 20.0) -> bool:
    """SIGTERM, wait up to `grace_s` seconds, then SIGKILL. True if the process ended by itself (or had ended)."""
    try:
        process.terminate()
        process.wait(grace_s)
    except psutil.NoSuchProcess:
        return True
    except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        return False
    return True


def is_free(port: int) -> bool:
    """Whether a server can listen on this port of 127.0.0.1; ports below 1024 may need rights that we do not have."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not "taken"
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def free_port(*, besides: int | None = None) -> int:
    """A port of 127.0.0.1 on which nobody listens now, other than `besides`."""
    draw = random.SystemRandom()  # a seeded global generator would send every test to the same ports
    while (port := draw.choice(PORTS)) == besides or not is_free(port):
        pass
    return port


def listener(port: int) -> str:
    """Who listens on a TCP port of this machine, as " (pid 12, java)"; "" when that cannot be seen."""
    process = listening(port)
    try:
        return f" (pid {process.pid}, {process.name()})" if process is not None else ""
    except psutil.Error:
        return ""


def listening(port: int) -> psutil.Process | None:
    """The process that listens on a TCP port of this machine; None where that cannot be seen."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    except psutil.Error:
        pass
    return None


def write_atomically(path: Path, text: str, private: bool = False) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old text or the new one. Raises OSError.

    private: for its owner only, from the beginning.
    """
    partial = path.with_name(path.name + ".partial")
    if private:
        partial.unlink(missing_ok=True)
        partial.touch(0o600)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def alone(lock: Path, what: str, remedy: str) -> Iterator[None]:
    """One `what` at a time on the directory of `lock`. The kernel frees it with its process, however that ends.

    Raises UsageError with the `remedy` where it is held, HeadraceError where the directory cannot be used.
    """
    home = lock.parent
    held = filelock.FileLock(lock)
    try:
        home.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(
            f"a {what} runs on {home} already: {remedy}, or give this one another place with --data-dir"
        ) from None
    except OSError as error:
        raise HeadraceError(f"{home} cannot be used: {error.strerror}; choose another --data-dir") from None
    try:
        yield
    finally:
        held.release()
