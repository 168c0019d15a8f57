"""Who may ask: bearer tokens with scopes and an end (RFC 6750), a table of routes that refuses what it does not name.

A Gate is shared by all listeners of a process. It is open only where no token is set, and without one nothing listens
beyond the loopback. Tokens come from a file or the environment; their hashes are kept, compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import math
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from embedding_store.errors import UsageError
from embedding_store.secret import read_secret_file
from online_model.serving.settings import HttpSettings

log = logging.getLogger("headrace")

PUBLIC, SCORE, ADMIN = "public", "score", "admin"  # public: asks for no token, and says nothing but yes or no
SCOPES = frozenset((SCORE, ADMIN))
# Of every answer: no cache keeps it, no browser takes it for something else.
HEADERS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
MIN_TOKEN_CHARS, MAX_TOKEN_CHARS = 16, 256
LOG_EVERY_S = 10.0  # for each reason: strangers must not fill the disk
ALLOWED = "headrace.allowed"  # in ASGI's scope: whether who asks may see why


@dataclass(frozen=True)
class Denial:
    """Why a request is refused. `reason`: for the metrics; `challenge`: of WWW-Authenticate (RFC 6750, section 3)."""

    reason: str
    status: int
    challenge: str


NO_TOKEN = Denial("no-token", 401, "Bearer")
WRONG_TOKEN = Denial("wrong-token", 401, 'Bearer error="invalid_token"')
EXPIRED_TOKEN = Denial("expired-token", 401, 'Bearer error="invalid_token"')  # who asks is not told which of both
WRONG_SCOPE = Denial("wrong-scope", 403, 'Bearer error="insufficient_scope"')
WRONG_HOST = Denial("wrong-host", 403, "Bearer")
NO_ENTRY = Denial("no-entry", 403, "Bearer")
DENIALS = (NO_TOKEN, WRONG_TOKEN, EXPIRED_TOKEN, WRONG_SCOPE, WRONG_HOST, NO_ENTRY)


@dataclass(frozen=True)
class Token:
    """One token's hash, when it ends (seconds since 1970), and what it is for."""

    digest: bytes
    expires_s: float
    scopes: frozenset[str]


class Gate:
    """Lets in who has a token of the right scope. Any thread may ask. `clock`: seconds since 1970.

    Raises UsageError for tokens that cannot be read. A file that is wrong later changes nothing: the last good tokens
    stay, until they expire, and the log says why.
    """

    def __init__(self, settings: HttpSettings | None = None, clock: Callable[[], float] = time.time) -> None:
        settings = settings or HttpSettings()
        self._file, self._clock, self._open_scoring = settings.tokens_file, clock, settings.open_scoring
        self._own: tuple[Token, ...] = ()
        if settings.token is not None:
            text = settings.token.reveal()
            if problem := _problem_with(text):
                raise UsageError(f"http.token {problem}")
            self._own = (Token(_digest(text.encode()), math.inf, SCOPES),)
        self._seen: tuple[int, ...] = ()
        self._told: dict[str, tuple[float, int]] = {}
        self._tokens = self._own
        if self._file is not None:
            self._seen = _stamp(self._file)
            self._tokens = self._own + parse_tokens(self._file)

    @property
    def open(self) -> bool:
        """Whether nobody is asked for a token."""
        return self._file is None and not self._own

    def denies(self, authorization: str | None, scope: str) -> Denial | None:
        """Why a request with this header is not let in, None if it is. `scope`: SCORE, ADMIN, or "": any of them."""
        if self.open or (scope == SCORE and self._open_scoring):
            return None
        kind, _, sent = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not sent:
            return NO_TOKEN
        found = self._find(sent.strip())
        if found is None:
            return WRONG_TOKEN
        if found.expires_s <= self._clock():
            return EXPIRED_TOKEN
        return None if not scope or scope in found.scopes else WRONG_SCOPE

    def refuses(self, wanted: str | None, authorization: str | None, host: str | None) -> Denial | None:
        """As `denies`, of a whole request. `wanted`: the scope of its route, PUBLIC too, None where it has no entry in
        the table; the other two: its headers."""
        if wanted is None:
            return NO_ENTRY
        # Without tokens a page of another site could ask through a visitor's browser, under a name of its own.
        if self.open and not _is_local(host or ""):
            return WRONG_HOST
        return self.denies(authorization, "" if wanted == PUBLIC else wanted)

    def tell(self, denial: Denial, client: str, route: str) -> None:
        """Log a refusal, the first of its reason and then one in LOG_EVERY_S, with how many there were meanwhile."""
        now = time.monotonic()
        last, more = self._told.get(denial.reason, (-math.inf, 0))
        if now - last < LOG_EVERY_S:
            self._told[denial.reason] = (last, more + 1)
            return
        self._told[denial.reason] = (now, 0)
        log.warning("refused %s at %s: %s%s", client, route, denial.reason, f" (and {more:,} before)" if more else "")

    def _find(self, sent: str) -> Token | None:
        """Every token is compared, so that the time says nothing about which one it was."""
        digest, found = _digest(sent.encode("utf-8", "surrogateescape")), None
        for token in self._newest():
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    def _newest(self) -> tuple[Token, ...]:
        if self._file is None or (stamp := _stamp(self._file)) == self._seen:
            return self._tokens
        self._seen = stamp
        try:
            self._tokens = self._own + parse_tokens(self._file)
            log.info("%s was read again: %d tokens", self._file, len(self._tokens))
        except UsageError as error:
            log.error("the tokens were not read again, the last good ones stay: %s", error)
        return self._tokens


