"""What would be written without Headrace: two stock Faust workers, an agent each, an event at a time.

    join   events, JSON by Faust's codec → what was shown, what was clicked within the wait → topic of examples, JSON
    train  examples → `PlainRanker` (TorchRec as it comes), a page a step → once a second the parameters to a topic

State is in plain dicts: in memory, gone with the process, nothing exactly once, nobody waits for events that are out of
order, nothing is refused, no id is too old. The user's state is Headrace's own (`online_model.history`). The join has
no store and no purchase window; a watch is learned as it comes; parameters are the touched rows and the dense weights,
without encoding, sums or positions. All of this is cheaper than what Headrace does.

`take`: the trainer takes so many examples at a time by Faust's `stream.take` and learns them in one step: 0 for one.

A `tick` in the log closes what its partition has open and goes through to the trainer: when those of all partitions
were seen the parameters go out at once, the last message's key says how often
that was so far, and how many rows were learned.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from deploy.bench.stock_faust import run_stock_faust
from embedding_store.ids import feature_id
from online_model.history import Kind, UserHistory

PUBLISH_S = 1.0
TAKE_WITHIN_S = 0.1
MESSAGE_BYTES = 500_000  # a producer as it comes sends no more than a million at once


class PlainJoin:
    """One event in, examples out: of one partition."""

    def __init__(self, wait_ms: int) -> None:
        self._wait_ms = wait_ms
        self._histories: dict[str, UserHistory] = {}
        self._pages: dict[str, dict[str, Any]] = {}  # request → its example
        self._waiting: deque[tuple[int, str]] = deque()  # (until when, request)

    def handle(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """The examples that are complete with this event."""
        kind, ts = event["kind"], event["ts"]
        out = []
        while self._waiting and self._waiting[0][0] < ts:
            out.append(self._pages[self._waiting.popleft()[1]])
            out[-1]["open"] = False
        if kind == "tick":
            return [*out, {"end": event["event_id"]}]
        user = event["user"]
        history = self._histories.get(user)
        if history is None:
            history = self._histories[user] = UserHistory()
        if kind == "impression":
            items = list(dict.fromkeys(event["items"]))
            self._pages[event["request_id"]] = {
                "user": user, "ts": ts, "items": items, "clicks": [0] * len(items), "open": True,
                "state": history.as_of(ts).hex(),
            }  # fmt: skip
            self._waiting.append((ts + self._wait_ms, event["request_id"]))
            return out
        history.push(feature_id("item", event["item"]), ts, Kind[kind.upper()])
        page = self._pages.get(event["request_id"])
        return out if page is None else out + self._feedback(page, event)

    def _feedback(self, page: dict[str, Any], event: dict[str, Any]) -> list[dict[str, Any]]:
        """An example of one item, where the page is gone already."""
        kind = event["kind"]
        if kind == "click" and page["open"]:
            page["clicks"][page["items"].index(event["item"])] = 1
            return []
        example = {"user": page["user"], "ts": page["ts"], "items": [event["item"]], "state": page["state"]}
        match kind:
            case "click":
                return [example | {"clicks": [1]}]
            case "watch":
                return [example | {"long_view": event["play_ms"] >= event["duration_ms"] / 2}]
        return [example | {"purchase": 1}]


def run_join(bootstrap: str, events: str, examples: str, wait_ms: int, **_: Any) -> None:
    """The join worker, until it is killed."""

    def add(app: Any) -> None:
        out = app.topic(examples, value_serializer="json")
        joins: dict[int, PlainJoin] = {}

        async def join(stream: Any) -> None:
            async for event in stream.events():
                partition = event.message.partition
                if partition not in joins:
                    joins[partition] = PlainJoin(wait_ms)
                for example in joins[partition].handle(event.value):
                    await out.send(value=example, partition=partition)

        app.agent(app.topic(events, value_serializer="json"))(join)

    run_stock_faust(bootstrap, f"{events}-join", add)


class PlainTrain:
    """Examples in, learned at once; parameters when they are asked for."""

    def __init__(self) -> None:
        from deploy.bench.plain_ranker import PlainRanker
        from online_model.settings import TrainerSettings

        self._model = PlainRanker(TrainerSettings())
        self._touched: dict[str, set[int]] = {"user": set(), "item": set()}
        self.rows = 0

    def learn(self, examples: list[dict[str, Any]]) -> None:
        """One step."""
        from online_model.features import ITEM, USER

        candidates, target, shown = batch_of(examples)
        ready = self._model.ready(candidates, target, shown)
        self._model.learn(ready)
        self._model.count(candidates, target, shown)
        self.rows += len(target)
        for table, ids in ((USER, candidates.user), (ITEM, candidates.item)):
            self._touched[table].update(self._model.rows(table, ids, admit=False).tolist())

    def parameters(self) -> bytes:
        """Dense weights and what was touched since the last time: row numbers, weights."""
        import numpy as np

        parts = [weights.tobytes() for weights in self._model.ranker.weights().values()]
        for table, touched in self._touched.items():
            rows = np.fromiter(touched, np.int64, len(touched))
            parts += [rows.tobytes(), self._model.tables.weights[table].detach()[rows].numpy().tobytes()]
            touched.clear()
        return b"".join(parts)


def batch_of(examples: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """(candidates, targets float32 [N, heads], bool [N] whether it is a page) of examples as they came."""
    import numpy as np

    from embedding_store.ids import feature_ids
    from online_model.batch import Candidates
    from online_model.examples import QUERY_WORDS
    from online_model.history import HISTORY_BYTES
    from online_model.ranker import CLICK, HEADS, PURCHASE, WATCH

    sizes = [len(one["items"]) for one in examples]
    target = np.full((sum(sizes), len(HEADS)), np.nan, np.float32)
    start = 0
    for one, size in zip(examples, sizes, strict=True):
        own = target[start : start + size]
        if "clicks" in one:
            own[:, CLICK] = one["clicks"]
            own[own[:, CLICK] == 1, PURCHASE] = 0
        if "long_view" in one:
            own[:, WATCH] = one["long_view"]
        if "purchase" in one:
            own[:, PURCHASE] = 1
        start += size
    count = len(examples)
    states = b"".join(bytes.fromhex(one["state"]) for one in examples)
    candidates = Candidates(
        user=feature_ids("user", [one["user"] for one in examples]),
        history=np.frombuffer(states, np.uint8).reshape(count, HISTORY_BYTES),
        moment=np.array([one["ts"] for one in examples]), scenario=np.zeros(count, np.int64),
        query=np.zeros((count, QUERY_WORDS), np.int64),
        item=feature_ids("item", [item for one in examples for item in one["items"]]),
        ctx=np.repeat(np.arange(count), sizes), position=np.full(sum(sizes), -1),
    )  # fmt: skip
    return candidates, target, np.repeat(["open" in one for one in examples], sizes)


def run_train(bootstrap: str, examples: str, parameters: str, partitions: int, take: int, **_: Any) -> None:
    """The train worker, until it is killed."""
    import torch

    torch.set_num_threads(1)  # two processes on two cores
    model = PlainTrain()

    def add(app: Any) -> None:
        out = app.topic(parameters, value_serializer="raw", key_serializer="raw")
        ends, due = 0, time.monotonic() + PUBLISH_S

        async def learned(batch: list[dict[str, Any]]) -> None:
            nonlocal ends, due
            pages = [example for example in batch if "end" not in example]
            if pages:
                model.learn(pages)
            before, ends = ends, ends + len(batch) - len(pages)
            done = ends // partitions
            if done > before // partitions or time.monotonic() > due:
                whole = model.parameters()
                *parts, last = (whole[at : at + MESSAGE_BYTES] for at in range(0, len(whole), MESSAGE_BYTES))
                for part in parts:
                    await out.send(value=part)
                await out.send(key=b"%d %d" % (done, model.rows), value=last)
                due = time.monotonic() + PUBLISH_S

        async def train(stream: Any) -> None:
            if take:
                async for batch in stream.take(take, within=TAKE_WITHIN_S):
                    await learned(batch)
            else:
                async for example in stream:
                    await learned([example])

        app.agent(app.topic(examples, value_serializer="json"))(train)

    run_stock_faust(bootstrap, f"{examples}-train", add)


if __name__ == "__main__":
    parts: dict[str, Callable[..., None]] = {"join": run_join, "train": run_train}
    parts[sys.argv[1]](**json.loads(sys.argv[2]))
