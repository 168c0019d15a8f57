"""Who may ask what: every route of every listener, without a token, with a wrong, an expired and the right one."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from embedding_store.errors import UsageError
from embedding_store.secret import Secret
from online_model.serving import access, server
from online_model.serving.access import ADMIN, PUBLIC, SCORE, Gate, Guard, check_listening, tls_context
from online_model.serving.app import ROUTES, App, create_admin_app, create_app
from online_model.serving.client import AsyncClient, authorization
from online_model.serving.holder import Holder
from online_model.serving.problems import denial
from online_model.serving.server import MAX_HEADERS, Server, listen
from online_model.serving.settings import HttpSettings
from tests.online_model.serving.served import serving, until
from tests.online_model.serving.world import replica, world

pytestmark = pytest.mark.usefixtures("one_thread")

NOW_S = 1_800_000_000.0  # 2027-01-15
SCORES, ADMINS, ENDED = "score-" + "s" * 20, "admin-" + "a" * 20, "ended-" + "e" * 20
WRONG = "wrong-" + "w" * 20
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture
def tokens(tmp_path: Path) -> HttpSettings:
    path = tmp_path / "tokens"
    path.write_text(
        f"# of the tests\n{SCORES} 2028-01-01\n{ADMINS} admin  # Prometheus\n{ENDED} 2027-01-01 score,admin\n"
    )
    return HttpSettings(token_file=path)


def apps(gate: Gate) -> Iterator[tuple[App, dict[str, str]]]:
    """Each listener that a replica may have, with its routes' scopes."""
    holder = Holder(replica(world()))
    whole = create_app(holder, max_age_ms=1 << 50, gate=gate)
    scoring = create_app(Holder(replica(world())), max_age_ms=1 << 50, gate=gate, admin=False)
    for app in (whole, scoring, create_admin_app(holder, gate, whole.turns)):
        yield app, {route.path: scope for route, scope in ROUTES if route in app.routes}


async def statuses(app: App, token: str | None, methods: tuple[str, ...] = METHODS) -> dict[tuple[str, str], int]:
    """(method, path) → status, of every route and a path that is none."""
    headers = authorization(Secret(token) if token else None)
    found = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        for path in [*(route.path for route in app.routes), "/none"]:
            for method in methods:
                url = path.replace("{id:headrace_id}", "1")
                found[method, path] = (await http.request(method, url, headers=headers)).status_code
    return found


@pytest.mark.parametrize(
    ("token", "has", "otherwise"),
    [(None, (), 401), (WRONG, (), 401), (ENDED, (), 401), (SCORES, (SCORE,), 403), (ADMINS, (ADMIN,), 403)],
    ids=["none", "wrong", "expired", "score", "admin"],
)
def test_every_route_of_every_listener(tokens: HttpSettings, token: str | None, has: tuple[str, ...], otherwise: int):
    for app, scopes in apps(Gate(tokens, lambda: NOW_S)):
        for (method, path), status in asyncio.run(statuses(app, token)).items():
            if path == "/none":
                assert status == (404 if has else 401)
            elif scopes[path] in (PUBLIC, *has):
                assert status not in (401, 403), f"{method} {path}"
            else:
                assert status == otherwise, f"{method} {path}"


def test_the_listener_for_scoring_has_no_admin_routes(tokens: HttpSettings):
    whole, scoring, admin = (set(scopes) for _, scopes in apps(Gate(tokens)))
    assert admin == {"/metrics", "/openapi.json", "/docs"}
    assert scoring | admin == whole
    assert not scoring & admin


def test_without_tokens_everything_answers_on_the_loopback():
    for app, _ in apps(Gate()):
        for (method, path), status in asyncio.run(statuses(app, None)).items():
            assert status not in (401, 403), f"{method} {path}"


