"""Refusals as problem documents (RFC 9457): which there are, and how one becomes an answer.

`type` says which of `KINDS` it is, as a reference into the replica's own documentation; a refusal that HTTP itself says
all of (an unknown path, a wrong method) has the type "about:blank".
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from online_model.serving.access import Denial
from online_model.serving.errors import NotReady, UnknownItem

log = logging.getLogger("headrace")

MEDIA_TYPE = "application/problem+json"
MAX_DETAIL_CHARS = 300
RETRY_AFTER_S = 1
BLANK = "about:blank"


class Problem(Struct, frozen=True, omit_defaults=True):
    """Why a request was refused (RFC 9457)."""

    type: Annotated[str, Meta(description="which problem it is, as a reference into /docs, or about:blank")]
    title: Annotated[str, Meta(description="the problem in words, the same each time")]
    status: Annotated[int, Meta(description="the HTTP status")]
    detail: Annotated[str, Meta(max_length=MAX_DETAIL_CHARS, description="what was wrong this time, in one line")]
    instance: Annotated[
        str | None, Meta(description="of this one occurrence, as the replica's log names it; only with status 500")
    ] = None


@dataclass(frozen=True)
class Kind:
    """A kind of problem. `retry`: the same request may succeed a little later, and the answer says so."""

    slug: str
    status: int
    title: str
    about: str
    retry: bool = False

    @property
    def type(self) -> str:
        return f"/docs#{self.slug}"


NOT_JSON = Kind("not-json", 400, "The body is not JSON", "The body could not be read as JSON in UTF-8.")
TOKEN_NEEDED = Kind(
    "token-needed", 401, "A token is needed",
    "`Authorization: Bearer TOKEN` is not there, or the token is not a valid one, or no longer.",
)  # fmt: skip
NOT_ALLOWED = Kind(
    "not-allowed", 403, "Not allowed",
    "The token is not for this route. Where none is needed: the Host header names neither an address nor localhost.",
)  # fmt: skip
UNKNOWN_ITEM = Kind(
    "unknown-item", 404, "Unknown item", "The version served does not have this item: it never came, or it has expired."
)  # fmt: skip
BODY_TIMEOUT = Kind(
    "body-timeout", 408, "The body took too long",
    "The body was not there within `body_ms` of the request's head; the connection is closed.",
)  # fmt: skip
BODY_TOO_LARGE = Kind("body-too-large", 413, "The body is too large", "See the limits.")
INVALID = Kind(
    "invalid", 422, "Not what the schema asks for",
    "A field is missing, unknown, of another type or out of its range: `detail` says which and where.",
)  # fmt: skip
TOO_MANY_WAITING = Kind(
    "too-many-waiting", 429, "Too many requests wait already",
    "`waiting` requests wait for their turn: this one was turned away at once.", retry=True,
)  # fmt: skip
WAITED_TOO_LONG = Kind(
    "waited-too-long", 503, "The request waited too long",
    "Its turn did not come within `give_up_ms`: it was not looked at.", retry=True,
)  # fmt: skip
NOT_READY = Kind(
    "not-ready", 503, "Not ready",
    "There is no model or no item to answer with yet; from /readyz also: what is served is stale.",
    retry=True,
)  # fmt: skip

KINDS = (
    NOT_JSON, TOKEN_NEEDED, NOT_ALLOWED, UNKNOWN_ITEM, BODY_TIMEOUT, BODY_TOO_LARGE, INVALID, TOO_MANY_WAITING,
    WAITED_TOO_LONG, NOT_READY,
)  # fmt: skip


class Refused(Exception):
    """A request that is refused: `kind` and one line about this time."""

    def __init__(self, kind: Kind, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.headers = kind, detail, dict(headers or {})


class GoneAway(Exception):
    """The client closed the connection before its answer: whatever is answered is lost."""


class ProblemResponse(Response):
    """A problem document. `reason`: what the metrics call it; of few values, whatever strangers send."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: Problem, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(msgspec.json.encode(problem), problem.status, headers)
        self.reason = reason


def refusal(kind: Kind, detail: str, headers: Mapping[str, str] | None = None) -> ProblemResponse:
    """The answer that refuses a request. `detail` may quote what was sent: it is cut to one short line."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if kind.retry else {}
    problem = Problem(kind.type, kind.title, kind.status, _line(detail))
    return ProblemResponse(problem, kind.slug, {**retry, **(headers or {})})


def denial(denied: Denial) -> ProblemResponse:
    """The answer to who may not ask. The metrics have the reason; who asks is told no more than HTTP's status does."""
    kind = TOKEN_NEEDED if denied.status == 401 else NOT_ALLOWED
    problem = Problem(kind.type, kind.title, kind.status, _line(kind.about))
    return ProblemResponse(problem, denied.reason, {"WWW-Authenticate": denied.challenge})


def blank(
    status: int, detail: str, instance: str | None = None, headers: Mapping[str, str] | None = None
) -> ProblemResponse:
    """A refusal that needs no type of its own. `status`: one that HTTP knows."""
    title = HTTPStatus(status).phrase
    problem = Problem(BLANK, title, status, _line(detail), instance)
    return ProblemResponse(problem, title.lower().replace(" ", "-"), headers)


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_DETAIL_CHARS]


def handlers(note: Callable[[str], None]) -> dict[Any, ExceptionHandler]:
    """What an app answers to each error. `note`: told the reason of every refusal."""

    def noting(answer: Callable[[Request, Any], ProblemResponse]) -> ExceptionHandler:
        async def noted(request: Request, error: Exception) -> Response:
            response = answer(request, error)
            note(response.reason)
            return response

        return noted

    return {
        Refused: noting(lambda _, error: refusal(error.kind, error.detail, error.headers)),
        NotReady: noting(lambda _, error: refusal(NOT_READY, str(error))),
        UnknownItem: noting(lambda _, error: refusal(UNKNOWN_ITEM, str(error))),
        HTTPException: noting(_of_starlette),
        Exception: noting(_failed),
        GoneAway: _gone_away,
    }


def _of_starlette(request: Request, error: HTTPException) -> ProblemResponse:
    """It refuses unknown paths, and methods that a path does not have."""
    what = {404: "there is nothing at this path", 405: f"{request.method} is not for this path"}
    return blank(error.status_code, f"{what.get(error.status_code, error.detail)}: see /docs", headers=error.headers)


def _failed(request: Request, error: Exception) -> ProblemResponse:
    # The traceback follows in the server's log (starlette raises the error again after this answer), never to the
    # client.
    instance = f"urn:uuid:{uuid.uuid4()}"
    log.error("%s %s failed: %s", request.method, request.url.path, instance,
              extra={"instance": instance, "method": request.method})  # fmt: skip
    return blank(500, "internal error: the replica's log says more under this instance", instance)


async def _gone_away(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the metrics have it, under the number other servers use
