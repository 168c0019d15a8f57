"""A visitor of the page is a user of the system: gets recommendations, acts on one, and sees when that has an effect.

An action goes into the topic `events` as an app would send it, with the request_id of the page it was done on. Two
things follow, at their own pace, and both are measured from the moment the action came here:

    history   an answer of the replica is made of a history that has the action (its `feature_hash` is another one than
              the page's). The replica reads it from `events` itself, before anything is joined or learned
    learned   the version served has learned the action's example: its position is past the action, and its event time
              past the moment when the joiner makes the example (at once; for a watch after `watch_wait_ms`)

While it waits it asks without `log`, so that nothing counts as shown. What it shows is asked for once more, and is an
impression as any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import aiohttp
import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from msgspec import Meta, Struct

from deploy.freshness import ReplicaWatch
from deploy.freshness_metrics import STAGES
from deploy.page.cards import Cards
from deploy.replica_figures import Model
from embedding_store.errors import HeadraceError
from embedding_store.secret import Secret
from online_model.serving.api import Query, Scenario
from online_model.serving.client import authorization
from streams.events import Action, Click, Purchase, Watch, encode
from streams.impressions import let_go
from streams.kafka_clients import Bootstrap, client_arguments
from streams.topics import TopicSettings

Kind: TypeAlias = Literal["click", "watch", "purchase"]
User: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]

ASK_S = 5.0  # for an answer of the replica
KAFKA_MS = 5_000  # for the broker to take an action
BUSY = (429, 503)  # answers of a replica that has no time
POLL_S = 0.02  # between two looks at the list
AGAIN_S = 0.1  # the replica gives no answer: it may be starting
PATIENCE_S = 30.0  # then it is said that nothing has come of an action
PAGES = 1_000  # that can be acted on; of more the oldest go
AT_A_TIME = 16  # actions that are followed
WATCH_MS = 30_000  # how long what is watched to its end lasts


class Trouble(HeadraceError):
    """The visitor cannot have what was asked for; the message says why. `status`: of the HTTP answer."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


class AskRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Recommendations for a user."""

    user: User
    scenario: Scenario = "shelf"
    query: Query = ""
    k: Annotated[int, Meta(ge=1, le=20)] = 10


class ActRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Something done with the item in one place (0: the first) of a page."""

    request_id: Annotated[str, Meta(min_length=1, max_length=64)]
    place: Annotated[int, Meta(ge=0, le=19)]
    kind: Kind


@dataclass(frozen=True)
class Visited:
    """What is visited. `users`: ids that the page suggests. `when`: of (stage, partition, offset): the time.monotonic()
    at which a stage was past it (`StageFreshness.when`); None: not known."""

    replica: str  # http://HOST:PORT
    bootstrap: Bootstrap
    topics: TopicSettings
    watch_wait_ms: int  # of the joiner
    users: tuple[str, ...] = ()
    when: Callable[[str, int, int], float | None] = lambda stage, partition, offset: None
    token: Secret | None = None  # of the replica, if it asks for one


@dataclass
class _Page:
    """What was shown to whom; `clicked`: the places that were."""

    asked: AskRequest
    answer: dict[str, Any]
    clicked: set[int] = field(default_factory=set)

    @property
    def items(self) -> list[str | int]:
        return [shown["item"] for shown in self.answer["items"]]