def test_nothing_is_set_over_http(tokens: HttpSettings):
    """Only the two questions have a body at all; whatever it says beside them is refused (test_app.py)."""
    gate = Gate(HttpSettings(token=Secret("t" * 32)))
    for app, _ in apps(gate):
        found = asyncio.run(statuses(app, "t" * 32, ("POST", "PUT", "PATCH", "DELETE")))
        taken = {asked for asked, status in found.items() if status not in (404, 405)}
        assert taken <= {("POST", "/v1/rank"), ("POST", "/v1/recommend")}


def test_a_route_that_is_not_in_the_table_is_refused(tokens: HttpSettings):
    async def answer(request: Request) -> Response:
        return Response("open")

    app = Starlette(routes=[Route("/open", answer)])
    with pytest.raises(ValueError, match="/open"):
        Guard(app, {}, Gate(), denial)
    guard = Guard(app, {"/open": ADMIN}, Gate(tokens, lambda: NOW_S), denial)
    app.router.routes.insert(0, Route("/late", answer))

    async def run() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1") as http:
            return [
                (await http.get(path, headers=authorization(Secret(ADMINS)))).status_code for path in ("/open", "/late")
            ]

    assert asyncio.run(run()) == [200, 403]


def test_refusals_are_opaque_counted_and_logged_without_the_token(
    tokens: HttpSettings, caplog: pytest.LogCaptureFixture
):
    holder = Holder(replica(world()))
    app = create_app(holder, max_age_ms=1 << 50, gate=Gate(tokens, lambda: NOW_S))

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            sent = (None, WRONG, ENDED, SCORES)
            return [await http.get("/metrics", headers=authorization(Secret(t) if t else None)) for t in sent]

    with caplog.at_level(logging.WARNING, "headrace"):
        none, wrong, ended, other = asyncio.run(run())
    assert [r.status_code for r in (none, wrong, ended, other)] == [401, 401, 401, 403]
    assert (wrong.content, wrong.headers) == (ended.content, ended.headers)  # who guesses learns nothing
    assert none.headers["www-authenticate"] == "Bearer"
    assert 'error="insufficient_scope"' in other.headers["www-authenticate"]
    text = holder.metrics.text().decode()
    for reason in ("no-token", "wrong-token", "expired-token", "wrong-scope"):
        assert f'headrace_serve_refused_total{{reason="{reason}"}} 1.0' in text
        assert f"refused 127.0.0.1 at /metrics: {reason}" in caplog.text
    assert not [token for token in (SCORES, ADMINS, ENDED, WRONG) if token in caplog.text]


def test_a_flood_of_refusals_is_a_line_of_the_log_in_ten_seconds(
    tokens: HttpSettings, caplog: pytest.LogCaptureFixture
):
    gate = Gate(tokens)
    for _ in range(1_000):
        gate.tell(access.NO_TOKEN, "203.0.113.7", "/v1/rank")
    assert len(caplog.records) == 1


def test_ready_says_why_not_only_to_who_may_know(tokens: HttpSettings):
    def ready(gate: Gate, token: str | None) -> str:
        async def run() -> httpx.Response:
            app = create_app(Holder(replica()), gate=gate)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
                return await http.get("/readyz", headers=authorization(Secret(token) if token else None))

        answer = asyncio.run(run())
        assert answer.status_code == 503
        return answer.json()["detail"]

    gate = Gate(tokens, lambda: NOW_S)
    assert "trainer" in ready(Gate(), None)
    assert "trainer" in ready(gate, SCORES)
    assert "trainer" not in ready(gate, None) + ready(gate, WRONG) + ready(gate, ENDED)


