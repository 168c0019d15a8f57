"""The HTTP face of a replica: rank, recommend, similar, model, health, metrics, and what all of these are.

Every answer but the metrics and the page of documentation is JSON; every refusal is a problem document (`problems.py`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from functools import lru_cache, partial
from typing import Any, TypeVar

import msgspec
import orjson
from msgspec import Struct
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from online_model.serving.access import ADMIN, ALLOWED, HEADERS, PUBLIC, SCORE, Denial, Gate, Guard
from online_model.serving.api import (
    MAX_BODY_BYTES,
    MAX_ID_CHARS,
    ModelQuery,
    RankRequest,
    RecommendRequest,
    SimilarQuery,
)
from online_model.serving.docs import page
from online_model.serving.errors import NotReady
from online_model.serving.holder import Holder
from online_model.serving.metrics import Metrics
from online_model.serving.openapi import document
from online_model.serving.problems import (
    BODY_TIMEOUT,
    BODY_TOO_LARGE,
    INVALID,
    NOT_JSON,
    GoneAway,
    Refused,
    denial,
    handlers,
)
from online_model.serving.settings import Limits
from online_model.serving.turns import Turns

log = logging.getLogger("headrace")

T = TypeVar("T", bound=Struct)
REQUEST_ID = "headrace.request_id"  # in the scope of a request that has one
READ_ON = 8  # times the limit: what is too large is thrown away up to there, so that the client can read why


class _Id(Convertor[str]):
    """An id in a path: any text, with slashes and line ends if it has some."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("headrace_id", _Id())


def create_app(
    holder: Holder,
    max_age_ms: int = 60_000,
    clock: Callable[[], float] = time.time,
    gate: Gate | None = None,
    admin: bool = True,
    access_log: bool = False,
) -> App:
    """The ASGI app over `holder`. `/readyz` fails past `max_age_ms` without a version; `clock`: seconds since 1970;
    `gate`: who may ask, None: everybody on this machine; `admin`: with the routes of ADMIN (`create_admin_app`);
    `access_log`: each request is a line of the log."""
    turns = Turns(lambda: holder.policy.limits)
    holder.metrics.watch_waiting(lambda: turns.waiting)
    scopes = (PUBLIC, SCORE, ADMIN) if admin else (PUBLIC, SCORE)
    return _app(holder, scopes, gate or Gate(), turns, max_age_ms=max_age_ms, clock=clock, access_log=access_log)


def create_admin_app(holder: Holder, gate: Gate, turns: Turns) -> App:
    """What is neither scoring nor health, for a listener of its own. `turns`: of the app that scores."""
    return _app(holder, (ADMIN,), gate, turns)


def _app(
    holder: Holder, scopes: Collection[str], gate: Gate, turns: Turns, access_log: bool = False, **state: Any
) -> App:
    made = Starlette(
        routes=[route for route, scope in ROUTES if scope in scopes],
        exception_handlers=handlers(holder.metrics.refused),
    )
    made.router.redirect_slashes = False
    made.state.holder, made.state.turns = holder, turns
    for name, value in state.items():
        setattr(made.state, name, value)

    def refuse(denied: Denial) -> Response:
        holder.metrics.refused(denied.reason)
        return denial(denied)

    table = {route.path: scope for route, scope in ROUTES if scope in scopes}
    accessed = partial(_log_access, holder) if access_log else None
    return App(Guard(made, table, gate, refuse), holder.metrics, turns, accessed)


async def _rank(request: Request) -> Response:
    asked, deadline = await _body(request, RankRequest), _deadline(request)
    metrics = _holder(request).metrics
    metrics.candidates("rank", len(asked.candidates))
    async with _turn(request):
        answer = _holder(request).replica.rank(asked, deadline=deadline)
    request.scope[REQUEST_ID] = answer.request_id
    metrics.answered("rank", answer.degraded)
    _holder(request).answered(asked, answer)
    return _json(answer)


async def _recommend(request: Request) -> Response:
    asked, deadline = await _body(request, RecommendRequest), _deadline(request)
    metrics = _holder(request).metrics
    async with _turn(request):
        answer = _holder(request).replica.recommend(asked, deadline=deadline)
    request.scope[REQUEST_ID] = answer.request_id
    metrics.candidates("recommend", answer.candidates)
    metrics.answered("recommend", answer.degraded)
    _holder(request).answered(asked, answer)
    return _json(answer)


async def _similar(request: Request) -> Response:
    asked, item = _query(request, SimilarQuery), request.path_params["id"]
    if not 1 <= len(item) <= MAX_ID_CHARS:
        raise Refused(INVALID, f"Expected an id of 1 to {MAX_ID_CHARS} characters - at `id`")
    async with _turn(request):
        answer = _holder(request).replica.similar(item, asked)
    return _json(answer)


async def _model(request: Request) -> Response:
    asked, holder = _query(request, ModelQuery), _holder(request)
    if asked.wait_ms:
        await holder.newer_than(asked.newer_than, asked.wait_ms / 1000)
    return _json(holder.info())


async def _healthz(request: Request) -> Response:
    return _json({"ok": True})


async def _readyz(request: Request) -> Response:
    reason = _not_ready_because(_holder(request), request.app.state.max_age_ms, request.app.state.clock())
    if reason:
        raise NotReady(reason if request.scope[ALLOWED] else "not now: with a token the answer says why")
    return _json({"ok": True})


