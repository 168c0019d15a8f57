"""Headrace's ranker as it would be trained without Headrace: TorchRec's tables as they come, the rest in plain dicts.

The same network (`online_model.ranker`) over the same inputs: rows of user, item and the history's items, the user's
state, counts and heat of items. What a log without a catalogue has none of (category, seller, words) has no table here.
It learns by the same losses, of the heads and of the two towers. Left out are neighbours, the purchase over all
impressions, clipping, measures, the check that a step is sound: so it is somewhat faster than all of the model would
be. Nothing is kept, nothing is tracked.

`tests/deploy/test_bench_end_to_end.py` holds it to `online_model.trainer` without these parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from deploy.bench.bare_torchrec import BareTables
from embedding_store.initial import first_weights
from online_model.batch import Candidates, candidates_of
from online_model.examples import Examples, Part
from online_model.features import (
    CATEGORY,
    HEAT_S,
    ITEM,
    MATCHES,
    SELLER,
    USER,
    heat,
    item_numbers,
    matches,
    table_specs,
    user_features,
)
from online_model.feedback import Uncorrected
from online_model.history import HISTORY
from online_model.learner import adam_of
from online_model.losses import labels, loss_sum, retrieval_loss
from online_model.neighbours import NEIGHBOURS
from online_model.ranker import CLICK, Contexts, Items, Ranker
from online_model.settings import TrainerSettings

PAST = "past"  # the history's items: they have their rows in the table of items
_NOTHING = np.empty((0, 0), np.int64)


@dataclass
class Ready:
    """A batch whose rows are known: N candidates of B contexts."""

    rows: KeyedJaggedTensor
    past: torch.Tensor  # int64 [m] places in [B · HISTORY] of the history's entries
    kinds: torch.Tensor  # int64 [B, HISTORY]
    recency: torch.Tensor  # [B, HISTORY]
    moment: torch.Tensor  # [B, CONTEXT]
    scenario: torch.Tensor  # int64 [B]
    numbers: torch.Tensor  # [N, NUMBERS]
    position: torch.Tensor  # int64 [N]
    ctx: torch.Tensor  # int64 [N]
    target: torch.Tensor  # [N, heads]
    columns: torch.Tensor  # int64 [c] candidates that were shown for the first time: positives are told from these
    positive: torch.Tensor  # int64 [P] which of the c were clicked
    items: torch.Tensor  # int64 [c] ids
    sampled: torch.Tensor  # [c] log of how often each is shown


class PlainRanker:
    """Tables, ranker and their optimizers, and what is counted of items."""

    def __init__(self, model: TrainerSettings) -> None:
        features = model.features
        self._specs = {spec.name: spec.settings for spec in table_specs(features) if spec.name in (USER, ITEM)}
        sizes = {name: own.capacity + 1 for name, own in self._specs.items()}
        rates = {name: own.learning_rate for name, own in self._specs.items()}
        self.tables = BareTables({USER: [USER], ITEM: [ITEM, PAST]}, sizes, features.dim, rates, features.eps)
        self.ranker, self._retrieval = Ranker(features.dim, model.ranker), model.retrieval
        self._batch_rows = model.batch_size
        self._shown = 0
        self._adam = adam_of(self.ranker, model.learning_rate, model.wide_rate)
        self._rows: dict[str, dict[int, int]] = {USER: {0: 0}, ITEM: {0: 0}}
        rows = sizes[ITEM]
        self._counts: dict[str, np.ndarray] = {
            "impressions": np.zeros(rows, np.int64), "clicks": np.zeros(rows, np.int64),
            "interactions": np.zeros(rows, np.int64), "created": np.zeros(rows, np.int64),
            "heat": np.zeros((rows, len(HEAT_S)), np.float32), "heat_ms": np.zeros(rows, np.int64),
        }  # fmt: skip

    def rows(self, table: str, ids: np.ndarray, admit: bool = True) -> np.ndarray:
        """int64 [n] ids → int64 [n] rows; new ones get theirs, or row 0 where they are not admitted."""
        known, listed = self._rows[table], ids.tolist()
        new = [one for one in dict.fromkeys(listed) if one not in known] if admit else []
        if new:
            first = len(known)
            known.update(zip(new, range(first, first + len(new)), strict=True))
            weights = first_weights(self._specs[table], np.array(new))
            self.tables.weights[table].detach()[first : first + len(new)] = torch.from_numpy(weights)
        return np.array([known.get(one, 0) for one in listed], np.int64)

    def ready(self, c: Candidates, target: np.ndarray, shown: np.ndarray) -> Ready:
        """Looks rows up, and makes the inputs that are not in the tables. target: float32 [N, heads], nan: not said;
        shown: bool [N] for the first time."""
        past = user_features(c.history, c.moment)
        there = past.items != 0
        user, item = self.rows(USER, c.user), self.rows(ITEM, c.item)
        entries = self.rows(ITEM, past.items[there], admit=False)
        created = self._counts["created"]
        new = created[item] == 0
        if new.any():
            created[item[new][::-1]] = np.maximum(c.ts[new][::-1], 1)  # of several the first
        of_items = {name: column[item] for name, column in self._counts.items()}
        nothing = np.zeros(len(item), np.int64)

        def column(table: str, name: str) -> np.ndarray:
            return nothing if table in (CATEGORY, SELLER) else of_items[name]

        own = item_numbers(column, c.ts, self.ranker.click_rate())
        none = np.zeros_like(past.items)
        alike = matches(past, (past.items, none, none), (c.item, nothing, nothing), c.ctx)
        keyed = _keyed(user, item, entries)
        numbers = np.concatenate((own, alike), axis=1)
        columns = np.flatnonzero(shown)
        positive = np.flatnonzero(target[columns, CLICK] == 1)
        often = (of_items["impressions"][columns] + 1) / (self._shown + len(item)) * len(columns) / len(item)
        arrays = (
            np.flatnonzero(there), past.kinds, past.recency, past.context, c.scenario, numbers, c.position, c.ctx,
            target, columns, positive, c.item[columns], np.log(often + 1e-12).astype(np.float32),
        )  # fmt: skip
        return Ready(keyed, *map(torch.from_numpy, map(np.ascontiguousarray, arrays)))

    def learn(self, ready: Ready) -> None:
        """One step. Rows learn in the backward pass, as TorchRec does it; from sums, the ranker from a usual batch's
        means."""
        found = self.tables(ready.rows)
        user, item = found[USER].values(), found[ITEM].values()
        dim, contexts = user.shape[1], len(user)
        entries = torch.zeros(contexts * HISTORY, dim).index_copy(0, ready.past, found[PAST].values())
        of_contexts = Contexts(
            user, entries.view(contexts, HISTORY, dim), ready.kinds, ready.recency, torch.zeros_like(user),
            ready.moment, ready.scenario,
        )  # fmt: skip
        near = torch.zeros(len(item), NEIGHBOURS)
        of_items = Items(item, torch.zeros_like(item), ready.numbers, near, ready.position, ready.ctx)
        mean = self.ranker.history_mean(of_contexts)
        self._adam.zero_grad(set_to_none=True)
        loss = loss_sum(self.ranker(of_contexts, of_items, mean), ready.target, torch.ones_like(ready.target))
        if self._retrieval and len(ready.positive):
            loss = loss + self._retrieval * self._told_apart(ready, of_contexts, mean, item)
        loss.backward()
        for weights in self.ranker.parameters():
            if weights.grad is not None:
                weights.grad /= self._batch_rows
        self._adam.step()
        self.ranker.count_rates(ready.target, torch.ones(len(item)))

    def _told_apart(self, ready: Ready, contexts: Contexts, mean: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """The towers' loss: each click told from all that was shown."""
        whose = ready.ctx[ready.columns[ready.positive]]
        towards, _ = self.ranker.towers(contexts, mean)
        numbers = ready.numbers[ready.columns, :-MATCHES]
        logits = towards.index_select(0, whose) @ item.index_select(0, ready.columns).T
        logits = logits + (numbers - numbers.mean(0)) @ self.ranker.tower_numbers
        return retrieval_loss(logits, ready.positive, ready.sampled, ready.items, torch.ones(len(whose)))

    def count(self, c: Candidates, target: np.ndarray, shown: np.ndarray) -> None:
        """What was learned counts from now on. shown: bool [N] for the first time."""
        rows, counts = self.rows(ITEM, c.item, admit=False), self._counts
        self._shown += int(shown.sum())
        np.add.at(counts["impressions"], rows[shown], 1)
        clicked = target[:, CLICK] == 1
        if not clicked.any():
            return
        distinct, times = np.unique(rows[clicked], return_counts=True)
        counts["clicks"][distinct] += times
        now = int(c.moment.max())
        counts["heat"][distinct] = heat(counts["heat"][distinct], counts["heat_ms"][distinct], now) + times[:, None]
        counts["heat_ms"][distinct] = now


def batch_of(rows: Examples) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """What a joiner made → candidates, targets float32 [N, heads], bool [N] whether it is the first row of its
    example."""
    candidates, *_ = candidates_of(rows, np.empty(0, np.int64), _NOTHING)
    return candidates, labels(rows, Uncorrected()), rows.part == Part.SHOWN


def _keyed(user: np.ndarray, item: np.ndarray, past: np.ndarray) -> KeyedJaggedTensor:
    """Of a look-up that answers row by row. TorchRec wants as many bags of each feature as of the others: one each."""
    counts = torch.tensor([len(user), len(item), len(past)], dtype=torch.int32)
    return KeyedJaggedTensor([USER, ITEM, PAST], torch.from_numpy(np.concatenate((user, item, past))), lengths=counts)
