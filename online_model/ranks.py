"""The trainer on several ranks: each has a trainer of its own, and does what the first one does, in its order.

A call of the first rank's trainer that changes anything is told to the others before it is done (`on_all_ranks`), with
its arguments. So all trainers know the same; of the rows and of the work of a step each has a share (see
embedding_store/ranks.py). Rank 0 alone has the store, reads clocks, and publishes. A rank that is lost ends all others;
started again, they go on from the last commit, of which nothing hangs on how many they were.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from threading import Thread
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import msgspec

from embedding_store.codec import may_be_sent
from embedding_store.errors import CorruptRecord, RankLost
from embedding_store.ranks import Ranks, lost
from online_model.batch import Candidates
from online_model.examples import Block, Counts, Examples
from online_model.settings import TrainerSettings


class _OnRanks(Protocol):
    @property
    def ranks(self) -> Ranks: ...


S = TypeVar("S", bound=_OnRanks)
P = ParamSpec("P")
R = TypeVar("R")
may_be_sent(Block, Examples, Counts, Candidates)
_told: dict[str, Callable] = {}  # the methods of `on_all_ranks` by their qualified names: nothing else is called
_END: tuple[str, tuple, dict] = ("", (), {})
_AGAIN: tuple[str, tuple, dict] = ("", ("again",), {})


def on_all_ranks(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that all ranks call when the first one does. It must not call another one of its kind."""

    @wraps(method)
    def told(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.ranks.rank == 0 and self.ranks.size > 1:
            self.ranks.from_first(lambda: (method.__qualname__, args, kwargs))
        with self.ranks.together():
            return method(self, *args, **kwargs)

    _told[method.__qualname__] = told
    return told


def follow(trainer: _OnRanks) -> bool:
    """On a further rank: does what the first one's trainer does, until that says `end` or `again`. Whether it is the
    latter: to open another trainer then. Raises RankLost, CorruptRecord."""
    while True:
        match trainer.ranks.from_first(lambda: _END):
            case ("", tuple(again), _):
                return bool(again)
            case (str(name), tuple(args), dict(kwargs)) if name in _told:
                _told[name](trainer, *args, **kwargs)
            case other:
                raise CorruptRecord(f"the first rank calls what is not for all ({other!r:.100}): use one release")


class RankStart(msgspec.Struct, frozen=True):
    """What a process of `FurtherRanks` is told, on its standard input, which then stays open as long as its parent
    lives: four bytes that say how long it is, and it as msgpack."""

    rank: int
    size: int
    meeting: str
    settings: TrainerSettings
    partitions: int
    device: str
    threads: int


class FurtherRanks:
    """The processes of ranks 1 … size − 1, on this machine. To be started before the first rank joins the others."""

    def __init__(
        self, size: int, folder: Path, settings: TrainerSettings, partitions: int, device: str, threads: int
    ) -> None:
        """folder: where they meet. The rest: as of the first rank."""
        folder.mkdir(parents=True, exist_ok=True)
        # New each time: a rank of a trainer that was killed may still be on its way to the one before.
        self.meeting = folder / uuid.uuid4().hex
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ending = False
        atexit.register(self._kill)
        for rank in range(1, size):
            process = subprocess.Popen([sys.executable, "-m", "online_model.further_rank"], stdin=subprocess.PIPE)
            self._processes.append(process)
            start = RankStart(rank, size, str(self.meeting), settings, partitions, device, threads)
            told = msgspec.msgpack.encode(start)
            assert process.stdin is not None
            process.stdin.write(len(told).to_bytes(4, "big") + told)
            process.stdin.flush()

    @property
    def pids(self) -> list[int]:
        """Of ranks 1, 2, …"""
        return [process.pid for process in self._processes]

    def watch(self, report: Callable[[RankLost], Any]) -> None:
        """Calls `report`, in a thread of its own, as soon as one of them ends before `end` lets it: the first rank may
        be waiting for it where nothing tells it, or have nothing to ask it for hours."""
        for rank, process in enumerate(self._processes, 1):
            Thread(target=self._watch, args=(rank, process, report), name=f"rank {rank}", daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes], report: Callable[[RankLost], Any]) -> None:
        process.wait()
        if not self._ending:
            self._ending = True  # where one is lost the others end too: it is said once
            report(lost(len(self._processes) + 1, f"rank {rank} has ended"))

    def _kill(self) -> None:
        self._ending = True
        for process in self._processes:
            process.kill()

    def tidy(self) -> None:
        """Removes what trainers that were killed have left behind. To be called by the one that has the store."""
        for path in self.meeting.parent.iterdir():
            if path != self.meeting:
                path.unlink()

    def end(self, ranks: Ranks) -> None:
        """Lets them go, and waits until they have."""
        self._ending = True
        let_go(ranks)
        for process in self._processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self.meeting.unlink(missing_ok=True)


def let_go(ranks: Ranks) -> None:
    """The first rank has no more to do: the others may end."""
    ranks.from_first(lambda: _END)


def begin_again(ranks: Ranks) -> None:
    """Has the others open their trainers again, as the first rank is about to do, in the same group: TorchRec keeps
    what it made of a group as long as the process lives, so they cannot meet in another one."""
    ranks.from_first(lambda: _AGAIN)