def _not_ready_because(holder: Holder, max_age_ms: int, now_s: float) -> str:
    if holder.replica.sequence < 0:
        return "no version yet: is the trainer running?"
    if holder.behind or holder.cold:
        return holder.behind or holder.cold
    age_ms = math.ceil(now_s * 1000) - holder.replica.created_ms
    if age_ms > max_age_ms:
        return f"the newest version is {age_ms:,} ms old, more than {max_age_ms:,}: is the trainer running?"
    return ""


async def _metrics(request: Request) -> Response:
    metrics = _holder(request).metrics
    return Response(metrics.text(), media_type=metrics.content_type)


async def _openapi(request: Request) -> Response:
    return Response(_described(_limits(request))[0], media_type="application/json")


async def _docs(request: Request) -> Response:
    return HTMLResponse(_described(_limits(request))[1])


# Every route and the scope that it asks for: access.py refuses what is not here.
ROUTES = (
    (Route("/v1/rank", _rank, methods=["POST"]), SCORE),
    (Route("/v1/recommend", _recommend, methods=["POST"]), SCORE),
    (Route("/v1/items/{id:headrace_id}/similar", _similar), SCORE),
    (Route("/v1/model", _model), SCORE),
    (Route("/healthz", _healthz), PUBLIC),
    (Route("/readyz", _readyz), PUBLIC),
    (Route("/metrics", _metrics), ADMIN),
    (Route("/openapi.json", _openapi), ADMIN),
    (Route("/docs", _docs), ADMIN),
)


async def _body(request: Request, type_: type[T]) -> T:
    """The request's body as `type_`. Raises Refused (400, 408, 413, 422), GoneAway."""
    limits = _limits(request)
    try:
        async with asyncio.timeout(limits.body_ms / 1000):
            body = await _read(request)
        return msgspec.json.decode(body, type=type_)
    except TimeoutError:
        late = f"the body was not there after {limits.body_ms:,} ms"
        raise Refused(BODY_TIMEOUT, late, {"Connection": "close"}) from None
    except msgspec.ValidationError as error:
        raise Refused(INVALID, str(error)) from None
    except RecursionError:
        raise Refused(NOT_JSON, "the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(NOT_JSON, f"the body is not JSON: {error}") from None
    except ClientDisconnect:
        raise GoneAway from None


async def _read(request: Request) -> bytes:
    """The whole body; no more of it than is allowed is ever held in memory."""
    body, size = bytearray(), 0
    too_large = f"the body is larger than {MAX_BODY_BYTES:,} bytes"
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        elif size > READ_ON * MAX_BODY_BYTES:
            raise Refused(BODY_TOO_LARGE, too_large, {"Connection": "close"})
    if size > MAX_BODY_BYTES:
        raise Refused(BODY_TOO_LARGE, too_large)
    return bytes(body)


def _query(request: Request, type_: type[T]) -> T:
    """The parameters after the question mark as `type_`. Raises Refused."""
    try:
        return msgspec.convert(dict(request.query_params), type_, strict=False)
    except msgspec.ValidationError as error:
        raise Refused(INVALID, str(error)) from None


def _deadline(request: Request) -> float:
    """When the answer should be there, time.perf_counter seconds: what is spent on waiting is spent."""
    return time.perf_counter() + _limits(request).deadline_ms / 1000


def _turn(request: Request) -> AbstractAsyncContextManager[None]:
    """The turn of this request; it is called once its body has been read, so that slow clients hold up nobody."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return request.app.state.turns.turn(gone)


def _holder(request: Request) -> Holder:
    return request.app.state.holder


def _limits(request: Request) -> Limits:
    """As they are now: they may be changed while the replica runs."""
    return _holder(request).policy.limits


@lru_cache(maxsize=1)
def _described(limits: Limits) -> tuple[bytes, str]:
    """The document of the API, and the page made of it."""
    described = document(limits)
    return orjson.dumps(described), page(described)


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _log_access(holder: Holder, scope: Scope, route: str, status: int, seconds: float) -> None:
    """A line for a request. Of what strangers send only the method is in it."""
    of = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6),
          "epoch": holder.replica.epoch, "sequence": holder.replica.sequence}  # fmt: skip
    if REQUEST_ID in scope:
        of["request_id"] = scope[REQUEST_ID]
    log.info("%s %s %s in %.1f ms", scope["method"], route, status, 1e3 * seconds, extra=of)


class App:
    """The app, counting each request by route and status. Unknown paths share one label: strangers must not make
    metrics. `turns`: who waits. `accessed`: is told (scope, route, status, seconds) of each."""

    def __init__(
        self, app: Guard, metrics: Metrics, turns: Turns,
        accessed: Callable[[Scope, str, int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self._app, self._metrics, self.turns, self._accessed = app, metrics, turns, accessed

    @property
    def routes(self) -> list[Route]:
        return [route for route in self._app.routes if isinstance(route, Route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither WebSockets nor a lifespan
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            status = 499  # the client went away during a long poll
            raise
        finally:
            route = scope.get("route")
            label = route.path_format if isinstance(route, Route) else "other"
            seconds = time.perf_counter() - start
            self._metrics.request(label, status, seconds)
            if self._accessed is not None:
                self._accessed(scope, label, status, seconds)
