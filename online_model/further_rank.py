"""What the process of a further rank does: one that `FurtherRanks` starts, or torchrun.

`FurtherRanks` starts it as python -m online_model.further_rank, told a `RankStart`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import torch

from embedding_store.errors import CorruptRecord, HeadraceError
from embedding_store.ranks import Launch, Ranks
from online_model.ranks import RankStart, follow
from online_model.settings import TrainerSettings


def main() -> None:
    """Until the first rank lets this one go, or ends."""
    size = int.from_bytes(sys.stdin.buffer.read(4), "big")
    told = msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=RankStart)
    Thread(target=_end_with_parent, name="parent", daemon=True).start()
    run_rank(
        told.rank, told.size, told.rank, Path(told.meeting), told.settings, told.partitions, told.device, told.threads
    )


def run_launched(launch: Launch, settings: TrainerSettings, partitions: int, device: str, threads: int) -> None:
    """A further rank that torchrun has started, until the first one lets it go. Arguments: as of the first rank.

    Ends the process with exit 1 where the first rank is lost.
    """
    run_rank(launch.rank, launch.size, launch.local_rank, launch, settings, partitions, device, threads)


def run_rank(
    rank: int, size: int, local_rank: int, meeting: Path | Launch, settings: TrainerSettings, partitions: int,
    device: str, threads: int,
) -> None:  # fmt: skip
    """What the process of a further rank does, until the first one lets it go. Arguments: as of `Ranks` and the first
    rank; local_rank: among those of this machine. Ends the process with exit 1 where the first rank is lost."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever sends them to all means the first, which then says `end`
        signal.signal(number, signal.SIG_IGN)
    from online_model.trainer import open_trainer  # takes seconds: a signal meanwhile is not meant for this one either

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(partitions > 0)
    own = f"cuda:{local_rank}" if device.startswith("cuda") else device
    try:
        ranks = Ranks(rank, size, meeting, own)
        while follow(open_trainer(settings, None, _no_clock, partitions, own, ranks=ranks)):
            pass
    except CorruptRecord as error:  # what only this one has seen
        sys.stderr.write(f"rank {rank}: {error}\n")
        os._exit(1)
    except HeadraceError:
        os._exit(1)  # the first rank says why, and what to do


def _no_clock() -> Any:
    raise AssertionError("clocks are read by the first rank alone")


def _end_with_parent() -> None:
    """Where the first rank was killed before all have met, nothing else would tell."""
    os.read(0, 1)  # nothing more is said: it returns at the pipe's end
    os._exit(1)


if __name__ == "__main__":
    main()
