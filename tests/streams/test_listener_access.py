"""Who may ask the listener of a worker what: as for a replica (tests/online_model/serving/test_access.py)."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trustme
from prometheus_client import CollectorRegistry, Counter

from deploy.processes import free_port
from embedding_store.errors import UsageError
from embedding_store.secret import Secret
from online_model.serving.access import ADMIN, PUBLIC
from online_model.serving.client import authorization
from online_model.serving.settings import HttpSettings
from streams import listener
from streams.listener import SCOPES, serve_metrics

SCORES, ADMINS, ENDED = "score-" + "s" * 20, "admin-" + "a" * 20, "ended-" + "e" * 20
WRONG = "wrong-" + "w" * 20
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS")


@pytest.fixture
def tokens(tmp_path: Path) -> HttpSettings:
    path = tmp_path / "tokens"
    path.write_text(f"{SCORES}\n{ADMINS} admin\n{ENDED} 2020-01-01 score,admin\n")
    return HttpSettings(token_file=path)


@contextmanager
def listening(http: HttpSettings, unwell: Callable[[], str] = lambda: "records wait") -> Iterator[tuple[int, object]]:
    registry, port = CollectorRegistry(), free_port()
    Counter("some", "Some", registry=registry)
    end = serve_metrics(registry, port, unwell, http)
    yield port, registry
    end()


@pytest.mark.parametrize(
    ("token", "status"), [(None, 401), (WRONG, 401), (ENDED, 401), (SCORES, 403), (ADMINS, 200)],
    ids=["none", "wrong", "expired", "score", "admin"],
)  # fmt: skip
def test_every_route(tokens: HttpSettings, token: str | None, status: int, caplog: pytest.LogCaptureFixture) -> None:
    assert SCOPES == {"/metrics": ADMIN, "/health": PUBLIC, "/healthz": PUBLIC}
    headers = authorization(Secret(token) if token else None)
    with (
        caplog.at_level(logging.WARNING, "headrace"), listening(tokens) as (port, registry),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as http,
    ):  # fmt: skip
        for method in METHODS:
            allowed = 200 if method == "GET" else 405
            assert http.request(method, "/metrics").status_code == (allowed if status == 200 else status)
            assert http.request(method, "/health").status_code == (503 if method == "GET" else 405)
            assert http.request(method, "/none").status_code == (401 if status == 401 else 404)
        health = http.get("/health")
        assert health.json() == ({"ok": False} if status == 401 else {"ok": False, "why": "records wait"})
        assert health.headers["x-content-type-options"] == "nosniff"
        refused = sum(s.value for m in registry.collect() for s in m.samples if s.name == "headrace_http_refused_total")  # type: ignore[attr-defined]
        assert refused == {401: 10, 403: 5, 200: 0}[status]
    assert bool("refused 127.0.0.1 at /metrics" in caplog.text) == (status != 200)
    assert not [t for t in (SCORES, ADMINS, ENDED, WRONG) if t in caplog.text]


def test_without_tokens_another_sites_name_is_refused() -> None:
    with listening(HttpSettings()) as (port, _), httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        assert http.get("/metrics").status_code == 200
        assert http.get("/metrics", headers={"Host": "evil.example"}).status_code == 403


def test_it_does_not_listen_beyond_the_loopback_without_a_token() -> None:
    with pytest.raises(UsageError, match=r"http\.admin_host = 0\.0\.0\.0 is beyond the loopback"):
        serve_metrics(CollectorRegistry(), free_port(), http=HttpSettings(admin_host="0.0.0.0"))  # noqa: S104


def test_over_tls(tokens: HttpSettings, tmp_path: Path) -> None:
    authority, trusting = trustme.CA(), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    authority.configure_trust(trusting)
    pem = tmp_path / "both.pem"
    with listening(HttpSettings(token_file=tokens.token_file, tls_cert=pem, tls_key=pem)) as (port, _):
        silent = socket.create_connection(("127.0.0.1", port))  # a handshake that never comes holds nobody up
        headers = authorization(Secret(ADMINS))
        assert httpx.get(f"https://127.0.0.1:{port}/metrics", headers=headers, verify=trusting).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")
        silent.close()


def test_more_clients_than_there_are_threads_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CLIENTS", 2)
    with listening(HttpSettings(), lambda: "") as (port, _):
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as third:
            assert third.recv(1) == b""
        for connection in held:
            connection.close()
