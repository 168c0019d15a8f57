"""headrace replay: a log through the system, onto Kafka for the workers that run there, or directly in this process."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from kafka import KafkaConsumer, TopicPartition

from deploy.processes import alone, write_atomically
from deploy.recount import figures_of, recounted, told_of_kafka
from deploy.replica_figures import Model, balance
from deploy.settings import Settings
from embedding_store.delta import Assembler
from embedding_store.errors import CorruptRecord, HeadraceError, UsageError
from online_model.examples import ExamplesDigest
from replay.faults import FaultCounts, with_faults
from replay.oracle import read_topic
from replay.player import PlaySettings, in_window
from replay.readers import LogReader, in_time_order
from streams.events import Item
from streams.kafka_clients import client_arguments
from streams.topics import end_offsets

if TYPE_CHECKING:
    from replay.direct import Replayed

STALL_S = 60.0  # nothing more was learned for so long: no worker is there, or it hangs
NOT_LEARNED = dict.fromkeys(
    ("examples", "trained_examples", "left_out", "lost", "duplicated", "balance", "prequential", "examples_digest",
     "checkpoint_digest")
)  # fmt: skip
ABOUT = "replay.json"
OPTIONS = {"determinism": "determinism (--deterministic)"}  # what is said of it, where an option tells it


def replay_directly(
    settings: Settings,
    log: LogReader,
    play: PlaySettings,
    *,
    deterministic: bool,
    resume: bool,
    progress: Callable[[Replayed], None],
) -> dict[str, Any]:
    """The figures of a replay in this process, into DATA_DIR/replay: from its beginning, or with `resume` from the last
    commit of one that was killed.

    Raises UsageError where there is nothing to resume, or it was another log, with other settings.
    """
    from replay.direct import DirectReplay, DirectSettings

    counts = FaultCounts()
    chosen = in_window(in_time_order(log, directory=settings.data_dir), play.from_ms, play.until_ms)
    records = iter(with_faults(chosen, play.faults, counts))
    home = settings.data_dir / "replay"
    with alone(settings.data_dir / "replay.lock", "replay", "wait for it"):
        join = settings.join.join
        join = msgspec.structs.replace(join, implicit=join.implicit or not log.has_impressions)
        direct = DirectSettings(
            home / "train", join, settings.model, settings.topics.partitions, settings.train.threads, deterministic,
            play.faults.lag_ms,
        )  # fmt: skip
        about = {
            "log": [log.name, *log.identity()],
            "reading of it": (settings.log.columns, settings.log.max_rejected_share),
            "determinism": deterministic,
            "window or faults": play,
        }
        about["settings"] = (join, settings.model, direct.partitions)
        head = []
        for record in records:  # the catalogue comes first: without an event there is nothing to replay
            head.append(record)
            if not isinstance(record, Item):
                break
        else:
            raise UsageError(f"{log.path}: there is no event between --from and --until")
        begin(home, resume, msgspec.to_builtins(about))
        result = DirectReplay(direct, progress).run(itertools.chain(head, records))
    result["events_rejected"] += log.rejected.total()
    return result | {"faults": vars(counts)}


def begin(home: Path, resume: bool, about: dict[str, Any]) -> None:
    """Keep what is there, if it is what is to be resumed; else begin anew."""
    about = json.loads(json.dumps(about))
    if resume:
        try:
            before = json.loads((home / ABOUT).read_text("utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"there is no replay to resume in {home}: leave --resume out") from None
        differing = [OPTIONS.get(name, name) for name in about if before.get(name) != about[name]]
        if differing:
            raise UsageError(
                f"the replay in {home} was of another {', '.join(differing)}: give the same, or leave --resume out"
            )
        return
    try:
        if home.exists():
            shutil.rmtree(home)
        home.mkdir(parents=True)
        write_atomically(home / ABOUT, json.dumps(about))
    except OSError as error:
        raise HeadraceError(f"{home} cannot be used: {error.strerror}; choose another --data-dir") from None


class Followed:
    """What the workers of a cluster make of what is played from now on. Open it before the play, `wait` after it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._begin = self._ends()
        self._parameters = KafkaConsumer(
            **client_arguments(settings.connection), enable_auto_commit=False, isolation_level="read_committed",
            max_partition_fetch_bytes=16 << 20,
        )  # fmt: skip
        place = TopicPartition(settings.topics.parameters, 0)
        self._parameters.assign([place])
        self._parameters.seek_to_end(place)
        self._parameters.position(place)  # now, not at the first poll

    def wait(self, progress: Callable[[float], None]) -> Model | None:
        """The first version that has learned all that is in `events` now; None: the workers do not get there.

        `progress`: called with the share of the records that is learned.
        """
        ends, model = self._ends(), Model()
        total = sum(ends[p] - self._begin[p] for p in ends)
        assembler, moved, least = Assembler(), time.monotonic(), math.inf
        while time.monotonic() - moved < STALL_S:
            for record in (r for some in self._parameters.poll(timeout_ms=500).values() for r in some):
                try:
                    version = assembler.add(record.value)
                except CorruptRecord:
                    continue  # the replicas refuse it too; the next one says more
                if version is None:
                    continue
                positions = {str(p): at for p, at in version.positions.items()}
                model = Model({"info": version.info, "sequence": version.sequence, "positions": positions})
                left = sum(max(0, end - model.positions.get(p, 0)) for p, end in ends.items())
                progress(1 - left / max(1, total))
                if not left:
                    return model
                if left < least:  # versions come without that too: of ticks, or of another partition alone
                    moved, least = time.monotonic(), left
        return None

    def figures(self, model: Model) -> dict[str, Any]:
        """Counts of the whole topic, recounted by the oracle; the digest of the examples of this play."""
        counts = model.counts()
        return {
            "events_in": counts.events_in,
            "trained_examples": model.trained_rows,
            "left_out": model.left_out,
            **figures_of(recounted(self.settings, model, model.next_offsets)),
            "balance": balance(counts),
            "prequential": model.prequential(),
            "examples_digest": self._digest(),
            "checkpoint_digest": None,  # a live trainer batches as the rows arrive
        }

    def close(self) -> None:
        self._parameters.close()

    def _digest(self) -> str:
        from streams.blocks import decode_block

        digest = ExamplesDigest()
        with told_of_kafka(self.settings):
            examples = read_topic(client_arguments(self.settings.connection), self.settings.topics.examples)
            for partition, _, value, _ in examples:
                block = decode_block(value or b"")
                if block.to_offset > self._begin.get(partition, 0):
                    digest.add(block.examples)
        return digest.hexdigest()

    def _ends(self) -> dict[int, int]:
        return end_offsets(self.settings.connection, self.settings.topics.events)
