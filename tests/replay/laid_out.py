"""What the tests of the backfill share: a small simulated log, laid out as a recording, and backfills of it."""

from __future__ import annotations

from pathlib import Path

from replay.backfill import Engine, Task, backfill, join_locally, ranges_of
from replay.layout import lay_out
from replay.readers import in_time_order, open_log
from replay.recording import Recording
from replay.simulator import SimulatorSettings, simulate_to
from replay.sinks import JsonlSink
from streams.backfill import Manifest, Origin
from streams.join_snapshots import settings_hash
from streams.joiner import JoinSettings

JOIN = JoinSettings(wait_ms=3_000, watch_wait_ms=2_000, open_ms=60_000)
PARTITIONS = 3
NOW_MS = 1_800_000_000_000


def simulated(path: Path, seconds: float = 120.0) -> Path:
    """A log with impressions and a catalogue."""
    with JsonlSink(path) as sink:
        simulate_to(sink, SimulatorSettings(users=300, requests_per_s=5), seconds=seconds)
    return path


def recorded(log: Path, path: Path, partitions: int = PARTITIONS) -> Recording:
    lay_out(in_time_order(open_log("events", log)), str(path), partitions, JOIN, NOW_MS)
    return Recording(path)


def task_of(recording: Recording, out: Path | str, join: JoinSettings = JOIN) -> Task:
    origin = Origin("events", [recording.path], settings_hash(join), join)
    return Task(str(out), origin, ranges_of(recording, before_the_topic=True))


def backfilled(recording: Recording, out: Path | str, engine: Engine = join_locally) -> Manifest:
    return backfill(task_of(recording, out), recording, engine)


def contents(out: Path) -> dict[str, bytes]:
    """All files of a backfill by name, but the joiners' states: RocksDB lays them out anew each time."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] != "join"
    }
