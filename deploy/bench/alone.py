"""Joiner and training step, each alone on a log that is in memory, and what both reach together on so many cores.

For processes of their own, on one core: `time` of all is (by the clock, of the processor), seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from deploy.bench.common import BenchError
from online_model.catalogue import CatalogueItem
from online_model.examples import Block
from online_model.settings import TrainerSettings
from streams.app import settle
from streams.join_lane import MAX_SLICE
from streams.joiner import Joiner, JoinSettings, Record
from streams.settings import LARGEST_BATCHES

WARM_UP = 20  # batches


class Stopwatch:
    """What was done inside of `running`: seconds by the clock, seconds of the processor."""

    def __init__(self) -> None:
        self.seconds = np.zeros(2)

    @contextmanager
    def running(self) -> Iterator[None]:
        began = _clocks()
        yield
        self.seconds += _clocks() - began


def join_alone(settings: JoinSettings, lanes: Sequence[Sequence[bytes]]) -> tuple[list[Block], list[float]]:
    """(blocks, seconds) of `Joiner.process` on the records of each partition, in slices as the worker's: no store, no
    blocks encoded."""
    settle()
    joiners = [Joiner(settings, partition) for partition in range(len(lanes))]
    blocks, watch = [], Stopwatch()
    for start in range(0, max(map(len, lanes)), MAX_SLICE):
        for joiner, lane in zip(joiners, lanes, strict=True):
            if values := lane[start : start + MAX_SLICE]:
                records = [Record(start + n, None, value) for n, value in enumerate(values)]
                with watch.running():
                    blocks.append(joiner.process(records).block)
    return blocks, list(watch.seconds)


def train_alone(
    model: TrainerSettings, blocks: Sequence[Block], items: Sequence[CatalogueItem], warm_up: int = WARM_UP
) -> tuple[int, list[float]]:
    """(rows learned, seconds for all of them) of `Trainer.step` on these blocks, batches as the worker's where it is
    behind: no store, no commits. Timed is what comes after `warm_up` batches: what is compiled and laid out then.

    Raises BenchError where that is nothing.
    """
    from online_model.trainer import open_trainer

    trainer = open_trainer(model, None, lambda: 0)
    trainer.catalogue(items)
    most, learned, counted, watch = largest_batch(model), 0, 0, Stopwatch()
    for number, block in enumerate(blocks):
        trainer.offer(block, number)
        while trainer.pending >= most or (number + 1 == len(blocks) and trainer.pending):
            warm = learned >= warm_up * most
            with (watch if warm else Stopwatch()).running():
                done = trainer.step(rows=most)
            counted += done if warm else 0
            learned += done
            if not done:
                break
    if not counted:
        raise BenchError(f"{learned:,} rows are no more than the warm-up: take a longer log")
    return learned, list(watch.seconds * learned / counted)


def largest_batch(model: TrainerSettings) -> int:
    """Rows of a step of a worker that is behind."""
    return LARGEST_BATCHES * model.batch_size


def together(cores: int, join_s: float, train_s: float) -> float:
    """Events/s of two that take so many seconds an event, where each can use one core and both share `cores`."""
    return min(cores / (join_s + train_s), 1 / join_s, 1 / train_s)


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])
