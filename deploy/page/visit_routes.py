"""The routes of the panel "Be a user": who may call them, and with what.

Another site must not act through a visitor's browser: besides the name of this host (app.py) a call needs a header that
no form can send and no other origin may without asking first, and comes from this very page where the browser says from
where.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar, get_args

import msgspec
import orjson
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from deploy.page.visits import ActRequest, AskRequest, Kind, Trouble, Visits
from streams.events import SCENARIOS

T = TypeVar("T", bound=Struct)

HEADER = "x-headrace-page"
MAX_BODY_BYTES = 4_096
NO_STORE = {"Cache-Control": "no-store"}


def visit_routes(visits: Visits | None) -> list[Route]:
    """GET /visit: {open, scenarios, kinds, users}; POST /visit/recommend; POST /visit/act, answered by server-sent
    events. `visits` None: there is only the first, and it says that the panel is not open."""

    async def about(_: Request) -> Response:
        if visits is None or visits.closed:
            return _json({"open": False, "why": visits.closed if visits else ""})
        return _json({
            "open": True, "scenarios": SCENARIOS, "kinds": get_args(Kind), "users": visits.visited.users,
            "watch_wait_ms": visits.visited.watch_wait_ms,
        })  # fmt: skip

    routes = [Route("/visit", about)]
    if visits is None:
        return routes

    async def recommend(request: Request) -> Response:
        try:
            return _json(await visits.show(await _asked(request, AskRequest)))
        except Trouble as trouble:
            return _refusal(trouble)

    async def act(request: Request) -> Response:
        try:
            news = visits.act(await _asked(request, ActRequest))
            first = await anext(news)
        except Trouble as trouble:
            return _refusal(trouble)
        return StreamingResponse(_events(first, news), media_type="text/event-stream", headers=NO_STORE)

    return [
        *routes,
        Route("/visit/recommend", recommend, methods=["POST"]),
        Route("/visit/act", act, methods=["POST"]),
    ]


async def _asked(request: Request, type_: type[T]) -> T:
    """The body of a call that may be made. Raises Trouble."""
    headers = request.headers
    ours = f"http://{headers.get('host', '')}"
    if HEADER not in headers or headers.get("origin", ours) != ours:
        raise Trouble("this is for the page itself only", 403)
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise Trouble("this is for the page itself only", 403)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Trouble(f"the body is larger than {MAX_BODY_BYTES:,} bytes", 413)
    try:
        return msgspec.json.decode(bytes(body), type=type_)
    except msgspec.ValidationError as error:
        raise Trouble(str(error), 422) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Trouble(f"the body is not JSON: {error}", 400) from None


async def _events(first: dict[str, Any], news: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    yield _event(first)
    async for more in news:
        yield _event(more)


def _event(said: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(said)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, NO_STORE, "application/json")


def _refusal(trouble: Trouble) -> Response:
    return _json({"detail": str(trouble)}, trouble.status)
