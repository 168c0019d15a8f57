"""A user who is forgotten is nowhere any more: not in joiner, trainer and replica, nor in the files of their stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from embedding_store.delta import Assembler
from embedding_store.ids import feature_id
from online_model.examples import Examples, Part
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from streams.blocks import decode_block, encode_block
from streams.join_caches import key_of
from streams.join_store import JoinStore
from streams.joiner import Joiner, JoinSettings, Record
from tests.online_model.serving.world import rank

T0 = 1_700_000_000_000
JOIN = JoinSettings(disorder_ms=0, wait_ms=1_000, open_ms=60_000, purchase_wait_ms=10_000, purchase_window_ms=100_000)
MODEL = TrainerSettings(
    features=FeatureSettings(dim=8, users=64, items=64, categories=8),
    ranker=RankerSettings(hidden=16, second=8, third=8),
    purchase_wait_ms=10_000, feedback="elapsed",
)  # fmt: skip
GOES, STAYS = "the-user-who-goes", "the-user-who-stays"


class System:
    """Joiner, trainer and replica, one after the other; every step committed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.offset, self.blocks = folder, 0, 0
        self.replica = Replica(
            ReplicaSettings(), MODEL.features, MODEL.ranker, clock=lambda: T0, feedback=MODEL.feedback
        )
        self._assembler = Assembler()
        self.rows = Examples.empty()
        self.start()

    def start(self) -> None:
        self.store = JoinStore(self.folder / "join", JOIN)
        self.joiner = Joiner(JOIN, 0, self.store.next_offset or 0, self.store.state())
        self.trainer: Trainer = open_trainer(MODEL, self.folder / "train", lambda: T0)

    def close(self) -> None:
        self.store.close()
        self.trainer.store.close()

    def send(self, *events: dict) -> None:
        """Joins, learns, commits and serves some events."""
        records = [Record(self.offset + i, None, orjson.dumps(event)) for i, event in enumerate(events)]
        self.offset += len(events)
        joined = self.joiner.process(records)
        raw = encode_block(joined.block)
        self.store.commit(joined, [raw])
        self.joiner.trim(0)
        block = decode_block(raw)
        self.rows = Examples.concat([self.rows, block.examples])
        self.trainer.offer(block, self.blocks)
        self.blocks += 1
        while self.trainer.step():
            pass
        for part in self.trainer.commit() or []:
            if (version := self._assembler.add(part)) is not None:
                assert self.replica.apply(version)
        self.trainer.store.acknowledge(self.trainer.sequence)

    def knows(self, user: str) -> dict[str, bool]:
        ids = np.array([feature_id("user", user)], np.int64)
        (id_,) = ids.tolist()
        return {
            "joiner": self.joiner._histories.get(id_) is not None or bool(self.store._windows.of_user(id_)),
            "trainer": bool(self.trainer.tables.rows("user", ids, admit=False)[0]),
            "store": bool(self.trainer.store.read_rows("user", ids)[0][0]),
            "replica": bool(self.replica.state.users.find(ids)[0]),
        }

    def files_with(self, user: str) -> list[str]:
        """The files that hold the user's name or the id made of it, in any of the ways that it is written."""
        id_ = feature_id("user", user)
        packed = [id_.to_bytes(8, order, signed=True) for order in ("little", "big")]  # type: ignore[arg-type]
        forms = [user.encode(), key_of(id_), *packed]
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return [path.name for path in files if any(form in path.read_bytes() for form in forms)]


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path)
    yield made
    made.close()


def session(user: str, at: int) -> list[dict]:
    """A page seen, two clicks on it, a watch and a purchase."""
    about = {"user": user, "scenario": "shelf", "request_id": f"r{user}{at}"}
    item = {"item": "i1"}
    played = {"play_ms": 9, "duration_ms": 10}
    return [
        about | {"kind": "impression", "event_id": f"i{user}{at}", "ts": T0 + at, "items": ["i1", "i2", "i3"]},
        about | item | {"kind": "click", "event_id": f"c{user}{at}", "ts": T0 + at + 10},
        about | {"kind": "click", "event_id": f"d{user}{at}", "ts": T0 + at + 20, "item": "i2"},
        about | item | {"kind": "watch", "event_id": f"w{user}{at}", "ts": T0 + at + 30} | played,
        about | item | {"kind": "purchase", "event_id": f"p{user}{at}", "ts": T0 + at + 40},
    ]


def tick(at: int) -> dict:
    return {"kind": "tick", "event_id": at, "ts": T0 + at}


def forget(user: str, at: int) -> dict:
    return {"kind": "forget", "event_id": f"f{user}{at}", "user": user, "ts": T0 + at}


def test_a_forgotten_user_is_nowhere_and_starts_anew(system: System) -> None:
    for n in range(3):
        system.send(*session(STAYS, n * 100), *session(GOES, n * 100 + 50))
    system.send(tick(2_000))
    assert system.knows(GOES) == system.knows(STAYS) == dict.fromkeys(("joiner", "trainer", "store", "replica"), True)
    assert system.files_with(GOES), "the search finds what is there"
    unknown = [r.click for r in rank(system.replica, "somebody else", "shelf", ["i1", "i2"]).items]
    assert [r.click for r in rank(system.replica, GOES, "shelf", ["i1", "i2"]).items] != unknown

    system.send(forget(GOES, 2_100), tick(2_200))
    assert not any(system.knows(GOES).values())
    assert all(system.knows(STAYS).values())
    unknown = [r.click for r in rank(system.replica, "somebody else", "shelf", ["i1", "i2"]).items]
    assert [r.click for r in rank(system.replica, GOES, "shelf", ["i1", "i2"]).items] == unknown
    assert (system.trainer.positions[0].rows, system.trainer.erasures) == (len(system.rows), 1)

    system.send(tick(90_000))  # the time is over in which late events of the user would have to be known as such
    after = system.rows.take(system.rows.closed >= T0 + 2_100)
    assert after.part[after.user == feature_id("user", GOES)].tolist() == [Part.FORGET], "no timer was left"
    assert not system.store.purge(stop=lambda: True)
    system.close()
    system.start()  # what is still to be done is remembered
    assert system.trainer.erasures > system.trainer.purged
    assert system.store.purge()
    assert not system.store.purge(), "once is enough"
    system.trainer.store.purge()
    system.close()
    system.start()  # RocksDB's list of files names their first and last keys, until it is written anew at a start
    assert system.files_with(GOES) == []
    assert system.files_with(STAYS)

    system.send(*session(GOES, 90_100), tick(92_000))
    assert system.knows(GOES)["replica"]
    first = system.rows.user == feature_id("user", GOES)
    assert not system.rows.history[first & (system.rows.ts >= T0 + 90_000)].any(), "as somebody new"


def test_a_user_who_is_back_at_once_is_known_from_then_on(system: System) -> None:
    """Forgetting and the next session in one block: what is from before is gone, what is from after is there."""
    system.send(*session(GOES, 0), *session(STAYS, 5))
    system.send(forget(GOES, 500), *session(GOES, 600), tick(900))
    assert all(system.knows(GOES).values())
    user = np.array([feature_id("user", GOES)], np.int64)
    at = system.trainer.tables.rows("user", user, admit=False)
    learned = system.trainer.tables.read_rows("user", at)["history"][0].tobytes()
    known = system.joiner._histories.get(int(user[0]))
    assert known is not None
    assert learned == known.latest()
