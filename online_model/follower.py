"""The process of a further rank, as `Followers` starts it: python -m online_model.follower, told a `Following`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Thread

import msgspec

from online_model.ranks import Following, follow_as


def main() -> None:
    """Until the first rank lets this one go, or ends."""
    size = int.from_bytes(sys.stdin.buffer.read(4), "big")
    told = msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=Following)
    Thread(target=_end_with_parent, name="parent", daemon=True).start()
    follow_as(
        told.rank, told.size, told.rank, Path(told.meeting), told.settings, told.partitions, told.device, told.threads
    )


def _end_with_parent() -> None:
    """Where the first rank was killed before all have met, nothing else would tell."""
    os.read(0, 1)  # nothing more is said: it returns at the pipe's end
    os._exit(1)


if __name__ == "__main__":
    main()
