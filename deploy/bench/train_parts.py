"""The parts of `headrace bench train`, each for a process of its own (see train.py): python -m … PART JSON.

All start from the same dense weights and from rows of zeros, and learn the same.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from deploy.bench.bare_torchrec import BareTables
from deploy.bench.common import finish
from deploy.bench.train import PARTS, STAGES
from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, WEIGHTS
from embedding_store.delta import Version, encode
from embedding_store.ids import GOLDEN
from embedding_store.specs import TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from streams.train_worker import COMMIT_SECONDS, COMMIT_SHARE

SINGLE, HISTORIES, LENGTH, DIM, BATCH = 6, 2, 20, 32, 1024
FEATURES = [f"single{n}" for n in range(SINGLE)] + [f"history{n}" for n in range(HISTORIES)]
HIDDEN = (256, 256, 128)
RATE, EPS, ADAM_RATE = 0.05, 1e-8, 1e-3
BATCHES = 128  # made ahead; then again from the first
WARM_UP = 20  # steps


@dataclass
class Batch:
    numbers: list[np.ndarray]  # of each feature: int64 [BATCH] or [BATCH · LENGTH], 0 … ids − 1
    labels: torch.Tensor  # float32 [BATCH]


def batches(ids: int, count: int = BATCHES) -> list[Batch]:
    """The stream, the same for all parts."""
    rng = np.random.default_rng(1)
    sizes = [BATCH] * SINGLE + [BATCH * LENGTH] * HISTORIES
    return [
        Batch([rng.integers(0, ids, n) for n in sizes], torch.from_numpy(rng.random(BATCH) < 0.2).float())
        for _ in range(count)
    ]


class _Dense(nn.Module):
    """Pooled embeddings float32 [BATCH, 8 · DIM] → the mean loss; and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (len(FEATURES) * DIM, *HIDDEN)
        layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
        self.layers = nn.Sequential(*itertools.chain(*layers), nn.Linear(HIDDEN[-1], 1))
        self.adam = torch.optim.Adam(self.parameters(), lr=ADAM_RATE, fused=True)

    def forward(self, pooled: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(self.layers(pooled).squeeze(1), labels)

    def step(self) -> None:
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def _pooled(embedded: list[torch.Tensor]) -> torch.Tensor:
    """Embeddings of each feature → float32 [BATCH, 8 · DIM]."""
    return torch.cat([*embedded[:SINGLE], *(e.view(BATCH, LENGTH, DIM).mean(1) for e in embedded[SINGLE:])], 1)


class BareTorchrec:
    """TorchRec and fbgemm as they come."""

    def __init__(self, ids: int) -> None:
        self._tables = BareTables({feature: [feature] for feature in FEATURES}, ids, DIM, RATE, EPS)
        self.dense = _Dense()
        self._lengths = torch.tensor([1] * BATCH * SINGLE + [LENGTH] * BATCH * HISTORIES, dtype=torch.int32)

    def ready(self, batch: Batch) -> tuple[KeyedJaggedTensor, torch.Tensor]:
        values = torch.from_numpy(np.concatenate(batch.numbers))
        return KeyedJaggedTensor(FEATURES, values, lengths=self._lengths), batch.labels

    def learn(self, batch: tuple[KeyedJaggedTensor, torch.Tensor]) -> None:
        answers = self._tables(batch[0])
        self.dense(_pooled([answers[f].values() for f in FEATURES]), batch[1]).backward()
        self.dense.step()

    def row(self, feature: str, number: int) -> np.ndarray:
        """The weights float32 [DIM] of an id."""
        return self._tables.weights[feature][number].detach().numpy()


class PureTorch:
    """By hand: all tables in one tensor, row-wise Adagrad on one sort of a step's rows."""

    def __init__(self, ids: int) -> None:
        self._ids, rows = ids, len(FEATURES) * ids
        self._weights, self._state, self.dense = torch.zeros(rows, DIM), torch.zeros(rows), _Dense()
        one, bags = SINGLE * BATCH, HISTORIES * BATCH
        self._one, self._starts = one, torch.arange(0, bags * LENGTH, LENGTH)
        self._bag = torch.cat([torch.arange(one), one + torch.arange(bags).repeat_interleave(LENGTH)])

    def ready(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [own + number * self._ids for number, own in enumerate(batch.numbers)]
        return torch.from_numpy(np.concatenate(rows)), batch.labels

    def learn(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        rows, labels = batch
        single = self._weights.index_select(0, rows[: self._one])
        pooled = F.embedding_bag(rows[self._one :], self._weights, self._starts, mode="sum").div_(LENGTH)
        found = torch.cat((single, pooled)).requires_grad_()  # [8 · BATCH, DIM], feature by feature
        self.dense(found.view(-1, BATCH, DIM).transpose(0, 1).reshape(BATCH, -1), labels).backward()
        assert found.grad is not None
        found.grad[self._one :] /= LENGTH
        self._update(rows, found.grad)
        self.dense.step()

    def _update(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        n = len(rows)
        key = (rows << 24) | torch.arange(n)
        key.numpy().sort()
        row, at = key >> 24, key & ((1 << 24) - 1)
        new = torch.ones(n, dtype=torch.bool)
        torch.ne(row[1:], row[:-1], out=new[1:])
        start = new.nonzero().squeeze(1)
        distinct = row[start]
        g = F.embedding_bag(self._bag[at], gradients, start, mode="sum")
        moment = self._state.index_select(0, distinct)
        moment.add_(torch.linalg.vector_norm(g, dim=1).square_().div_(DIM))
        self._state.index_copy_(0, distinct, moment)
        g.mul_(moment.sqrt_().add_(EPS).reciprocal_().mul_(-RATE).unsqueeze(1))
        self._weights.index_add_(0, distinct, g)

    def row(self, feature: str, number: int) -> np.ndarray:
        return self._weights[FEATURES.index(feature) * self._ids + number].numpy()


class Headrace:
    """The store's tables, and commits when they are due."""

    def __init__(self, ids: int, folder: Path) -> None:
        settings = TableSettings(dim=DIM, capacity=ids, learning_rate=RATE, eps=EPS)
        specs = [TableSpec(feature, (feature,), settings) for feature in FEATURES]
        self.store = CheckpointStore(folder / "store", {spec.name: spec.layout for spec in specs})
        self.tables, self.dense = EmbeddingTables(specs, store=self.store), _Dense()
        self._due = 0.0
        self.begin()

    def begin(self) -> None:
        """The clock starts."""
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.steps = self.commits = self.committed_rows = 0

    def admit(self, numbers: np.ndarray) -> None:
        """These ids of every feature get their rows."""
        for feature in FEATURES:
            self.tables.rows(feature, raw_ids(feature, numbers), admit=True)

    def ready(self, batch: Batch) -> tuple[list[np.ndarray], torch.Tensor]:
        return [raw_ids(f, own) for f, own in zip(FEATURES, batch.numbers, strict=True)], batch.labels

    def learn(self, batch: tuple[list[np.ndarray], torch.Tensor]) -> bool:
        """One step; whether there was a commit behind it."""
        ids, labels = batch
        tables, ticks = self.tables, [time.perf_counter()]
        tables.begin_step()
        rows = [tables.rows(feature, own, admit=True) for feature, own in zip(FEATURES, ids, strict=True)]
        ticks.append(time.perf_counter())
        embedded = tables.embed({feature: (own, None) for feature, own in zip(FEATURES, rows, strict=True)})
        loss = self.dense(_pooled([embedded[feature] for feature in FEATURES]), labels)
        ticks.append(time.perf_counter())
        loss.backward()
        ticks.append(time.perf_counter())
        self.dense.step()
        ticks.append(time.perf_counter())
        for stage, (start, end) in zip(STAGES, itertools.pairwise(ticks), strict=False):
            self.seconds[stage] += end - start
        self.steps += 1
        if ticks[-1] < self._due:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """As the trainer commits and the worker paces it; the broker has it at once."""
        start = time.perf_counter()
        head, touched = self.store.head(), self.tables.touched()
        sequence = head.sequence + 1 if head else 1
        weights = {name: w.detach().numpy() for name, w in self.dense.named_parameters()}
        sent = {name: rows.without(MOMENTUM) for name, rows in touched.items()}
        version = Version(1, sequence, (1, sequence - 1) if head else None, dense=weights, tables=sent)
        self.store.commit(Commit(
            1, sequence, b"", {**weights, **self._adam()}, touched, parts=encode(version), version=version,
            gone=self.tables.gone(), notes=self.tables.notes(),
        ))  # fmt: skip
        self.tables.clear_touched()
        self.store.acknowledge(sequence)
        seconds = time.perf_counter() - start
        self.seconds["commit"] += seconds
        self.commits += 1
        self.committed_rows += sum(map(len, touched.values()))
        self._due = start + max(COMMIT_SECONDS, seconds / COMMIT_SHARE)

    def tracking(self, ready: list[tuple[list[np.ndarray], torch.Tensor]]) -> float:
        """Seconds that a step takes to mark its rows: when they are looked up, and when they are embedded."""
        pairs = [pair for ids, _ in ready for pair in zip(FEATURES, ids, strict=True)]
        rows = [(feature, self.tables.rows(feature, own, admit=False)) for feature, own in pairs]
        start = time.perf_counter()
        for feature, at in rows:
            self.tables.touch(feature, at)
        return 2 * (time.perf_counter() - start) / len(ready)

    def row(self, feature: str, number: int) -> np.ndarray:
        at = self.tables.rows(feature, raw_ids(feature, np.array([number])), admit=False)
        return self.tables.read_rows(feature, at)[WEIGHTS][0]

    def _adam(self) -> dict[str, np.ndarray]:
        states = {name: self.dense.adam.state[p] for name, p in self.dense.named_parameters()}
        return {f"adam.{name}.{key}": v.numpy() for name, state in states.items() for key, v in state.items()}


def raw_ids(feature: str, numbers: np.ndarray) -> np.ndarray:
    """The ids int64 [n] of a feature that numbers stand for, as spread as hashes are."""
    own = numbers.astype(np.uint64) * np.uint64(len(FEATURES)) + np.uint64(FEATURES.index(feature) + 1)
    return (own * GOLDEN).view(np.int64)


def _ready_made(part: BareTorchrec | PureTorch, ids: int, steps: int) -> dict[str, Any]:
    """Steps on rows that are ready, after a warm-up."""
    every: Any = itertools.cycle([part.ready(batch) for batch in batches(ids)])
    for batch in itertools.islice(every, WARM_UP):
        part.learn(batch)
    clock, cpu = time.perf_counter(), time.process_time()
    for batch in itertools.islice(every, steps):
        part.learn(batch)
    return _speed(steps, time.perf_counter() - clock, time.process_time() - cpu)


def _headrace(ids: int, steps: int, folder: Path) -> dict[str, Any]:
    part = Headrace(ids, folder)
    ready = [part.ready(batch) for batch in batches(ids)]
    every = itertools.cycle(ready)
    part.admit(np.arange(ids))
    for batch in itertools.islice(every, WARM_UP):
        part.learn(batch)
    part.commit()
    part.begin()
    clock, cpu = time.perf_counter(), time.process_time()
    while not part.learn(next(every)) or part.steps < steps:
        pass
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    spent, tracking = dict(part.seconds), part.steps * part.tracking(ready[:WARM_UP])
    for stage in ("id_map", "forward"):  # each marks the rows once
        spent[stage] -= tracking / 2
    spent["tracking"] = tracking
    part.store.close()
    return {
        **_speed(part.steps, seconds, cpu_seconds),
        "share": {stage: spent[stage] / seconds for stage in STAGES},
        "commits": part.commits,
        "rows_a_commit": part.committed_rows / part.commits,
        "rows_a_step": BATCH * (SINGLE + HISTORIES * LENGTH),
    }


def _speed(steps: int, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    return {"per_s": steps * BATCH / seconds, "per_cpu_s": steps * BATCH / cpu_seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts: dict[str, Callable[[int, int, Path], dict[str, Any]]] = dict(zip(PARTS, (
        lambda ids, steps, _: _ready_made(BareTorchrec(ids), ids, steps),
        lambda ids, steps, _: _ready_made(PureTorch(ids), ids, steps),
        _headrace,
    ), strict=True))  # fmt: skip
    given = json.loads(sys.argv[2])
    finish(parts[sys.argv[1]](given["ids"], given["steps"], Path(given["folder"])))
