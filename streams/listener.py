"""What a worker answers over HTTP, from a thread of its own: its metrics, and whether it is well."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import orjson
from prometheus_client import CollectorRegistry, Counter, make_wsgi_app

from embedding_store.errors import UsageError
from online_model.serving.access import ADMIN, ALLOWED, HEADERS, PUBLIC, Gate, check_listening, tls_context
from online_model.serving.settings import HttpSettings

log = logging.getLogger("headrace")

CLIENT_SECONDS = 10.0  # a client that says nothing for so long is let go
MAX_CLIENTS = 32  # at once, each with a thread; the next are let go at once
SCOPES = {"/metrics": ADMIN, "/health": PUBLIC, "/healthz": PUBLIC}

Respond = Callable[[str, list[tuple[str, str]]], Any]
Route = Callable[[dict[str, Any], Respond], Iterable[bytes]]  # of WSGI


def serve_metrics(
    registry: CollectorRegistry, port: int, unwell: Callable[[], str] = lambda: "", http: HttpSettings | None = None
) -> Callable[[], None]:
    """Answer on `port` of `http.admin_host`; port 0: not at all. Returns what ends it.

    GET /metrics   all of `registry`, for Prometheus
    GET /health    200 {"ok":true}, or 503 {"ok":false,"why":…} with what `unwell` says; "" is well. Who has no token
                   where there are some is not told why
    GET /healthz   200 {"ok":true} while the process lives: what only waits for Kafka, or is held by the guard, gains
                   nothing by being started again

    All are asked for in a thread of the listener. Raises UsageError where the port is taken, and for `http`.
    """
    if not port:
        return lambda: None
    http = http or HttpSettings()
    gate, context, host = Gate(http), tls_context(http), http.admin_host
    check_listening(http, gate, host, "http.admin_host")
    refused = Counter("headrace_http_refused", "Requests refused, by reason", ["reason"], registry=registry)
    routes: dict[str, Route] = {
        "/metrics": make_wsgi_app(registry), "/health": _health(unwell), "/healthz": _health(lambda: ""),
    }  # fmt: skip
    try:
        server = make_server(host, port, _app(routes, gate, refused), _Server6 if ":" in host else _Server, _Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port} for metrics: choose another metrics_port") from error
    if context is not None:  # the handshake is the client's thread's to wait for
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def end() -> None:
        server.shutdown()
        server.server_close()

    return end


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a client in the middle of an answer does not hold the worker up

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._room = BoundedSemaphore(MAX_CLIENTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or that speaks no TLS, is no news."""
        log.debug("a request was not answered", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


def _app(routes: dict[str, Route], gate: Gate, refused: Counter) -> Route:
    def answer(environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        route, wanted = routes.get(path), SCOPES.get(path) if path in routes else ""
        denial = gate.refuses(wanted, environ.get("HTTP_AUTHORIZATION"), environ.get("HTTP_HOST"))
        environ[ALLOWED] = denial is None
        if denial is not None and wanted != PUBLIC:
            refused.labels(denial.reason).inc()
            gate.tell(denial, environ["REMOTE_ADDR"], path if route is not None else "an unknown path")
            status = f"{denial.status} {HTTPStatus(denial.status).phrase}"
            return _json(respond, status, {"ok": False}, ("WWW-Authenticate", denial.challenge))
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
            told = {"ok": False, "why": why} if environ[ALLOWED] else {"ok": False}
            return _json(respond, "503 Service Unavailable", told)
        return _json(respond, "200 OK", {"ok": True})

    return answer


def _json(respond: Respond, status: str, body: dict[str, Any], *headers: tuple[str, str]) -> Iterable[bytes]:
    safe = [(name.decode(), value.decode()) for name, value in HEADERS]
    respond(status, [("Content-Type", "application/json"), *safe, *headers])
    return [orjson.dumps(body)]
