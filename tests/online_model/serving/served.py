"""A replica of the tests' world behind the real server: in the loop of a test, or in a process of its own.

    python -m tests.online_model.serving.served '{"waiting": 4}' 20

serves under these limits; scoring takes 20 ms more than it would. Prints its port and serves until its input ends.
A request with the header `x-leak` leaks that many bytes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import torch
import uvicorn
import uvloop

from online_model.serving.app import App, create_app
from online_model.serving.holder import Holder
from online_model.serving.replica import Replica
from online_model.serving.server import Server
from online_model.serving.settings import Limits
from tests.online_model.serving.world import replica, world


@dataclass(frozen=True)
class Served:
    """Where it listens, and its process."""

    url: str
    pid: int


@contextmanager
def served(limits: dict[str, Any] | None = None, slow_ms: int = 0) -> Iterator[Served]:
    """A replica that answers, under these limits (in a test's own process its client would be measured too)."""
    command = [sys.executable, "-m", __name__, msgspec.json.encode(limits or {}).decode(), str(slow_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        port = process.stdout.readline().strip()
        assert port, "it ended before it listened"
        yield Served(f"http://127.0.0.1:{port}", process.pid)
        process.stdin.close()
        assert process.wait(20) == 0


async def until(true: Callable[[], bool]) -> None:
    """What comes over sockets has no event to wait for."""
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


class Serving:
    """The server of a replica in the loop of the test, which can take the turn itself."""

    def __init__(self, app: App, holder: Holder) -> None:
        self.app, self.holder = app, holder
        listening = socket.create_server(("127.0.0.1", 0))
        self._server = Server(app)
        self._running = asyncio.create_task(self._server.serve([listening]))
        self.host, self.port = listening.getsockname()
        self.url = f"http://{self.host}:{self.port}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=10)

    async def stop(self) -> None:
        """No more answers. It may be called again."""
        self._server.should_exit = True
        await self._running

    async def raw(self, body: bytes, length: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which this much of a request to rank has been sent."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"POST /v1/rank HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length or len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer


@asynccontextmanager
async def serving(made: Replica | None = None, **limits: int) -> AsyncIterator[Serving]:
    """Over `made`, else over a replica of the usual world."""
    holder = Holder(replica(world()) if made is None else made)
    holder.policy.limits = Limits(**limits)
    app = create_app(holder, max_age_ms=1 << 50)
    it = Serving(app, holder)
    async with it.http:
        yield it
    await it.stop()


async def _serve(limits: str, slow_ms: int) -> None:
    class Slow(Replica):
        def rank(self, *args, **kwargs):
            time.sleep(slow_ms / 1000)
            return super().rank(*args, **kwargs)

    made = replica(world())
    made.__class__ = Slow
    made.policy.limits = msgspec.json.decode(limits, type=Limits)
    app = create_app(Holder(made), max_age_ms=1 << 50)
    kept: list[bytes] = []

    async def leaking(scope, receive, send) -> None:
        if leak := dict(scope.get("headers", ())).get(b"x-leak"):
            kept.append(os.urandom(int(leak)))
        await app(scope, receive, send)

    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(leaking, log_level="error", access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve([listening]))
    print(listening.getsockname()[1], flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the worker has it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1], int(sys.argv[2])))
