"""headrace record and headrace replay recording: one recorder a directory, and replays of the very records in one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import msgspec
import xxhash

from deploy.processes import alone, write_atomically
from deploy.replaying import begin
from deploy.settings import Settings
from embedding_store.errors import HeadraceError, UsageError
from replay.merging import Merge
from replay.recording import EVENTS, Recording

if TYPE_CHECKING:
    from embedding_store.kept import KeptCheckpoints
    from replay.direct import Replayed
    from replay.time_travel import Start

START = "start.json"


@dataclass(frozen=True)
class Journey:
    """What is replayed of a recording. `from_checkpoint`: a kept one, (epoch, sequence). `go_on`: with the live topics
    where it ends, until it is stopped or (`to_end`) up to where they end by then. `until_ms`: by the broker's stamps.
    """

    deterministic: bool = False
    resume: bool = False
    from_checkpoint: tuple[int, int] | None = None
    go_on: bool = False
    to_end: bool = False
    until_ms: int | None = None


@contextlib.contextmanager
def recording_alone(data_dir: Path, out: str) -> Iterator[None]:
    """One recorder a directory. Of a remote one that holds for this data directory only. Raises UsageError."""
    remote = data_dir / f"record-{xxhash.xxh3_64_hexdigest(out.encode())}.lock"
    lock = remote if "://" in out else Path(out) / ".lock"
    held = filelock.FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"another recorder writes to {out}: stop it, or record into another directory") from None
    except OSError as error:
        raise HeadraceError(f"{lock.parent} cannot be used: {error.strerror}; choose another --out") from None
    try:
        yield
    finally:
        held.release()


def replay_recording(
    settings: Settings,
    recording: Recording,
    journey: Journey,
    stop: Callable[[], bool],
    progress: Callable[[Replayed], None],
) -> dict[str, Any]:
    """The figures of a replay of a recording's very records in this process, into DATA_DIR/replay. The live store is
    not touched: a kept checkpoint is copied there.

    Raises UsageError where there is nothing to resume, or the recording does not reach the checkpoint; BrokerError
    where the live topics cannot be read on, LogError, StoreError.
    """
    from embedding_store.kept import KeptCheckpoints
    from replay.direct import DirectSettings
    from replay.live_topics import LiveTopics
    from replay.time_travel import RecordedReplay

    home, live = settings.data_dir / "replay", None
    if journey.go_on:
        live = partial(LiveTopics, settings.connection)
        live(recording.next_places()).close()  # whether Kafka still has them is said at once, and not after hours
    with alone(settings.data_dir / "replay.lock", "replay", "wait for it"):
        direct = DirectSettings(
            home / "train", settings.join.join, settings.model, recording.partitions, settings.train.threads,
            journey.deterministic,
        )  # fmt: skip
        about = {
            "log": ["recording", recording.about.topics[EVENTS].name, recording.begin(EVENTS)],
            "determinism": journey.deterministic,
            "checkpoint": journey.from_checkpoint,
            "settings": (direct.join, direct.model, direct.partitions),
        }
        kept = KeptCheckpoints(settings.train.checkpoints_url, settings.train.signer)
        if journey.from_checkpoint is not None and not journey.resume:
            kept.find(journey.from_checkpoint)  # before the last replay goes
        begin(home, journey.resume, msgspec.to_builtins(about))
        start = _start(kept, home, journey)
        merge = Merge(recording, live, journey.to_end, journey.until_ms, stop)
        result = RecordedReplay(direct, recording.begin(EVENTS), progress, start).run(merge)
    ranges = [gap for topic in recording.about.topics for gap in recording.gaps(topic)]
    return result | {"stopped": merge.stopped, "live_records": merge.live_records, "gaps": len(ranges)}


def _start(kept: KeptCheckpoints, home: Path, journey: Journey) -> dict[int, Start]:
    """Where the kept checkpoint is that the replay goes on from. It is put into the replay's store; START is written
    last, so that only a whole one is resumed."""
    from embedding_store.checkpoint import CheckpointStore
    from online_model.checkpoints import positions_of
    from replay.time_travel import Start

    if journey.from_checkpoint is None:
        return {}
    if journey.resume:
        try:
            return msgspec.json.decode((home / START).read_bytes(), type=dict[int, Start])
        except FileNotFoundError:
            raise UsageError(f"the replay in {home} was killed before it began: leave --resume out") from None
    kept.fetch(kept.find(journey.from_checkpoint), home / "train")
    with CheckpointStore(home / "train", None, read_only=True) as store:
        positions = positions_of(store)
    start = {
        p: Start(at.next, at.taken, *at.accounted, tuple((low, high) for low, high in at.set_aside))
        for p, at in positions.items()
    }
    write_atomically(home / START, msgspec.json.encode(start).decode())
    return start
