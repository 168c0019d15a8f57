"""What a worker answers over HTTP, on the loopback, from a thread of its own: its metrics, and whether it is well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import orjson
from prometheus_client import CollectorRegistry, make_wsgi_app

from embedding_store.errors import UsageError

HOST = "127.0.0.1"
CLIENT_SECONDS = 10.0  # a client that says nothing for so long is let go

Respond = Callable[[str, list[tuple[str, str]]], Any]
Route = Callable[[dict[str, Any], Respond], Iterable[bytes]]  # of WSGI


def serve_metrics(
    registry: CollectorRegistry, port: int, unwell: Callable[[], str] = lambda: ""
) -> Callable[[], None]:
    """Answer on 127.0.0.1:`port`; port 0: not at all. Returns what ends it.

    GET /metrics   all of `registry`, for Prometheus
    GET /health    200 {"ok":true}, or 503 {"ok":false,"why":…} with what `unwell` says; "" is well

    Both are asked for in a thread of the listener. Raises UsageError where the port is taken.
    """
    if not port:
        return lambda: None
    routes: dict[str, Route] = {"/metrics": make_wsgi_app(registry), "/health": _health(unwell)}
    try:
        server = make_server(HOST, port, _app(routes), _Server, _Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port} for metrics: choose another metrics_port") from error
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def end() -> None:
        server.shutdown()
        server.server_close()

    return end


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a client in the middle of an answer does not hold the worker up


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


def _app(routes: dict[str, Route]) -> Route:
    def answer(environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        route = routes.get(environ["PATH_INFO"])
        if route is None:
            return _json(respond, "404 Not Found", {"ok": False, "why": f"there are {', '.join(routes)}"})
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _json(respond, "405 Method Not Allowed", {"ok": False, "why": "GET only"}, ("Allow", "GET, HEAD"))
        return route(environ, respond)

    return answer


def _health(unwell: Callable[[], str]) -> Route:
    def answer(environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        why = unwell()
        if why:
            return _json(respond, "503 Service Unavailable", {"ok": False, "why": why})
        return _json(respond, "200 OK", {"ok": True})

    return answer


def _json(respond: Respond, status: str, body: dict[str, Any], *headers: tuple[str, str]) -> Iterable[bytes]:
    respond(status, [("Content-Type", "application/json"), *headers])
    return [orjson.dumps(body)]
