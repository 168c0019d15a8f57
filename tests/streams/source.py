"""A trainer for the tests of replicas: its versions go into the topic when, and as, the test wants it."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from kafka import KafkaProducer

from embedding_store.signing import Signer
from embedding_store.snapshot import snapshot_of
from online_model.settings import TrainerSettings
from online_model.trainer import Trainer, open_trainer
from streams.published import signed
from streams.topics import TopicSettings
from tests.online_model.logs import make_blocks, make_rows

SMALL = {"features": {"dim": 8, "users": 4_000, "items": 4_000, "categories": 100}}
SETTINGS = msgspec.convert(SMALL, TrainerSettings)


class Source:
    """A trainer that makes versions, and the means to send them, or something else. Both are signed by `signer`."""

    def __init__(
        self, broker: str, topics: TopicSettings, folder: Path, rows: int = 2_000, block: int = 100,
        signer: Signer | None = None,
    ) -> None:  # fmt: skip
        self.signer = signer
        self._path = folder / "train"
        self.trainer: Trainer = self._opened(SETTINGS)
        self._blocks = {block.from_offset: block for block in make_blocks(make_rows(rows), block)}
        self._snapshots = folder / "data" / "snapshots"
        self._topic = topics.parameters
        self._producer = KafkaProducer(bootstrap_servers=broker)

    def version(self) -> list[bytes]:
        """The parts of the next version."""
        position = self.trainer.positions.get(0)
        self.trainer.offer(self._blocks[position.next if position else 0], 0)
        while self.trainer.step():
            pass
        parts = self.trainer.commit()
        assert parts is not None
        return parts

    def send(self, *parts: bytes | None) -> None:
        self.send_signed(self.signer, *parts)

    def send_signed(self, signer: Signer | None, *parts: bytes | None) -> None:
        """As somebody with that key, or with none."""
        for part in parts:
            headers = signed(part or b"", self._topic, signer).headers
            key = b"a record must have one of both"
            self._producer.send(self._topic, part, key=key, headers=list(headers), partition=0)
        self._producer.flush()

    def snapshot(self) -> None:
        snapshot_of(self.trainer.store, self._snapshots, signer=self.signer)

    def go_back(self, copy: Path) -> None:
        """The trainer's store is an older copy of itself, as after a power cut."""
        published = self.trainer.epoch, self.trainer.sequence
        self.trainer.store.close()
        self._path = copy
        self.trainer = self._opened(self.trainer.settings)
        assert self.trainer.supersede(*published)

    def change(self, settings: TrainerSettings) -> None:
        """The trainer begins anew with other settings."""
        self.trainer.store.close()
        self.trainer = self._opened(settings)

    def _opened(self, settings: TrainerSettings) -> Trainer:
        return open_trainer(settings, self._path, lambda: time.time_ns() // 1_000_000)

    def close(self) -> None:
        self._producer.close()
        self.trainer.store.close()