def parse_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file: a line each, TOKEN [EXPIRES] [SCOPES]; # begins a comment. Without scopes: score alone.

    EXPIRES: 2027-01-31 (its first moment) or 2027-01-31T18:00:00+01:00; without an offset it is UTC. Raises UsageError,
    which names the line and shows nothing of it.
    """
    tokens = []
    for number, line in enumerate(read_secret_file(path, "http.tokens_file").splitlines(), 1):
        if words := line.partition("#")[0].split():
            try:
                tokens.append(_token(words))
            except ValueError as error:
                raise UsageError(f"http.tokens_file: {path}, line {number}: {error}") from None
    if not tokens:
        raise UsageError(f"http.tokens_file: {path} has no token: write one a line")
    return tuple(tokens)


def _token(words: list[str]) -> Token:
    text, *rest = words
    if problem := _problem_with(text):
        raise ValueError(f"the token {problem}")
    expires_s, scopes = math.inf, frozenset((SCORE,))
    if rest and rest[0][0].isdigit():
        moment = datetime.fromisoformat(rest.pop(0))
        expires_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if rest:
        scopes = frozenset(rest.pop(0).split(","))
    if rest or not scopes <= SCOPES:
        raise ValueError("expected TOKEN [EXPIRES] [SCOPES], scopes being score, admin or score,admin")
    return Token(_digest(text.encode()), expires_s, scopes)


def _problem_with(token: str) -> str:
    if not MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS:
        return f"has not {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS} characters: make one with `openssl rand -hex 32`"
    if not token.isascii() or not token.isprintable() or " " in token:
        return "has characters that no header carries: make one with `openssl rand -hex 32`"
    return ""


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does; () while there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def is_loopback(host: str) -> bool:
    """Of names only localhost: what another one resolves to may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listening(settings: HttpSettings, gate: Gate, host: str, name: str) -> None:
    """Raises UsageError where `host` (the setting `name`) is beyond the loopback, and anybody could ask there."""
    if is_loopback(host):
        return
    if gate.open:
        raise UsageError(
            f"{name} = {host} is beyond the loopback and asks for a token: set http.tokens_file or HEADRACE_HTTP_TOKEN"
        )
    if settings.open_scoring:
        raise UsageError(f"http.open_scoring is for the loopback, and {name} = {host} is beyond it: leave one of them")


def tls_context(settings: HttpSettings) -> ssl.SSLContext | None:
    """Of a server: TLS 1.2 or newer; None where no certificate is set. Raises UsageError."""
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        raise UsageError("http.tls_cert and http.tls_key belong together: set both")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Asked for a passphrase nobody would answer.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"http.tls_cert = {settings.tls_cert}, http.tls_key: not a PEM certificate and its key ({error})"
        ) from None
    return context


class Guard:
    """An app whose every route has a scope in `scopes`, by the route's path. What has none is refused, token or not.

    `refuse`: the answer to a denial. Raises ValueError for a route that is not in the table, or an entry without one.
    """

    def __init__(
        self, app: Starlette, scopes: Mapping[str, str], gate: Gate, refuse: Callable[[Denial], Response]
    ) -> None:
        if odd := set(scopes) ^ {_path(route) for route in app.routes}:
            raise ValueError(f"not both a route and an entry in the table of scopes: {', '.join(sorted(odd))}")
        self._app, self._scopes, self._gate, self._refuse = app, scopes, gate, refuse

    @property
    def routes(self) -> list[BaseRoute]:
        return self._app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no listener speaks anything else
        route = next((route for route in self._app.routes if route.matches(scope)[0] is not Match.NONE), None)
        # To who may not ask at all an unknown path is like any other.
        wanted = "" if route is None else self._scopes.get(_path(route))
        headers = Request(scope).headers
        denial = self._gate.refuses(wanted, headers.get("authorization"), headers.get("host"))
        scope[ALLOWED] = denial is None
        if denial is None or wanted == PUBLIC:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # for the metrics
        client = scope.get("client") or ("unknown",)
        self._gate.tell(denial, client[0], "an unknown path" if route is None else _path(route))
        await self._refuse(denial)(scope, receive, send)


def _path(route: BaseRoute) -> str:
    return getattr(route, "path", "")


def _is_local(host: str) -> bool:
    """Whether a Host header is an address or localhost: a name that another site chose is neither."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", "")
    return True
