"""What a run came to, once all of its workers have ended: held to the log by code that shares nothing with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deploy.settings import Settings
from embedding_store.columns import TableRows, concat
from online_model.trainer import Trainer, open_trainer
from replay.oracle import Rules, Verdict, compare, expect, read_topic
from streams.blocks import decode_block
from streams.kafka_clients import client_arguments


@dataclass(frozen=True)
class Outcome:
    """`digest`: of the checkpoint, after the `rest` was learned here, rows that make no whole batch."""

    digest: str
    verdict: Verdict
    rows: dict[str, TableRows]  # by table: of the last version that the train worker committed
    rest: int
    batch_size: int
    left_out: int  # rows of batches from which nothing was learned

    @property
    def lost(self) -> int:
        """Rows that nobody has learned; and the rest, where the worker should have learned of it."""
        return self.verdict.lost + (self.rest if self.rest >= self.batch_size else 0)


def outcome(settings: Settings) -> Outcome:
    """Opens the trainer's store, learns what is left of `examples`, and recounts `events`.

    A deterministic trainer waits for whole batches, so what is left hangs on when its worker was told to stop.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    path, partitions = settings.data_dir / "train", settings.topics.partitions
    trainer = open_trainer(settings.model, path, lambda: 0, partitions)
    try:
        rows = {name: concat(list(trainer.store.iter_rows(name))) for name in trainer.tables.specs}
        rest = _learn_the_rest(trainer, settings)
        trained = {p: at.accounted for p, at in trainer.positions.items()}
        digest = trainer.digest()
        left_out = trainer.left_out
        aside = {p: at.set_aside for p, at in trainer.positions.items()}
    finally:
        trainer.store.close()
    records = read_topic(client_arguments(settings.connection), settings.topics.events)
    verdict = compare(expect(records, Rules.of(settings.join.join), aside), trained)
    return Outcome(digest, verdict, rows, rest, settings.model.batch_size, left_out)


def _learn_the_rest(trainer: Trainer, settings: Settings) -> int:
    """How many rows that were."""
    rest = 0
    for partition, offset, value, _ in read_topic(client_arguments(settings.connection), settings.topics.examples):
        position = trainer.positions.get(partition)
        if position is None or offset >= position.source_offset:
            block = decode_block(value or b"")
            if trainer.short_of(len(block.users)):
                trainer.commit()
            trainer.offer(block, offset)
    while rows := trainer.step(drain=True):
        rest += rows
        if trainer.commit_due():
            trainer.commit()
    trainer.commit()
    trainer.store.acknowledge(trainer.sequence)
    return rest
