"""A client of a replica's HTTP API, with and without asyncio: the requests and answers of `api.py` as they are.

    with Client("http://127.0.0.1:8080") as replica:
        page = replica.recommend(RecommendRequest("u1", k=5))
        print([shown.item for shown in page.items])

What a replica refuses is raised as Refusal. It is asked again only where it said that this request was not looked at
and when to come back (429 and 503 with Retry-After), and only so often; a request that may have had an effect is never
sent twice. What goes wrong on the way is httpx.TransportError.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from embedding_store.errors import HeadraceError
from embedding_store.secret import Secret
from online_model.serving.api import (
    ModelInfo,
    ModelQuery,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    SimilarItems,
    SimilarQuery,
)
from online_model.serving.problems import BLANK, MEDIA_TYPE, Problem

T = TypeVar("T")

LONGEST_PAUSE_S = 10.0  # whatever a Retry-After says
KEPT_S = 2.0  # an idle connection: less than the server keeps it, or a request would meet its end
SPREAD = 0.25  # a pause is longer by up to this share, so that those who were refused together do not return together


class Refusal(HeadraceError):
    """An answer that is not 200: its problem document. `retry_after_s`: None where it did not say."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem, self.retry_after_s = problem, retry_after_s

    @property
    def status(self) -> int:
        return self.problem.status

    @property
    def detail(self) -> str:
        return self.problem.detail


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One request and the type of its answer. `wait_s`: by which it may be later than others."""

    answer_type: type[T]
    method: str
    path: str
    body: bytes | None = None
    query: msgspec.Struct | None = None
    wait_s: float = 0.0
    retried: bool = True

    def arguments(self, timeout_s: float) -> dict[str, Any]:
        """Of httpx's `request`."""
        made: dict[str, Any] = {"method": self.method, "url": self.path, "timeout": timeout_s + self.wait_s}
        if self.body is not None:
            made |= {"content": self.body, "headers": {"Content-Type": "application/json"}}
        if self.query is not None:
            made["params"] = msgspec.structs.asdict(self.query)
        return made

    def answer(self, response: httpx.Response) -> T:
        """Raises Refusal."""
        if response.status_code != 200:
            raise Refusal(_problem(response), _retry_after(response))
        return msgspec.json.decode(response.content, type=self.answer_type)

    def pause_s(self, response: httpx.Response, asked: int, retries: int) -> float | None:
        """How long to wait before asking again, None: not at all. `asked`: how often it was."""
        after = _retry_after(response)
        if not self.retried or response.status_code not in (429, 503) or after is None or asked > retries:
            return None
        return min(after, LONGEST_PAUSE_S) * (1 + SPREAD * random.random())


class _Ok(msgspec.Struct):
    ok: bool


def _problem(response: httpx.Response) -> Problem:
    """What the answer says, or what can be said of one that is no problem document (of a proxy on the way)."""
    if response.headers.get("content-type", "").startswith(MEDIA_TYPE):
        try:
            return msgspec.json.decode(response.content, type=Problem)
        except msgspec.DecodeError:
            pass
    return Problem(BLANK, response.reason_phrase, response.status_code, "the answer is no problem document")


def _retry_after(response: httpx.Response) -> float | None:
    seconds = response.headers.get("retry-after", "")
    return float(seconds) if seconds.isascii() and seconds.isdigit() else None


def _rank(request: RankRequest) -> _Call[Ranking]:
    return _Call(Ranking, "POST", "/v1/rank", msgspec.json.encode(request))


def _recommend(request: RecommendRequest) -> _Call[Recommendation]:
    return _Call(Recommendation, "POST", "/v1/recommend", msgspec.json.encode(request))


def _similar(item: str | int, query: SimilarQuery) -> _Call[SimilarItems]:
    name = quote(str(item), safe="")
    if name in (".", ".."):
        name = name.replace(".", "%2E")  # else a step in the path
    return _Call(SimilarItems, "GET", f"/v1/items/{name}/similar", query=query)


