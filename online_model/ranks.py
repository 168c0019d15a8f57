"""The trainer on several ranks: each has a trainer of its own, and does what the first one does, in its order.

A call of the first rank's trainer that changes anything is told to the others before it is done (`on_all_ranks`), with
its arguments. So all trainers know the same; of the rows and of the work of a step each has a share (see
embedding_store/ranks.py). Rank 0 alone has the store, reads clocks, and publishes. A rank that is lost ends all others;
started again, they go on from the last commit, of which nothing hangs on how many they were.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from embedding_store.errors import HeadraceError, RankLost
from embedding_store.ranks import Launch, Ranks, lost
from online_model.settings import TrainerSettings


class _OnRanks(Protocol):
    @property
    def ranks(self) -> Ranks: ...


S = TypeVar("S", bound=_OnRanks)
P = ParamSpec("P")
R = TypeVar("R")
_END: tuple[str, tuple, dict] = ("", (), {})
_AGAIN: tuple[str, tuple, dict] = ("", ("again",), {})


def on_all_ranks(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that all ranks call when the first one does. It must not call another one of its kind."""

    @wraps(method)
    def told(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.ranks.rank == 0 and self.ranks.size > 1:
            self.ranks.from_first(lambda: (method.__name__, args, kwargs))
        with self.ranks.together():
            return method(self, *args, **kwargs)

    return told


def follow(trainer: _OnRanks) -> bool:
    """On a further rank: does what the first one's trainer does, until that says `end` or `again`. Whether it is the
    latter: to open another trainer then. Raises RankLost."""
    while True:
        name, args, kwargs = trainer.ranks.from_first(lambda: _END)
        if not name:
            return bool(args)
        getattr(trainer, name)(*args, **kwargs)


class Followers:
    """The processes of ranks 1 … size − 1, on this machine. To be started before the first rank joins the others."""

    def __init__(
        self, size: int, folder: Path, settings: TrainerSettings, partitions: int, device: str, threads: int
    ) -> None:
        """folder: where they meet. The rest: as of the first rank."""
        folder.mkdir(parents=True, exist_ok=True)
        # New each time: a rank of a trainer that was killed may still be on its way to the one before.
        self.meeting = folder / uuid.uuid4().hex
        context = multiprocessing.get_context("spawn")
        every = (size, self.meeting, settings, partitions, device, threads)
        self._processes: list[BaseProcess] = [
            context.Process(target=_run, args=(rank, *every), name=f"rank {rank}", daemon=True)
            for rank in range(1, size)
        ]
        self._ending = False
        atexit.register(self._kill)
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """Of ranks 1, 2, …"""
        return [process.pid or 0 for process in self._processes]

    def watch(self, report: Callable[[RankLost], Any]) -> None:
        """Calls `report`, in a thread of its own, as soon as one of them ends before `end` lets it: the first rank may
        be waiting for it where nothing tells it, or have nothing to ask it for hours."""
        Thread(target=self._watch, args=(report,), name="ranks", daemon=True).start()

    def _watch(self, report: Callable[[RankLost], Any]) -> None:
        names = {process.sentinel: process.name for process in self._processes}
        ended = wait(list(names))
        if not self._ending:
            report(lost(len(names) + 1, f"{names[ended[0]]} has ended"))  # type: ignore[index]

    def _kill(self) -> None:
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
            process.join()
        self.meeting.unlink(missing_ok=True)


def follow_launched(launch: Launch, settings: TrainerSettings, partitions: int, device: str, threads: int) -> None:
    """A further rank that torchrun has started, until the first one lets it go. Arguments: as of the first rank.

    Ends the process with exit 1 where the first rank is lost.
    """
    _follow(launch.rank, launch.size, launch.local_rank, launch, settings, partitions, device, threads)


def let_go(ranks: Ranks) -> None:
    """The first rank has no more to do: the others may end."""
    ranks.from_first(lambda: _END)


def begin_again(ranks: Ranks) -> None:
    """Has the others open their trainers again, as the first rank is about to do, in the same group: TorchRec keeps
    what it made of a group as long as the process lives, so they cannot meet in another one."""
    ranks.from_first(lambda: _AGAIN)


def _run(
    rank: int, size: int, meeting: Path, settings: TrainerSettings, partitions: int, device: str, threads: int
) -> None:
    Thread(target=_end_with_parent, name="parent", daemon=True).start()
    _follow(rank, size, rank, meeting, settings, partitions, device, threads)


def _follow(
    rank: int, size: int, local_rank: int, meeting: Path | Launch, settings: TrainerSettings, partitions: int,
    device: str, threads: int,
) -> None:  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever sends them to all means the first, which then says `end`
        signal.signal(number, signal.SIG_IGN)
    import torch

    from online_model.trainer import open_trainer

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(partitions > 0)
    own = f"cuda:{local_rank}" if device.startswith("cuda") else device
    try:
        ranks = Ranks(rank, size, meeting, own)
        while follow(open_trainer(settings, None, _no_clock, partitions, own, ranks=ranks)):
            pass
    except HeadraceError:
        os._exit(1)  # the first rank says why, and what to do


def _end_with_parent() -> None:
    """Where the first rank was killed before all have met, nothing else would tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _no_clock() -> Any:
    raise AssertionError("clocks are read by the first rank alone")