def test_tokens_change_and_end_without_a_restart(tokens: HttpSettings, caplog: pytest.LogCaptureFixture):
    now = [NOW_S]
    gate, path = Gate(tokens, lambda: now[0]), tokens.token_file
    assert path is not None
    assert gate.denies(f"Bearer {SCORES}", SCORE) is None
    now[0] = 1_830_297_600.0  # 2028-01-01T00:00:00Z
    assert gate.denies(f"Bearer {SCORES}", SCORE) is access.EXPIRED_TOKEN
    new = "fresh-" + "f" * 20
    replace(path, f"{new} 2029-01-01T00:00:00+01:00 score,admin\n")
    assert gate.denies(f"bearer {new}", ADMIN) is None
    assert gate.denies(f"Bearer {ADMINS}", ADMIN) is access.WRONG_TOKEN
    for broken in ("", "short\n", f"{ADMINS} someday\n", f"{ADMINS} root\n"):
        replace(path, broken)
        assert gate.denies(f"Bearer {new}", ADMIN) is None, "the last good ones stay"
    path.unlink()
    assert gate.denies(f"Bearer {new}", ADMIN) is None
    assert "not read again" in caplog.text
    assert ADMINS not in caplog.text


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic dDp0", f"Token {ADMINS}", ADMINS, "Bearer \udcff\udcfe"]
)
def test_other_headers_let_nobody_in(tokens: HttpSettings, header: str):
    assert Gate(tokens, lambda: NOW_S).denies(header, ADMIN) in (access.NO_TOKEN, access.WRONG_TOKEN)


@pytest.mark.parametrize(
    "line", ["short", f"{ADMINS} 2027-99-99", f"{ADMINS} root", f"{ADMINS} admin more", "é" * 20, "# none"]
)
def test_wrong_tokens_are_refused_at_start_without_being_shown(tmp_path: Path, line: str):
    path = tmp_path / "tokens"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=r"http\.token_file") as error:
        Gate(HttpSettings(token_file=path))
    assert ADMINS not in str(error.value)
    with pytest.raises(UsageError, match=r"http\.token has not 16 to 256 characters"):
        Gate(HttpSettings(token=Secret("password")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "headrace.example", "127.0.0.1.example"])  # noqa: S104
def test_nothing_listens_beyond_the_loopback_without_a_token(tokens: HttpSettings, host: str):
    with pytest.raises(UsageError, match=r"set http\.token_file or HEADRACE_HTTP_TOKEN"):
        check_listening(HttpSettings(), Gate(), host, "http.host")
    check_listening(tokens, Gate(tokens), host, "http.host")
    open_scoring = HttpSettings(token_file=tokens.token_file, open_scoring=True)
    with pytest.raises(UsageError, match="open_scoring is for the loopback"):
        check_listening(open_scoring, Gate(open_scoring), host, "http.host")
    for near in ("127.0.0.1", "::1", "localhost"):
        check_listening(HttpSettings(), Gate(), near, "http.host")


def test_scoring_may_be_open_and_the_rest_not(tokens: HttpSettings):
    gate = Gate(HttpSettings(token_file=tokens.token_file, open_scoring=True))
    assert gate.denies(None, SCORE) is None
    assert gate.denies(None, ADMIN) is access.NO_TOKEN


def test_without_tokens_another_sites_name_is_refused():
    """A page of another site whose name resolves to 127.0.0.1 asks with that name as Host."""
    app = create_app(Holder(replica(world())), gate=Gate())

    async def run() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            hosts = ("127.0.0.1:8080", "localhost:1", "[::1]:80", "evil.example", "127.0.0.1.evil.example:80")
            return [(await http.get("/v1/model", headers={"Host": host})).status_code for host in hosts]

    assert asyncio.run(run()) == [200, 200, 200, 403, 403]


def test_without_tokens_a_page_of_another_site_has_no_effect():
    """It can send a body to 127.0.0.1 through a visitor's browser, which then says in Origin where it comes from."""
    app = create_app(Holder(replica(world())), gate=Gate())

    async def run() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:80") as http:
            sites = ("http://127.0.0.1", "https://evil.example", "http://127.0.0.1:81", "null")
            asked = [await http.post("/v1/recommend", json={"user": 1}, headers={"Origin": site}) for site in sites]
            return [answer.status_code for answer in asked]

    assert asyncio.run(run()) == [200, 403, 403, 403]


def test_no_cache_keeps_an_answer_and_no_browser_guesses_its_type():
    for app, scopes in apps(Gate()):

        async def run(app: App = app, paths: tuple[str, ...] = (*scopes, "/none")) -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
                for path in paths:
                    headers = (await http.get(path)).headers
                    assert headers["cache-control"] == "no-store"
                    assert headers["x-content-type-options"] == "nosniff"

        asyncio.run(run())


