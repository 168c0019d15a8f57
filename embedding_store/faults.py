"""Places where a test may end the process, as a kill -9 there would. Free while none is armed: one comparison.

    HEADRACE_FAULT=commit.written:3 headrace train      # ends itself the third time that it comes to that point
    HEADRACE_FAULT=store.write:1:0.5 headrace train     # waits there half a second, each time from the first on

A point stands at the boundary between two steps: what is done before it, and what is not yet. All are named here, so
that a test can go through them; a name that is not here is refused.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "HEADRACE_FAULT"
POINTS = {
    "store.write": "RocksDB is about to get a batch: of a commit, an acknowledgement, a joiner's slice",
    "commit.begun": "nothing is read yet",
    "commit.encoded": "the version's parts are in memory",
    "commit.filled": "the batch is filled, not written",
    "commit.written": "the store has it, this process does not know",
    "commit.done": "the touched rows count as clean",
    "publish.begun": "committed, nothing is sent",
    "publish.sent": "the broker has the version, nobody has noted it",
    "acknowledge.begun": "the version is in the outbox still",
    "acknowledge.written": "it has left the outbox",
    "apply.begun": "the replica has a whole version",
    "apply.checked": "it fits, nothing is changed",
    "apply.changed": "rows and weights are changed, the replica's version is the old one",
    "apply.done": "the replica serves it",
    "snapshot.copied": "RocksDB's copy is there",
    "snapshot.part": "a part is written",
    "snapshot.written": "all parts are, under the name that does not count",
    "snapshot.renamed": "it counts, older ones are still there",
    "snapshot.done": "older ones are gone",
    "keep.copied": "RocksDB's copy is there, to be kept",
    "keep.read": "it was read, nothing is put",
    "copy.file": "a file of a copy is put",
    "copy.files": "all are, without the manifest",
    "copy.manifest": "it counts, older ones are still there",
    "copy.done": "older ones are gone",
    "reshape.copied": "RocksDB's copy is beside the store",
    "reshape.table": "a table of the copy is as it is to be",
    "reshape.rewritten": "all of them are, the copy is at the old commit",
    "reshape.committed": "the copy is whole; the store is the old one",
    "reshape.done": "the old one is gone",
    "recover.opened": "the store is open, nothing is read",
    "recover.weights": "dense weights and optimizer are restored, no row is",
    "recover.rows": "rows are restored, positions are not",
    "recover.done": "the trainer is as of the last commit",
    "recover.resend": "a version of the outbox is about to be sent again",
    "rollback.fetched": "the kept checkpoint is beside the store",
    "rollback.committed": "it says what is set aside; the store is the old one",
    "replace.aside": "the old directory is moved aside, the new one is not in its place",
    "replace.placed": "the new one is in its place, the old one is still aside",
    "rollback.done": "the old one is gone",
}

_armed: tuple[str, int, float] | None = None  # (point, how many times it is still passed, seconds)


def fault(point: str) -> None:
    """The process ends here (SIGKILL), or waits, if it was armed so."""
    if _armed is not None:
        _pass(point)


def arm(point: str | None, times: int = 1, seconds: float = 0.0) -> None:
    """From now on the process ends when it comes to `point` for the n-th time; None: nowhere. Raises ValueError.

    With `seconds` it waits so long instead, then and each time after it: a slow disk.
    """
    global _armed
    if point is not None and (point not in POINTS or times < 1):
        raise ValueError(f"{point}:{times} is no fault point; there are {', '.join(POINTS)}")
    _armed = None if point is None else (point, times, seconds)


def arm_from(text: str) -> None:
    """As `arm`, of "POINT", "POINT:TIMES" or "POINT:TIMES:SECONDS"; "": nowhere. Raises ValueError."""
    point, _, rest = text.partition(":")
    times, _, seconds = rest.partition(":")
    arm(point or None, int(times or 1), float(seconds or 0))


def _pass(point: str) -> None:
    global _armed
    assert point in POINTS, point
    assert _armed is not None
    wanted, left, seconds = _armed
    if point != wanted:
        return
    if left > 1:
        _armed = (wanted, left - 1, seconds)
    elif seconds:
        time.sleep(seconds)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


arm_from(os.environ.get(VARIABLE, ""))
