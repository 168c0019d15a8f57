"""uvicorn as a replica runs it: a socket of ours, TLS, and an end to what a client may send before it is a request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_store.errors import UsageError
from online_model.serving.access import tls_context
from online_model.serving.settings import HttpSettings

DRAIN_SECONDS = 5
MAX_HEADERS = 100
MAX_HEAD_BYTES = 32_768
MAX_URL_BYTES = 8_192  # an id of 256 characters has 3,072 when each is four bytes, percent-encoded
HEAD_SECONDS = 10.0


class CappedProtocol(HttpToolsProtocol):
    """A request's head ends within MAX_HEAD_BYTES and HEAD_SECONDS, or the connection does; neither uvicorn nor
    llhttp limit them. (Bodies are limited where they are read: app.py.)"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()  # before it is read: line ends before a request count too, and what nobody reads
        super().data_received(data)
        if self._head_timer is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        self._head_is_there()
        size = sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or size > MAX_HEAD_BYTES or len(self.url) > MAX_URL_BYTES:
            raise ValueError("the head of the request is too large")  # the parser stops: 400
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        self.transport.close()


class Server(uvicorn.Server):
    """One listener. `serve` it on a socket of `listen`; `should_exit` lets it drain."""

    def __init__(self, app: ASGIApp, settings: HttpSettings | None = None) -> None:
        """Raises UsageError for a certificate that cannot be used."""
        settings = settings or HttpSettings()
        config = uvicorn.Config(
            app,
            http=CappedProtocol,
            log_config=None,
            log_level="error",  # its warnings are of what strangers send
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # who asks is who connects
            server_header=False,
            ws="none",
            limit_concurrency=settings.connections,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        context = tls_context(settings)
        config.load()
        config.ssl = context
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM is handled by the worker: the long polls are let go first."""
        yield


def listen(host: str, port: int, setting: str = "port") -> socket.socket:
    """A socket that listens; port 0: any free one. Raises UsageError; `setting`: what it calls the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: f"choose another {setting}",
            errno.EACCES: f"ports below 1024 need rights, choose another {setting}",
        }
        remedy = remedies.get(error.errno or 0, f"{error.strerror}; is it an address of this machine?")
        raise UsageError(f"cannot listen on {host}:{port}: {remedy}") from error
