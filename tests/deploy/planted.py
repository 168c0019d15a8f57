"""`headrace` with a bug planted in it: what starts the workers when the torture is tortured.

    python -m tests.deploy.planted BUG join --config FILE
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from deploy.cli import main
from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.delta import Version


def one_early() -> None:
    """After a restart the trainer learns its last row again."""
    from online_model.positions import RowQueue

    load = RowQueue.load

    def early(self: RowQueue, state: dict) -> None:
        load(self, state)
        if self._last is not None:
            closed, example, part = self._last
            self._last = closed, example, part - 1

    RowQueue.load = early  # type: ignore[method-assign]


def one_late() -> None:
    """After a restart the trainer takes the first row that it has not learned for one that it has."""
    from online_model.positions import RowQueue

    learned_before = RowQueue._learned_before

    def late(self: RowQueue, partition: int, rows: Any) -> np.ndarray:
        drop = learned_before(self, partition, rows)
        rest = np.flatnonzero(~drop)
        if drop.any() and len(rest):
            drop[rest[np.lexsort((rows.example_id[rest], rows.closed[rest]))[0]]] = True
        return drop

    RowQueue._learned_before = late  # type: ignore[method-assign]


def acknowledged_early() -> None:
    """A version leaves the outbox when it is committed, and is sent a little later."""
    from streams.train_worker import TrainWorker

    commit, publish = CheckpointStore.commit, TrainWorker._publish

    def early(self: CheckpointStore, commit_: Commit) -> None:
        commit(self, commit_)
        self.acknowledge(commit_.sequence)

    async def later(self: TrainWorker, sequence: int, parts: list[bytes]) -> None:
        await asyncio.sleep(1.0)
        await publish(self, sequence, parts)

    CheckpointStore.commit = early  # type: ignore[method-assign]
    TrainWorker._publish = later  # type: ignore[method-assign]


def no_tombstones() -> None:
    """A version does not tell which rows are gone."""
    from online_model import trainer

    def version(**fields: Any) -> Version:
        return Version(**{**fields, "gone": {}})

    trainer.Version = version  # type: ignore[misc, assignment]


def half_a_version() -> None:
    """A replica leaves the dense weights of every other version out."""
    from online_model.serving.state import State

    change = State.change

    def half(self: State, version: Version, cards: Any) -> None:
        if version.sequence % 2 and version.base is not None:
            version.dense = {}
        change(self, version, cards)

    State.change = half  # type: ignore[method-assign]


def unread_checksums() -> None:
    """What a copy's manifest says of its files is not compared with what they are."""
    from embedding_store import copies

    class Agreeable(copies.File, frozen=True):
        __hash__ = copies.File.__hash__

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

    pump = copies._pump

    def unread(*arguments: Any) -> copies.File:
        file = pump(*arguments)
        return Agreeable(file.name, file.size, file.xxh3)

    copies._pump = unread


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (one_early, one_late, acknowledged_early, no_tombstones, half_a_version, unread_checksums)
}

if __name__ == "__main__":
    BUGS[sys.argv[1]]()
    main(sys.argv[2:])
