"""The HTTP face of a replica: rank, recommend, model, health and metrics.

Every answer but the metrics is JSON; every refusal is {"error": "one line"}: 400 not JSON, 404, 405, 413 too large,
422 not what was asked for, 503 no model or no item yet.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import orjson
from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from online_model.serving.api import MAX_BODY_BYTES, ModelQuery, RankRequest, RecommendRequest
from online_model.serving.errors import NotReady
from online_model.serving.holder import Holder
from online_model.serving.metrics import Metrics

T = TypeVar("T", bound=Struct)
MAX_ERROR_CHARS = 300


def create_app(holder: Holder, max_age_ms: int = 60_000, clock: Callable[[], float] = time.time) -> ASGIApp:
    """The ASGI app over `holder`. `/readyz` fails past `max_age_ms` without a version; `clock`: seconds since 1970."""
    routes = {
        "/v1/rank": ("POST", _rank),
        "/v1/recommend": ("POST", _recommend),
        "/v1/model": ("GET", _model),
        "/healthz": ("GET", _healthz),
        "/readyz": ("GET", _readyz),
        "/metrics": ("GET", _metrics),
    }
    app = Starlette(
        routes=[Route(path, handler, methods=[method]) for path, (method, handler) in routes.items()],
        exception_handlers={HTTPException: _refused, NotReady: _not_ready, Exception: _failed},
    )
    app.router.redirect_slashes = False
    app.state.holder, app.state.max_age_ms, app.state.clock = holder, max_age_ms, clock
    app.state.turn = asyncio.Lock()
    return _Measured(app, holder.metrics, frozenset(routes))


async def _rank(request: Request) -> Response:
    asked, holder = await _body(request, RankRequest), _holder(request)
    holder.metrics.candidates("rank", len(asked.candidates))
    async with _turn(request):
        answer = holder.replica.rank(asked)
    return _json(answer)


async def _recommend(request: Request) -> Response:
    asked, holder = await _body(request, RecommendRequest), _holder(request)
    async with _turn(request):
        answer = holder.replica.recommend(asked)
    holder.metrics.candidates("recommend", answer.candidates)
    return _json(answer)


async def _model(request: Request) -> Response:
    try:
        asked = msgspec.convert(dict(request.query_params), ModelQuery, strict=False)
    except msgspec.ValidationError as error:
        raise HTTPException(422, str(error)) from None
    holder = _holder(request)
    if asked.wait_ms:
        await holder.newer_than(asked.newer_than, asked.wait_ms / 1000)
    return _json(holder.replica.info())


async def _healthz(request: Request) -> Response:
    return _json({"ok": True})


async def _readyz(request: Request) -> Response:
    reason = _not_ready_because(_holder(request), request.app.state.max_age_ms, request.app.state.clock())
    return _json({"error": reason}, 503, _RETRY) if reason else _json({"ok": True})


def _not_ready_because(holder: Holder, max_age_ms: int, now_s: float) -> str:
    if holder.replica.sequence < 0:
        return "no version yet: is the trainer running?"
    if holder.behind:
        return holder.behind
    age_ms = math.ceil(now_s * 1000) - holder.replica.created_ms
    if age_ms > max_age_ms:
        return f"the newest version is {age_ms:,} ms old, more than {max_age_ms:,}: is the trainer running?"
    return ""


async def _metrics(request: Request) -> Response:
    metrics = _holder(request).metrics
    return Response(metrics.text(), media_type=metrics.content_type)


async def _body(request: Request, type_: type[T]) -> T:
    """The request's body as `type_`. Raises HTTPException 400, 413 or 422."""
    try:
        return msgspec.json.decode(await _read(request), type=type_)
    except msgspec.ValidationError as error:
        raise HTTPException(422, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away before the body's end") from None


async def _read(request: Request) -> bytes:
    """The whole body; refused as soon as it is known to be too large, so that it is never held in memory."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


@asynccontextmanager
async def _turn(request: Request) -> AsyncIterator[None]:
    """One request is scored at a time, and between two the loop looks at its sockets: where more come than can be
    answered they wait for each other, and versions for one of them."""
    async with request.app.state.turn:
        await asyncio.sleep(0)
        yield


def _holder(request: Request) -> Holder:
    return request.app.state.holder


_RETRY = {"Retry-After": "1"}


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    line = " ".join(error.detail.split())[:MAX_ERROR_CHARS]  # it may quote what was sent
    return _json({"error": line}, error.status_code, dict(error.headers or {}))


async def _not_ready(request: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, 503, _RETRY)


async def _failed(request: Request, error: Exception) -> Response:
    # The traceback goes to the server's log (starlette raises it again after this answer), never to the client.
    return _json({"error": "internal error: see the replica's log"}, 500)


class _Measured:
    """Counts each request by route and status. Unknown paths share one label: strangers must not make metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            status = 499  # the client went away during a long poll
            raise
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request(route, status, time.perf_counter() - start)