# --- over real connections


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    """Certificate, key, and who trusts it."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued, trusting = authority.issue_cert("127.0.0.1"), ssl.create_default_context()
    issued.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    authority.configure_trust(trusting)
    return folder / "both.pem", folder / "both.pem", trusting


def test_over_tls_with_a_token(tokens: HttpSettings, certificate: tuple[Path, Path, ssl.SSLContext]):
    cert, key, trusting = certificate
    settings = HttpSettings(token_file=tokens.token_file, tls_cert=cert, tls_key=key)

    async def run() -> None:
        app = create_app(Holder(replica(world())), 1 << 50, gate=Gate(settings, lambda: NOW_S))
        listening = listen("127.0.0.1", 0)
        web = Server(app, settings)
        running = asyncio.create_task(web.serve([listening]))
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        async with AsyncClient(url, token=Secret(SCORES), tls=trusting) as http:
            assert (await http.model()).sequence >= 0
        async with AsyncClient(url) as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.model()
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.TransportError):  # no TLS
                await http.get(url.replace("https", "http") + "/healthz")
        web.should_exit = True
        await running

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext]):
    (tmp_path / "no.pem").write_text("no")
    assert tls_context(HttpSettings()) is None
    for cert, key in (
        (tmp_path / "no.pem", certificate[1]),
        (tmp_path / "none", certificate[1]),
        (certificate[0], None),
    ):
        with pytest.raises(UsageError, match=r"http\.tls_") as error:
            tls_context(HttpSettings(tls_cert=cert, tls_key=key))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000,  # and no end
        b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
        b"GET /v1/items/1/similar?k=" + b"1" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * 20_000,
    ],
    ids=["headers", "no-end", "header", "query", "nothing"],
)
def test_a_head_that_is_too_large_ends_the_connection(head: bytes):
    async def run() -> None:
        async with serving() as it:
            reader, writer = await asyncio.open_connection(it.host, it.port)
            writer.write(head)
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
            writer.close()
            assert (await it.http.get("/healthz")).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize(
    "first", [b"", b"GET /healthz HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]
)
def test_who_sends_no_whole_head_is_let_go(monkeypatch: pytest.MonkeyPatch, first: bytes):
    """At the start of a connection, and after an answer."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)

    async def run() -> None:
        async with serving() as it:
            reader, writer = await asyncio.open_connection(it.host, it.port)
            writer.write(first)
            if first.endswith(b"\r\n\r\n"):
                await reader.readuntil(b'{"ok":true}')
                writer.write(b"GET /hea")
            assert await asyncio.wait_for(reader.read(), 4) == b"", "uvicorn lets go of what says nothing after 5 s"
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_more_connections_than_are_allowed_are_refused():
    async def run() -> None:
        web = Server(create_app(Holder(replica(world()))), HttpSettings(connections=3))
        listening = listen("127.0.0.1", 0)
        running = asyncio.create_task(web.serve([listening]))
        host, port = listening.getsockname()
        idle = [await asyncio.open_connection(host, port) for _ in range(3)]
        await until(lambda: len(web.server_state.connections) == 3)
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
            assert (await http.get("/healthz")).status_code == 503
            for _, writer in idle:
                writer.close()
            await until(lambda: len(web.server_state.connections) <= 1)
            assert (await http.get("/healthz")).status_code == 200
        web.should_exit = True
        await running

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize(
    "body", [b"[" * 10_000 + b"]" * 10_000, b'{"user": ' + b'{"a":' * 100_000, b'{"x": ' + b"[" * 400_000]
)
def test_a_body_that_is_nested_deeply_is_refused(body: bytes):
    async def run() -> None:
        async with serving() as it:
            answer = await it.http.post("/v1/rank", content=body)
            assert answer.status_code in (400, 422)
            assert answer.headers["content-type"] == "application/problem+json"

    asyncio.run(run())
