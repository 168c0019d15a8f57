"""One step of the model: look rows up, score, and learn from what was scored, in a single forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from embedding_store.tables import EmbeddingTables
from online_model.features import CATEGORY, ITEM, USER, item_features, mix, user_features
from online_model.feedback import Strategy, probabilities
from online_model.losses import loss_sum
from online_model.ranker import CLICK, PURCHASE, Ranker


@dataclass
class Batch:
    """N candidates of B contexts, with what each head learns from them."""

    now_ms: int  # event time, never less than in a batch before
    user: np.ndarray  # int64 [B] ids
    sighting: np.ndarray  # int64 [B] the example that the user was seen in
    history: np.ndarray  # uint8 [B, HISTORY_BYTES] states
    moment: np.ndarray  # int64 [B] ms UTC
    item: np.ndarray  # int64 [N] ids
    example: np.ndarray  # int64 [N] the example that the item was seen in, 0: it was drawn as a negative
    ctx: np.ndarray  # int64 [N] the candidate's context
    ts: np.ndarray  # int64 [N] ms UTC
    scenario: np.ndarray  # int64 [N]
    position: np.ndarray  # int64 [N], -1 unknown
    target: np.ndarray  # float32 [N, 3 + E], nan where nothing is learned
    weight: np.ndarray  # float32 [N] of all of the row's losses
    offset: np.ndarray  # float32 [N] added to the click's logit for learning alone


@dataclass
class Outcome:
    """What a step gave."""

    p: np.ndarray  # float32 [N, 3 + E] probabilities of click, watch, purchase, …, from before the step
    rows: np.ndarray  # int64 [N] rows of the candidates' items, 0 where the table is full
    learned: bool  # False: loss or gradients were not finite, and nothing of the model was changed


class Learner:
    """The ranker over the tables, and its optimizer (Adam; the tables have their own, fused in their backward)."""

    def __init__(
        self, tables: EmbeddingTables, ranker: Ranker, feedback: Strategy, learning_rate: float, wide_rate: float
    ) -> None:
        self.tables, self.ranker, self._feedback = tables, ranker, feedback
        self._device = ranker.bias.device
        wide = ranker.wide_parameters()
        ids = {id(p) for p in wide}
        deep = [p for p in ranker.parameters() if id(p) not in ids]
        groups = [{"params": deep, "lr": learning_rate}, {"params": wide, "lr": wide_rate}]
        self._adam = torch.optim.Adam(groups, fused=True)

    def learn(self, batch: Batch) -> Outcome:
        """Scores the batch, then learns it. Item statistics are read, not changed. Admits users, items, categories."""
        leaves, outputs, logits, rows = self._forward(batch)
        p = probabilities(logits.detach(), self._feedback)
        loss = self._loss(logits, batch, p)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        grads = [leaf.grad for leaf in leaves]
        # Two backward passes, so that nothing is updated before every gradient is known to be finite.
        learned = bool(torch.isfinite(loss)) and all(
            bool(torch.isfinite(g).all()) for g in (*grads, *(w.grad for w in self._weights())) if g is not None
        )
        if learned:
            torch.autograd.backward(outputs, grads)
            for w in self._weights():
                if w.grad is not None:
                    w.grad /= len(batch.item)  # tables learn from sums, the ranker from means
            self._adam.step()
        return Outcome(p.cpu().numpy(), rows, learned)

    def _loss(self, logits: torch.Tensor, batch: Batch, p: torch.Tensor) -> torch.Tensor:
        target, weight = self._tensor(batch.target), self._tensor(batch.weight).unsqueeze(1).repeat(1, p.shape[1])
        weight[:, PURCHASE:] *= self._feedback.weights(target[:, PURCHASE:], p[:, PURCHASE:])
        offset = torch.nn.functional.pad(self._tensor(batch.offset).unsqueeze(1), (CLICK, p.shape[1] - 1 - CLICK))
        return loss_sum(logits + offset, target, weight)

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by name, float32, as copies."""
        out = {}
        for name, p in self.ranker.named_parameters():
            for key, value in self._adam.state.get(p, {}).items():
                out[f"{name}.{key}"] = value.detach().cpu().numpy().copy()
        return out

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave."""
        for name, p in self.ranker.named_parameters():
            own = {k.rsplit(".", 1)[1]: v for k, v in state.items() if k.rsplit(".", 1)[0] == name}
            if own:
                self._adam.state[p] = {k: torch.from_numpy(v.copy()).to(self._device) for k, v in own.items()}

    def _forward(self, batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, np.ndarray]:
        """(leaves, the tables' outputs they stand for, logits, the candidates' item rows)."""
        tables = self.tables
        tables.begin_step(batch.now_ms)
        user_rows = tables.rows(USER, batch.user, admit=True, examples=batch.sighting)
        rows = tables.rows(ITEM, batch.item, admit=True, examples=batch.example)
        self._first_seen(rows, batch.ts)
        past = user_features(batch.history, batch.moment)
        there = past.items != 0
        # Distinct ids in their order, not rows in theirs: sums of floats must not depend on where a restart puts rows.
        items, inverse = np.unique(np.concatenate((batch.item, past.items[there])), return_inverse=True)
        item_rows = tables.rows(ITEM, items, admit=False)
        categories, category_of = np.unique(tables.column(ITEM, "category")[item_rows], return_inverse=True)
        category_rows = tables.rows(CATEGORY, categories, admit=True)
        dense = self._tensor(stored_features(tables, rows, batch.ts))

        embedded = tables.embed(
            {USER: (user_rows, None), ITEM: (item_rows, None), CATEGORY: (category_rows, None)}
        )
        outputs = [embedded[USER], embedded[ITEM], embedded[CATEGORY]]
        leaves = [e.detach().requires_grad_() for e in outputs]
        user, item, category = leaves
        category = category.index_select(0, self._tensor(category_of))  # [items, D]
        at, history_at = self._tensor(inverse[: len(rows)]), self._tensor(inverse[len(rows) :])
        lengths = there.sum(1)
        starts = self._tensor(np.cumsum(lengths) - lengths)
        weights = self.ranker.history_weights(self._tensor(past.kinds), self._tensor(past.recency))
        weights = weights.view(-1).index_select(0, self._tensor(np.flatnonzero(there)))
        mean = torch.nn.functional.embedding_bag(
            history_at, item + category, starts, mode="sum", per_sample_weights=weights
        )
        logits = self.ranker(
            user, mean, self._tensor(past.context), item.index_select(0, at), category.index_select(0, at), dense,
            self._tensor(batch.scenario), self._tensor(batch.position), self._tensor(batch.ctx),
        )  # fmt: skip
        return leaves, outputs, logits, rows

    def _first_seen(self, rows: np.ndarray, ts: np.ndarray) -> None:
        """The creation time of items that the catalogue gave none: their first example's."""
        created = self.tables.column(ITEM, "created")
        new = (rows > 0) & (created[rows] == 0)
        if new.any():
            created[rows[new]] = np.iinfo(np.int64).max
            np.minimum.at(created, rows[new], np.maximum(ts[new], 1))

    def _weights(self) -> list[torch.nn.Parameter]:
        return list(self.ranker.parameters())

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def stored_features(tables: EmbeddingTables, rows: np.ndarray, ts: np.ndarray | int) -> np.ndarray:
    """`item_features` of item rows int64 [n] as they are in the table now."""
    impressions, clicks, interactions, created = (
        tables.column(ITEM, name)[rows] for name in ("impressions", "clicks", "interactions", "created")
    )
    return item_features(impressions, clicks, interactions, created, ts)


def unique_contexts(user: np.ndarray, history: np.ndarray, ts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index int64 [B] of one row for each distinct (user, history, ts), which of them each row is int64 [n]).

    user, ts: int64 [n]; history: uint8 [n, HISTORY_BYTES]. The rows of one impression share theirs, whatever they say.
    """
    words = np.concatenate((user[:, None], ts[:, None], np.ascontiguousarray(history).view(np.int64)), axis=1)
    with np.errstate(over="ignore"):
        factors = mix(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
        key = mix(words[:, 0] ^ words[:, 1]) + words.view(np.uint64) @ factors
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    if np.array_equal(words, words[first[inverse]]):
        return first, inverse
    return np.arange(len(user)), np.arange(len(user))  # two contexts share a hash: none is shared
