"""What the three workers are started with. Free of torch and Faust: a command reads its settings at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from embedding_store.signing import Signer, SigningSettings
from online_model.serving.settings import HttpSettings, ReplicaSettings
from online_model.settings import TrainerSettings
from streams.joiner import JoinSettings
from streams.kafka_clients import Connection, KafkaSettings
from streams.logs import Style
from streams.topics import TopicSettings

LARGEST_BATCHES = 4  # times `batch_size`: rows that a train worker learns at once at most, where many wait
Sync = Annotated[
    bool, Meta(description="commits wait for the disk; without it a power cut may undo the last ones (not a kill -9)")
]
Begin = Annotated[
    str, Meta(description='what `headrace backfill` made, a path or a URL: begin with it where behind it; "": without')
]


class JoinWorkerSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What `run_join` needs; the section [join]. `data_dir` is a machine's own: its workers share it. `snapshots` is
    shared by all machines."""

    bootstrap: str
    data_dir: Path
    kafka: KafkaSettings = KafkaSettings()
    signing: SigningSettings = SigningSettings()
    logs: Style = "text"
    topics: TopicSettings = TopicSettings()
    join: JoinSettings = JoinSettings()
    http: HttpSettings = HttpSettings()
    ticks: Annotated[
        Literal["live", "log"], Meta(description="live: idle partitions get the wall clock; log: time is in the log")
    ] = "live"
    snapshots: Annotated[
        str, Meta(description='folder that all machines reach, a path or a URL that fsspec knows; "": none')
    ] = ""
    snapshot_interval_s: Annotated[float, Meta(gt=0, description="what moves goes on from the newest one")] = 900.0
    snapshots_kept: Annotated[int, Meta(ge=1, description="of each partition")] = 2
    backlog: Annotated[
        Literal["oldest", "newest"],
        Meta(description="after an outage: oldest joins all; newest sets aside what is older than newest_after_s"),
    ] = "oldest"
    newest_after_s: Annotated[float, Meta(gt=0, description="by the time Kafka stamped on the records")] = 600.0
    sync: Sync = False
    in_memory: Annotated[
        int, Meta(ge=1, description="of a partition: open examples, event ids, users, windows; the rest on disk")
    ] = 50_000
    purge_s: Annotated[
        float, Meta(gt=0, description="so long after a user was forgotten the files are rewritten without them")
    ] = 600.0
    backfill: Begin = ""
    metrics_port: Annotated[int, Meta(ge=0, le=65_535, description="/metrics; 0: none")] = 0

    @property
    def connection(self) -> Connection:
        """Where Kafka is, and how it is reached."""
        return Connection(self.bootstrap, self.kafka)


class TrainWorkerSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What `run_train` needs; the section [train]."""

    bootstrap: str
    data_dir: Path
    kafka: KafkaSettings = KafkaSettings()
    signing: SigningSettings = SigningSettings()
    logs: Style = "text"
    topics: TopicSettings = TopicSettings()
    model: TrainerSettings = TrainerSettings()
    http: HttpSettings = HttpSettings()
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: a GPU, if there is one")] = "auto"
    threads: Annotated[int, Meta(ge=1, le=256, description="of torch; the last bits of the results depend on it")] = 1
    ranks: Annotated[
        int, Meta(ge=1, le=64, description="processes that share tables and work (a GPU each); may be changed later")
    ] = 1
    deterministic: Annotated[
        bool, Meta(description="batches depend on the log alone: whole ones, below the smallest watermark; one thread")
    ] = False
    dense_interval_s: Annotated[
        float, Meta(ge=0, description="dense weights go to replicas once in so long; rows with every version")
    ] = 1.0
    snapshot_interval_s: Annotated[float, Meta(gt=0, description="replicas start from the newest snapshot")] = 900.0
    snapshots_kept: Annotated[int, Meta(ge=1)] = 3
    checkpoints: Annotated[
        str, Meta(description='folder of kept checkpoints, a path or a URL that fsspec knows; "": in data_dir')
    ] = ""
    checkpoint_interval_s: Annotated[float, Meta(gt=0, description="what a rollback can go back to")] = 3600.0
    checkpoints_kept: Annotated[int, Meta(ge=1)] = 3
    backfill: Begin = ""
    sync: Sync = False
    metrics_port: Annotated[int, Meta(ge=0, le=65_535, description="/metrics; 0: none")] = 0

    @property
    def connection(self) -> Connection:
        """Where Kafka is, and how it is reached."""
        return Connection(self.bootstrap, self.kafka)

    @property
    def signer(self) -> Signer | None:
        """Of versions, snapshots and kept checkpoints. Raises UsageError where the keys cannot be read."""
        return self.signing.signer(self.topics.parameters)

    @property
    def store(self) -> Path:
        """Where the trainer's store is."""
        return self.data_dir / "train"

    @property
    def checkpoints_url(self) -> str:
        """The folder of this trainer's kept checkpoints."""
        shared = self.checkpoints.rstrip("/")
        return f"{shared}/{self.topics.prefix}train" if shared else str(self.data_dir / "checkpoints")


class ServeWorkerSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What `run_serve` needs; the section [serve]."""

    bootstrap: str
    data_dir: Path
    logs: Style = "text"
    kafka: KafkaSettings = KafkaSettings()
    signing: SigningSettings = SigningSettings()
    topics: TopicSettings = TopicSettings()
    serve: ReplicaSettings = ReplicaSettings()
    http: HttpSettings = HttpSettings()
    port: Annotated[int, Meta(ge=0, le=65_535, description="HTTP port; 0: any free one")] = 8080
    admin_port: Annotated[
        int, Meta(ge=0, le=65_535, description="/metrics and /docs are here and not on `port`; 0: they are there")
    ] = 0
    access_log: Annotated[bool, Meta(description="a log line for each request")] = False
    live_actions: Annotated[
        int, Meta(ge=0, description="actions of users kept in memory until their rows hold them; 0: none")
    ] = 100_000
    shadow_topic: Annotated[
        str, Meta(description='versions of a second model, which scores what is shown, unseen; "": none')
    ] = ""
    shadow_snapshots: Annotated[str, Meta(description='folder of its snapshots; "": shadow in data_dir')] = ""
    shadow_share: Annotated[float, Meta(ge=0, le=1, description="of the requests")] = 1.0
    disorder_ms: Annotated[int, Meta(ge=0, description="as in [join]: set it there only")] = 250
    future_ms: Annotated[int, Meta(ge=0, description="as in [join]: set it there only")] = 60_000

    @property
    def connection(self) -> Connection:
        """Where Kafka is, and how it is reached."""
        return Connection(self.bootstrap, self.kafka)
