"""What a replica knows of a user before it is learned is what the joiner will say of that moment."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from embedding_store.columns import TableRows
from embedding_store.delta import Version
from embedding_store.ids import feature_id
from online_model.examples import Block, Part
from online_model.features import USER
from online_model.history import EMPTY
from online_model.serving.holder import Holder
from online_model.serving.live import Coverage, LiveUsers, marks_of
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings
from streams.joiner import Joiner, JoinSettings, Record
from streams.live_events import LiveEvents
from streams.settings import ServeWorkerSettings

S = JoinSettings()
USERS = [f"u{i}" for i in range(8)]
FAR = 1 << 42  # ms, after everything
START = 1_700_000_000_000


def made_log(seed: int, n: int = 120) -> list[Record]:
    """Disorder, late events, ties, duplicates, forgets, things refused."""
    dice, now, records = random.Random(seed), START, []
    sent: list[bytes] = []
    for number in range(n):
        now += dice.choice([0, 1, 20, 90, 400])
        kind = dice.choice([*["click", "watch", "cart", "purchase", "impression"] * 3, "tick", "refund", "forget"])
        late = dice.choice([0, 0, 0, 5, 100, 240, 260, 3_000])
        event: dict[str, Any] = {
            "kind": kind, "event_id": dice.choice([f"e{number}", f"a{n - number}"]), "ts": now - late,
            "user": dice.choice(USERS),
        }  # fmt: skip
        if kind == "impression":
            event |= {"request_id": number, "items": [1, 2]}
        elif kind not in ("tick", "forget"):
            event["item"] = dice.randrange(6)
        if kind == "watch":
            event |= {"play_ms": 1, "duration_ms": 2}
        if dice.random() < 0.03:
            event["ts"] += 10 * S.future_ms
        value = b"poison" if dice.random() < 0.03 else orjson.dumps(event)
        if sent and dice.random() < 0.1:
            value = dice.choice(sent[-5:])
        sent.append(value)
        records.append(Record(2 * number, now, value))
    return records


class Rows:
    """The user rows of a model that learns blocks whole, and of those what a replica holds."""

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}
        self.coverage = Coverage()
        self._owed: dict[int, bytes] = {}

    def learn(self, block: Block, dice: random.Random | None = None) -> None:
        """A version after `block`. With `dice` some of the rows wait for a later one."""
        for user in block.examples.user[block.examples.part == Part.FORGET].tolist():
            self.held.pop(user, None)
            self._owed.pop(user, None)
        states = [state.tobytes() for state in block.histories]
        self._owed |= dict(zip(block.users.tolist(), states, strict=True))
        sent = [user for user in self._owed if dice is None or dice.random() < 0.5]
        for user in sent:
            self.held[user] = self._owed.pop(user)
        mark = {"handled": block.handled, "next": block.to_offset, "watermark": block.watermark, "set_aside": []}
        version = Version(
            1, 2, (1, 1), info={"partitions": {"0": mark}, "owed": {"rows": len(self._owed)}},
            tables={USER: TableRows(np.array(sent, np.int64), {})},
        )  # fmt: skip
        self.coverage.advance(version, marks_of(version))


def reader(live: LiveUsers) -> LiveEvents:
    replica = Replica(ReplicaSettings(), FeatureSettings(), RankerSettings())
    return LiveEvents(ServeWorkerSettings(bootstrap="", data_dir=Path()), Holder(replica), live, asyncio.Event())


def truth(log: list[Record]) -> dict[int, bytes]:
    """The joiner's states once all of the log is handled."""
    joiner, states = Joiner(S, 0), {}
    tick = Record(log[-1].offset + 1 if log else 0, None, orjson.dumps({"kind": "tick", "event_id": "end", "ts": FAR}))
    block = joiner.process([*log, tick]).block
    states = dict(zip(block.users.tolist(), (state.tobytes() for state in block.histories), strict=True))
    return {feature_id(USER, user): states.get(feature_id(USER, user), EMPTY) for user in USERS}


@pytest.mark.parametrize("owed", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_users_state_is_that_of_the_joiner_whatever_is_learned(owed: bool, fresh: bool) -> None:
    """`fresh`: the events are read from where the first version held is. `owed`: versions hold some rows back."""
    moved = 0
    for seed in range(25):
        log, dice = made_log(seed), random.Random(seed)
        live = LiveUsers(10_000, S.disorder_ms)
        events, rows, joiner = reader(live), Rows(), Joiner(S, 0)
        learned = read = 0
        if fresh:
            learned = dice.randrange(1, 60)
            rows.learn(joiner.process(log[:learned]).block)
            read = bisect_left(log, events.begin(rows.coverage.marks)[0], key=lambda record: record.offset)
        while read < len(log):
            more = read + dice.randrange(1, 30)
            events.take(0, log[read:more])
            read = min(len(log), max(read, more))
            if read < learned:
                continue
            if dice.random() < 0.5:
                until = dice.randrange(learned, read + 1)
                rows.learn(joiner.process(log[learned:until], to_offset=None).block, dice if owed else None)
                learned = until
            for user, state in truth(log[:read]).items():
                row = rows.held.get(user)
                assert live.history(user, row, rows.coverage, FAR) == state, (seed, read, learned)
                moved += row != state
        assert live.dropped == 0
    assert moved > 100, "what was asked was not in the rows"