class Visits:
    """What the page's routes ask for, on the page's event loop. An async context; nothing needs to run before it."""

    def __init__(self, visited: Visited) -> None:
        self.visited, self.closed = visited, ""  # `closed`: why nothing can be done any more
        self._cards = Cards(visited.bootstrap, visited.topics)
        self._pages: OrderedDict[str, _Page] = OrderedDict()
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()
        self._following = 0

    async def __aenter__(self) -> Visits:
        headers = authorization(self.visited.token)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ASK_S), headers=headers)
        self._reading = asyncio.create_task(self._cards.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._session.close()
        if self._producer is not None:
            await let_go(self._producer)

    async def show(self, asked: AskRequest) -> dict[str, Any]:
        """Recommendations with titles and reasons, logged as shown. Raises Trouble."""
        self._need_open()
        answer = await self._ask(asked, log=True, explain=True)
        self._pages[answer["request_id"]] = _Page(asked, answer)
        while len(self._pages) > PAGES:
            self._pages.popitem(last=False)
        items = [
            {**self._cards.of(shown["item"]), "item": str(shown["item"]), "score": shown["score"],
             "click": shown["click"], "why": shown.get("explanation")}
            for shown in answer["items"]
        ]  # fmt: skip
        return {"request_id": answer["request_id"], "model_version": answer["model_version"], "items": items}

    async def act(self, asked: ActRequest) -> AsyncIterator[dict[str, Any]]:
        """What comes of an action, as it comes: {stage: sent | history | learned | late, ms: since the call, …}; with
        `page`, what is recommended then, where it is asked for again. Raises Trouble before the first."""
        self._need_open()
        page = self._pages.get(asked.request_id)
        if page is None or asked.place >= len(page.items):
            raise Trouble("that page is not known any more: ask for recommendations again", 409)
        if self._following >= AT_A_TIME:
            raise Trouble("too many actions at a time: wait a moment", 429)
        self._following += 1
        try:
            began = time.monotonic()
            last, partition, offset = await self._send(self._events(asked, page))
            yield {"stage": "sent", "ms": _ms_since(began), "partition": partition, "offset": offset}
            due = last.ts + self.visited.watch_wait_ms if asked.kind == "watch" else last.ts
            waits = [
                asyncio.create_task(wait)
                for wait in (self._history(page, began), self._learned(page, partition, offset, due, began))
            ]
            try:
                for done in asyncio.as_completed(waits):
                    yield await done
            finally:  # whoever asked may have gone
                for wait in waits:
                    wait.cancel()
        finally:
            self._following -= 1

    # --- what an action does ---

    def _events(self, asked: ActRequest, page: _Page) -> list[Action]:
        """The events of an action: who watches or buys has clicked. Their times are after the page's."""
        ts = max(time.time_ns() // 1_000_000, page.answer["moment_ms"] + 1)
        common: dict[str, Any] = {
            "user": page.asked.user, "scenario": page.asked.scenario, "item": page.items[asked.place],
            "request_id": asked.request_id,
        }  # fmt: skip
        events: list[Action] = []
        if asked.kind == "click" or asked.place not in page.clicked:
            events.append(Click(event_id=uuid.uuid4().hex, ts=ts, **common))
        page.clicked.add(asked.place)
        if asked.kind == "watch":
            events.append(
                Watch(event_id=uuid.uuid4().hex, ts=ts + 1, play_ms=WATCH_MS, duration_ms=WATCH_MS, **common)
            )
        elif asked.kind == "purchase":
            price = self._cards.of(common["item"]).get("price")
            events.append(Purchase(event_id=uuid.uuid4().hex, ts=ts + 1, price=price, **common))
        return events

    async def _send(self, events: list[Action]) -> tuple[Action, int, int]:
        """(last event, its partition, its offset), once the broker has all. Raises Trouble."""
        topic = self.visited.topics.events
        try:
            producer = await self._connected()
            async with asyncio.timeout(KAFKA_MS / 1000):
                for event in events:
                    kept = await producer.send_and_wait(topic, encode(event), key=str(event.user).encode())
        except (KafkaError, TimeoutError) as error:
            raise Trouble(f"Kafka at {self.visited.bootstrap} does not take the action ({_said(error)})") from None
        return events[-1], kept.partition, kept.offset

    async def _connected(self) -> AIOKafkaProducer:
        async with self._connecting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **client_arguments(self.visited.bootstrap), acks="all", request_timeout_ms=KAFKA_MS
                )
                try:
                    await producer.start()
                    self._producer = producer
                finally:
                    if self._producer is None:
                        await producer.stop()
        return self._producer

    async def _history(self, page: _Page, began: float) -> dict[str, Any]:
        """Ask until the answer knows of the action."""
        known, end = page.answer["feature_hash"], began + PATIENCE_S
        while (asked := time.monotonic()) < end:
            with contextlib.suppress(Trouble):  # the replica may be starting again
                answer = await self._ask(page.asked, log=False)
                if answer["feature_hash"] != known:
                    ms = _ms_since(began)
                    return {"stage": "history", "ms": ms, "page": await self.show(page.asked)}
            await asyncio.sleep(max(POLL_S, time.monotonic() - asked))  # half of its time at most
        return _late("no answer has known of it")

    async def _learned(self, page: _Page, partition: int, offset: int, due_ms: int, began: float) -> dict[str, Any]:
        """Follow the replica's versions until one has the effect of what is at `offset` and of all before `due_ms`."""
        end, sequence = began + PATIENCE_S + max(0.0, due_ms / 1000 - time.time()), -1
        async with ReplicaWatch(self.visited.replica, self.visited.token) as replica:
            while time.monotonic() < end:
                answer = await replica.newer_than(sequence)
                if answer is None:
                    await asyncio.sleep(AGAIN_S)
                    continue
                model = Model(answer)
                at = model.partitions.get(partition)
                if at and model.positions.get(partition, -1) > offset and at["watermark"] > due_ms:
                    ms = _ms_since(began)
                    shown = None
                    with contextlib.suppress(Trouble):
                        shown = await self.show(page.asked)
                    stages = self._stages(partition, offset, began)
                    return {"stage": "learned", "ms": ms, "version": model.version, "stages": stages, "page": shown}
                sequence = model.sequence
        return _late("no version has learned of it: are the join and train workers running?")

    def _stages(self, partition: int, offset: int, began: float) -> dict[str, float]:
        """stage → ms from `began` until it was past the record at `offset`; without those not seen."""
        seen = {stage: self.visited.when(stage, partition, offset) for stage in STAGES}
        return {stage: round(max(0.0, at - began) * 1e3, 1) for stage, at in seen.items() if at is not None}

    async def _ask(self, asked: AskRequest, log: bool, explain: bool = False) -> dict[str, Any]:
        """The replica's recommendations. Where it has no time it is asked again, ASK_S long. Raises Trouble."""
        body = {"user": asked.user, "scenario": asked.scenario, "context": {"query": asked.query}, "k": asked.k,
                "log": log, "explain": explain}  # fmt: skip
        url, end = f"{self.visited.replica}/v1/recommend", time.monotonic() + ASK_S
        while True:
            try:
                async with self._session.post(url, data=orjson.dumps(body)) as response:
                    answer = orjson.loads(await response.read())
                    status = response.status
            except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError) as error:
                raise Trouble(f"the replica at {self.visited.replica} does not answer ({_said(error)})") from None
            if status == 200:
                return answer
            if status not in BUSY or time.monotonic() > end:
                raise Trouble(f"the replica says: {answer.get('detail') or status}")
            await asyncio.sleep(AGAIN_S)

    def _need_open(self) -> None:
        if self.closed:
            raise Trouble(self.closed, 409)


def _late(why: str) -> dict[str, Any]:
    return {"stage": "late", "why": f"{why} within {PATIENCE_S:.0f} s"}


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1e3, 1)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
