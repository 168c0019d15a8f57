"""The client against the real server: typed answers, refusals as they are, and asking again only where that is safe."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest

from online_model.features import CARD
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
from online_model.serving.client import AsyncClient, Client, Refusal
from online_model.serving.replica import Replica
from tests.online_model.serving.served import Serving, serving, until
from tests.online_model.serving.world import cards, replica, world

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = RankRequest("u1", [3, "4", "unknown"], "live")
Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> type[Client | AsyncClient]:
    return request.param


def with_client(
    kind: type[Client | AsyncClient], test: Callable[[Serving, Ask], Awaitable[None]], made: Replica | None = None,
    retries: int = 3, timeout_s: float = 5, **limits: int,
) -> None:  # fmt: skip
    """Runs `test` beside a server; its `ask("rank", …)` calls the client, on a thread if that blocks."""

    async def run() -> None:
        async with serving(made, **limits) as it:
            client = kind(it.url, timeout_s, retries)

            async def ask(name: str, *arguments: Any) -> Any:
                call = getattr(client, name)
                if inspect.iscoroutinefunction(call):
                    return await call(*arguments)
                return await asyncio.to_thread(call, *arguments)

            try:
                await test(it, ask)
            finally:
                await ask("close")

    asyncio.run(asyncio.wait_for(run(), 30))


def test_answers_are_typed(kind):
    async def test(it: Serving, ask: Ask) -> None:
        ranking = await ask("rank", RANK)
        assert isinstance(ranking, Ranking)
        plain = (await it.http.post("/v1/rank", content=msgspec.json.encode(RANK))).json()
        assert [(i.item, i.score) for i in ranking.items] == [(i["item"], i["score"]) for i in plain["items"]]
        page = await ask("recommend", RecommendRequest("u1", k=3))
        assert isinstance(page, Recommendation)
        assert [shown.position for shown in page.items] == [0, 1, 2]
        assert 0 < page.items[0].propensity <= 1
        alike = await ask("similar", 7, SimilarQuery(k=4))
        assert isinstance(alike, SimilarItems)
        assert len(alike.items) == 4
        info = await ask("model")
        assert isinstance(info, ModelInfo)
        assert info.positions == {"0": 10, "1": 20}
        assert await ask("ready") == ""

    with_client(kind, test)


def test_any_id_can_be_asked_for(kind):
    odd = ["a/b", "..", ".", "ü?x=1#&%41", "two\nlines", "x/similar", " "]
    made = world()
    made.blobs[CARD] |= cards(odd)

    async def test(it: Serving, ask: Ask) -> None:
        for item in [*odd, 7, "7"]:
            assert str((await ask("similar", item)).item) == str(item)

    with_client(kind, test, replica(made))


def test_a_refusal_says_what_the_problem_document_says(kind):
    async def test(it: Serving, ask: Ask) -> None:
        with pytest.raises(Refusal, match="candidates") as refused:
            await ask("rank", RankRequest("u1", []))
        assert refused.value.status == 422
        assert refused.value.problem.type == "/docs#invalid"
        with pytest.raises(Refusal, match="item 'nothing' is neither") as refused:
            await ask("similar", "nothing")
        assert (refused.value.status, refused.value.retry_after_s) == (404, None)
        assert await requests(it, "422") == await requests(it, "404") == 1  # neither was sent again

    with_client(kind, test)


async def requests(it: Serving, status: str) -> float:
    """How many were answered so."""
    lines = (await it.http.get("/metrics")).text.splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("headrace_serve_requests_total") and f'status="{status}"' in line
    )


def test_what_was_not_looked_at_is_asked_again_after_the_time_said(kind):
    async def test(it: Serving, ask: Ask) -> None:
        async with it.app.turns.turn(asyncio.Event().wait):
            _, other = await it.raw(b'{"user": 1, "candidates": [1]}')
            await until(lambda: it.app.turns.waiting == 1)
            start = time.perf_counter()
            asked = asyncio.create_task(ask("rank", RANK))
            while not await requests(it, "429"):
                assert not asked.done()
        assert len((await asked).items) == 3
        assert time.perf_counter() - start >= 1
        other.close()

    with_client(kind, test, waiting=1, give_up_ms=60_000)


def test_it_is_asked_only_so_often(kind):
    async def test(it: Serving, ask: Ask) -> None:
        assert "no version yet" in await ask("ready")
        assert await requests(it, "503") == 1
        with pytest.raises(Refusal, match="no model yet") as refused:
            await ask("rank", RANK)
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
        assert await requests(it, "503") == 1 + 2

    with_client(kind, test, replica(), retries=1)


def test_a_fault_and_a_lost_answer_are_not_asked_again(kind):
    """It may have had its effect."""

    class Broken(Replica):
        def rank(self, *args, **kwargs):
            raise RuntimeError

    made = replica(world())
    made.__class__ = Broken

    async def test(it: Serving, ask: Ask) -> None:
        with pytest.raises(Refusal, match="internal error") as refused:
            await ask("rank", RANK)
        assert refused.value.problem.instance
        assert await requests(it, "500") == 1
        await it.stop()
        with pytest.raises(httpx.TransportError):
            await ask("rank", RANK)

    with_client(kind, test, made)


def test_a_wait_for_the_next_version_is_longer_than_the_time_for_an_answer(kind):
    async def test(it: Serving, ask: Ask) -> None:
        assert (await ask("model", ModelQuery(newer_than=1, wait_ms=1_500))).sequence == 1

    with_client(kind, test, timeout_s=1)