def _model(query: ModelQuery) -> _Call[ModelInfo]:
    return _Call(ModelInfo, "GET", "/v1/model", query=query, wait_s=query.wait_ms / 1000)


_LIMITS = httpx.Limits(keepalive_expiry=KEPT_S)
_READY = _Call(_Ok, "GET", "/readyz", retried=False)  # a 503 is an answer here


def authorization(token: Secret | None) -> dict[str, str]:
    """The header that carries a token, if there is one."""
    return {"Authorization": f"Bearer {token.reveal()}"} if token else {}


def _options(url: str, token: Secret | None, tls: ssl.SSLContext | None) -> dict[str, Any]:
    """Of httpx's clients."""
    return {"base_url": url, "limits": _LIMITS, "headers": authorization(token), "verify": tls or True}


class Client:
    """Blocking. `timeout_s`: for one answer; `retries`: so often a request is sent again; `token`: if one is needed;
    `tls`: whom to trust, where it is not the system's authorities. One thread at a time."""

    def __init__(
        self,
        url: str,
        timeout_s: float = 5.0,
        retries: int = 3,
        token: Secret | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._http, self._timeout_s, self._retries = httpx.Client(**_options(url, token, tls)), timeout_s, retries

    def rank(self, request: RankRequest) -> Ranking:
        """The candidates, the best first. Raises Refusal."""
        return self._ask(_rank(request))

    def recommend(self, request: RecommendRequest) -> Recommendation:
        """Items to show. Raises Refusal."""
        return self._ask(_recommend(request))

    def similar(self, item: str | int, query: SimilarQuery | None = None) -> SimilarItems:
        """Items like one. Raises Refusal (404 where the item is unknown)."""
        return self._ask(_similar(item, query or SimilarQuery()))

    def model(self, query: ModelQuery | None = None) -> ModelInfo:
        """Which version is served; waits for a newer one if `query` says so. Raises Refusal."""
        return self._ask(_model(query or ModelQuery()))

    def ready(self) -> str:
        """Why the replica should not be asked, "" if it should. Raises Refusal for what is neither."""
        try:
            self._ask(_READY)
        except Refusal as refusal:
            return _why(refusal)
        return ""

    def _ask(self, call: _Call[T]) -> T:
        asked = 0
        while True:
            response, asked = self._http.request(**call.arguments(self._timeout_s)), asked + 1
            pause_s = call.pause_s(response, asked, self._retries)
            if pause_s is None:
                return call.answer(response)
            time.sleep(pause_s)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio; many requests may be under way at once."""

    def __init__(
        self,
        url: str,
        timeout_s: float = 5.0,
        retries: int = 3,
        token: Secret | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._http, self._timeout_s, self._retries = httpx.AsyncClient(**_options(url, token, tls)), timeout_s, retries

    async def rank(self, request: RankRequest) -> Ranking:
        """See Client; the others too."""
        return await self._ask(_rank(request))

    async def recommend(self, request: RecommendRequest) -> Recommendation:
        return await self._ask(_recommend(request))

    async def similar(self, item: str | int, query: SimilarQuery | None = None) -> SimilarItems:
        return await self._ask(_similar(item, query or SimilarQuery()))

    async def model(self, query: ModelQuery | None = None) -> ModelInfo:
        return await self._ask(_model(query or ModelQuery()))

    async def ready(self) -> str:
        try:
            await self._ask(_READY)
        except Refusal as refusal:
            return _why(refusal)
        return ""

    async def _ask(self, call: _Call[T]) -> T:
        asked = 0
        while True:
            response, asked = await self._http.request(**call.arguments(self._timeout_s)), asked + 1
            pause_s = call.pause_s(response, asked, self._retries)
            if pause_s is None:
                return call.answer(response)
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


def _why(refusal: Refusal) -> str:
    if refusal.status != 503:
        raise refusal
    return refusal.detail
