"""More than a replica can answer: a bounded queue, refusals that say when to come back, and then as before."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx
import pytest
import uvicorn

from online_model.serving.admission import Turns
from online_model.serving.app import App, create_app
from online_model.serving.holder import Holder
from online_model.serving.problems import GoneAway, Refused
from online_model.serving.settings import Limits
from tests.online_model.serving.served import served
from tests.online_model.serving.world import replica, world

pytestmark = pytest.mark.usefixtures("one_thread")
ASK = {"user": "u1", "candidates": [1, 2, 3]}
BODY = b'{"user": 1, "candidates": [1]}'


async def until(true: Callable[[], bool]) -> None:
    """What comes over sockets has no event to wait for."""
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    return


# --- a flood, over real connections


def test_a_flood_is_refused_with_a_time_to_come_back_and_then_all_is_well():
    scoring_ms, give_up_ms, clients, lasts_s = 50, 250, 60, 3.0

    async def ask(http: httpx.AsyncClient, end: float, seen: list[tuple[int, float, str | None]]) -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            response = await http.post("/v1/rank", json=ASK)
            seen.append((response.status_code, time.perf_counter() - start, response.headers.get("retry-after")))
            if response.status_code != 200:
                await asyncio.sleep(0.25)  # less than it was told, as rude clients do

    async def flood(url: str) -> list[tuple[int, float, str | None]]:
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as http:
            seen: list[tuple[int, float, str | None]] = []
            end = time.perf_counter() + lasts_s
            await asyncio.gather(*(ask(http, end, seen) for _ in range(clients)))
            return seen

    with served({"waiting": 8, "give_up_ms": give_up_ms}, slow_ms=scoring_ms) as it:
        seen = asyncio.run(flood(it.url))
        statuses = Counter(status for status, _, _ in seen)
        assert set(statuses) == {200, 429, 503}, statuses
        assert all(after == "1" for status, _, after in seen if status != 200)
        took = sorted(seconds for status, seconds, _ in seen if status == 200)
        # Behind all the others an answer would take clients × scoring_ms = 3 s.
        assert took[len(took) // 2] < 1.5, took[len(took) // 2]
        assert statuses[200] >= 0.3 * lasts_s * 1000 / scoring_ms, statuses  # refusing costs little: it goes on scoring
        with httpx.Client(base_url=it.url, timeout=5) as http:
            for _ in range(20):
                assert http.post("/v1/rank", json=ASK).status_code == 200
            metrics = http.get("/metrics").text
    assert "headrace_serve_waiting 0.0" in metrics
    assert f'headrace_serve_refused_total{{reason="too-many-waiting"}} {statuses[429]:.1f}' in metrics
    assert f'headrace_serve_refused_total{{reason="waited-too-long"}} {statuses[503]:.1f}' in metrics


# --- the queue


def turns_of(**limits: int) -> Turns:
    return Turns(Limits(**limits))


async def hold(turns: Turns, gone: Callable[[], Awaitable[None]] = never) -> asyncio.Event:
    """A task takes a turn and keeps it until the event that is returned is set."""
    let_go, has = asyncio.Event(), asyncio.Event()

    async def run() -> None:
        async with turns.turn(gone):
            has.set()
            await let_go.wait()

    let_go.task = asyncio.create_task(run())  # type: ignore[attr-defined]  # kept as long as the event
    await has.wait()
    return let_go


def test_turns_come_in_the_order_of_asking_and_one_at_a_time():
    async def run() -> list[int]:
        turns, order, inside = turns_of(waiting=64), [], 0

        async def one(n: int) -> None:
            nonlocal inside
            async with turns.turn(never):
                inside += 1
                assert inside == 1
                order.append(n)
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(one(n) for n in range(50)))
        assert turns.waiting == 0
        async with turns.turn(never):  # and it is free again
            return order

    assert asyncio.run(asyncio.wait_for(run(), 10)) == list(range(50))


def test_where_too_many_wait_the_next_is_refused_at_once():
    async def run() -> None:
        turns = turns_of(waiting=2, give_up_ms=60_000)
        first = await hold(turns)
        others = [asyncio.create_task(hold(turns)) for _ in range(2)]
        await until(lambda: turns.waiting == 2)
        with pytest.raises(Refused, match="2 requests wait") as refused:
            await hold_in_line(turns)
        assert refused.value.kind.status == 429
        first.set()
        for other in others:
            (await other).set()

    asyncio.run(asyncio.wait_for(run(), 10))


async def hold_in_line(turns: Turns, gone: Callable[[], Awaitable[None]] = never) -> None:
    async with turns.turn(gone):
        pass


def test_who_waited_too_long_is_refused_and_has_left_the_line():
    async def run() -> None:
        turns = turns_of(waiting=2, give_up_ms=20)
        first = await hold(turns)
        with pytest.raises(Refused, match="no turn within 20 ms") as refused:
            await hold_in_line(turns)
        assert refused.value.kind.status == 503
        assert turns.waiting == 0
        first.set()
        await hold_in_line(turns)

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("how", ["gone", "cancelled", "failed"])
def test_a_turn_is_never_lost_with_its_owner(how):
    """Whoever goes away at the very moment when the turn comes to it hands it on."""

    async def run() -> None:
        turns = turns_of(waiting=8, give_up_ms=60_000)
        first, leave = await hold(turns), asyncio.Event()

        async def goes() -> None:
            with contextlib.suppress(GoneAway, RuntimeError):
                async with turns.turn(leave.wait):
                    raise RuntimeError

        going = asyncio.create_task(goes())
        last = asyncio.create_task(hold_in_line(turns))
        await until(lambda: turns.waiting == 2)
        first.set()
        if how == "gone":
            leave.set()
        elif how == "cancelled":
            while turns.waiting == 2:  # no longer than that: the turn has been given, and not taken yet
                await asyncio.sleep(0)
            going.cancel()
        await last
        await asyncio.gather(going, return_exceptions=True)
        assert turns.waiting == 0

    asyncio.run(asyncio.wait_for(run(), 10))


# --- clients that go away, and clients that are slow


class Serving:
    """uvicorn in the loop of the test, which can take the turn itself."""

    def __init__(self, app: App, holder: Holder, listening: socket.socket) -> None:
        self.app, self.holder = app, holder
        self.host, self.port = listening.getsockname()
        self.http = httpx.AsyncClient(base_url=f"http://{self.host}:{self.port}", timeout=10)

    async def raw(self, body: bytes, length: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which this much of a request to rank has been sent."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def serving(**limits: int) -> AsyncIterator[Serving]:
    holder = Holder(replica(world()))
    app = create_app(holder, max_age_ms=1 << 50, limits=Limits(**limits))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="httptools", lifespan="off"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve([listening]))
    made = Serving(app, holder, listening)
    async with made.http:
        yield made
    server.should_exit = True
    await running


def test_a_client_that_goes_away_while_it_waits_frees_its_place():
    async def run() -> None:
        async with serving(waiting=1, give_up_ms=60_000) as it:
            async with it.app.turns.turn(never):
                _, leaving = await it.raw(BODY)
                await until(lambda: it.app.turns.waiting == 1)
                assert (await it.http.post("/v1/rank", json=ASK)).status_code == 429
                leaving.close()
                await until(lambda: it.app.turns.waiting == 0)
                waiting = asyncio.create_task(it.http.post("/v1/rank", json=ASK))
                await until(lambda: it.app.turns.waiting == 1)
            assert (await waiting).status_code == 200
            metrics = (await it.http.get("/metrics")).text
            assert 'headrace_serve_requests_total{route="/v1/rank",status="499"} 1.0' in metrics
            assert 'headrace_serve_requests_total{route="/v1/rank",status="500"}' not in metrics

    asyncio.run(asyncio.wait_for(run(), 30))


def test_slow_clients_hold_no_place_and_are_cut_off():
    async def run() -> None:
        async with serving(waiting=1, body_ms=300) as it:
            slow = [await it.raw(b"{", 1000) for _ in range(20)]
            for _ in range(5):
                assert (await it.http.post("/v1/rank", json=ASK)).status_code == 200
            for reader, writer in slow:
                answer = await reader.read()  # to the end of the connection
                assert answer.startswith(b"HTTP/1.1 408")
                assert b"/docs#body-timeout" in answer
                writer.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_client_that_keeps_sending_a_byte_is_cut_off_too():
    async def run() -> None:
        async with serving(body_ms=200) as it:
            reader, writer = await it.raw(b"{", 1_000_000)

            async def drip() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        writer.write(b" ")
                        await writer.drain()
                        await asyncio.sleep(0.01)

            dripping = asyncio.create_task(drip())
            assert (await reader.read()).startswith(b"HTTP/1.1 408")
            dripping.cancel()
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_the_reason_of_a_body_that_is_too_large_can_be_read():
    """It is thrown away while it comes: a connection closed in the middle would hide the answer."""

    async def run() -> None:
        async with serving() as it:
            response = await it.http.post("/v1/rank", content=b" " * 3_000_000)
            assert response.status_code == 413
            assert (await it.http.post("/v1/rank", json=ASK)).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 30))
