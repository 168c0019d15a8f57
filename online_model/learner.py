"""One step of the model: look rows up, score, and learn from what was scored, in a single forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from embedding_store.tables import EmbeddingTables
from online_model.examples import Examples
from online_model.features import CATEGORY, ITEM, USER, UserFeatures, item_features, mix, user_features
from online_model.feedback import Strategy, probabilities
from online_model.losses import loss_sum
from online_model.ranker import CLICK, PURCHASE, Ranker


@dataclass
class Candidates:
    """N candidates of B contexts. A context is a user in a state, at a moment, in a scenario."""

    user: np.ndarray  # int64 [B] ids
    history: np.ndarray  # uint8 [B, HISTORY_BYTES] states
    moment: np.ndarray  # int64 [B] ms UTC
    scenario: np.ndarray  # int64 [B]
    item: np.ndarray  # int64 [N] ids
    ctx: np.ndarray  # int64 [N] the candidate's context
    position: np.ndarray  # int64 [N] place on the page, -1 unknown

    @property
    def ts(self) -> np.ndarray:
        """The candidates' moments, int64 [N]."""
        return self.moment[self.ctx]


@dataclass
class Batch:
    """Candidates, with what each head learns from them."""

    now_ms: int  # event time, never less than in a batch before
    candidates: Candidates
    sighting: np.ndarray  # int64 [B] the example that the user was seen in
    example: np.ndarray  # int64 [N] the example that the item was seen in, 0: it was drawn as a negative
    target: np.ndarray  # float32 [N, 3 + E], nan where nothing is learned
    weight: np.ndarray  # float32 [N] of all of the row's losses
    offset: np.ndarray  # float32 [N] added to the click's logit for learning alone


@dataclass
class Outcome:
    """What a step gave."""

    p: np.ndarray  # float32 [N, 3 + E] probabilities of click, watch, purchase, …, from before the step
    rows: np.ndarray  # int64 [N] rows of the candidates' items, 0 where the table is full
    loss: float  # the mean of a row
    learned: bool  # False: loss or gradients were not finite, and nothing of the model was changed


@dataclass
class _Share:
    """b contexts and their n candidates: what of them is in the tables. Distinct rows, and who needs which."""

    part: np.ndarray | slice  # which of the batch's candidates
    user: np.ndarray  # int64 [b] rows
    item: np.ndarray  # int64 [m] rows, of candidates and of what is in histories
    category: np.ndarray  # int64 [c] rows
    category_of: np.ndarray  # int64 [m], the place in `category`
    at: np.ndarray  # int64 [n], the candidate's place in `item`
    history_at: np.ndarray  # int64 [h], the places in `item` of all entries of the histories
    past: UserFeatures  # of the b contexts
    ctx: np.ndarray  # int64 [n] the candidate's context

    def of(self, contexts: slice) -> _Share:
        """That of some of the contexts."""
        part = np.flatnonzero((self.ctx >= contexts.start) & (self.ctx < contexts.stop))
        ends = np.append(0, np.cumsum((self.past.items != 0).sum(1)))
        at, history_at = self.at[part], self.history_at[ends[contexts.start] : ends[contexts.stop]]
        items, place = np.unique(np.concatenate((at, history_at)), return_inverse=True)
        categories, category_of = np.unique(self.category_of[items], return_inverse=True)
        past = UserFeatures(*(column[contexts] for column in vars(self.past).values()))
        return _Share(
            part, self.user[contexts], self.item[items], self.category[categories], category_of, place[: len(at)],
            place[len(at) :], past, self.ctx[part] - contexts.start,
        )  # fmt: skip


@dataclass
class _Rows:
    """What of N candidates is in the tables."""

    dense: np.ndarray  # float32 [N, DENSE]
    every: _Share  # all of it


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
        c, tables = batch.candidates, self.tables
        tables.begin_step(batch.now_ms)
        user_rows = tables.rows(USER, c.user, admit=True, examples=batch.sighting)
        rows = tables.rows(ITEM, c.item, admit=True, examples=batch.example)
        self._first_seen(rows, c.ts)
        looked = self._look_up(c, user_rows, rows, admit=True)
        share = self._share(looked)
        leaves, outputs, logits = self._forward(c, looked, share)
        p = probabilities(logits.detach(), self._feedback)
        loss = self._loss(logits, batch, share.part, p)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        grads = [leaf.grad for leaf in leaves]
        # Two backward passes, so that nothing is updated before every gradient is known to be finite.
        finite = (bool(torch.isfinite(g).all()) for g in grads if g is not None)
        learned = self._gathered(bool(torch.isfinite(loss)) and all(finite))
        if learned:
            torch.autograd.backward(outputs, grads)
            for w in self._weights():
                if w.grad is not None:
                    w.grad /= len(c.item)  # tables learn from sums, the ranker from means
            self._adam.step()
        every = self._of_all(p.cpu().numpy(), share.part, len(c.item))
        return Outcome(every, rows, self._mean(loss.detach(), len(c.item)), learned)

    @torch.no_grad()
    def score(self, candidates: Candidates) -> np.ndarray:
        """Probabilities float32 [N, 3 + E] of click, watch, purchase, …: admits nothing, learns nothing."""
        tables = self.tables
        user_rows = tables.rows(USER, candidates.user, admit=False)
        rows = tables.rows(ITEM, candidates.item, admit=False)
        looked = self._look_up(candidates, user_rows, rows, admit=False)
        share = self._share(looked)
        _, _, logits = self._forward(candidates, looked, share)
        p = probabilities(logits, self._feedback).cpu().numpy()
        return self._of_all(p, share.part, len(candidates.item))

    def _mean(self, loss: torch.Tensor, n: int) -> float:
        """The mean loss of a row, where `loss` is the sum of this rank's share."""
        return float(self.tables.ranks.sum(np.array([float(loss)]))[0]) / n

    def _gathered(self, sound: bool) -> bool:
        """Adds up the ranker's gradients over the ranks. Whether all of them are finite, and all ranks are `sound`."""
        if self.tables.ranks.size > 1:
            for w in self._weights():
                if w.grad is None:
                    w.grad = torch.zeros_like(w)
            said = torch.tensor([float(not sound)], device=self._device)
            flat = torch.cat([w.grad.ravel() for w in self._weights() if w.grad is not None] + [said])
            self.tables.ranks.add_up(flat)
            sound = float(flat[-1]) == 0
            parts = flat[:-1].split([w.numel() for w in self._weights()])
            for w, gradient in zip(self._weights(), parts, strict=True):
                w.grad = gradient.view_as(w).clone()
        return sound and all(bool(torch.isfinite(w.grad).all()) for w in self._weights() if w.grad is not None)

    def _of_all(self, p: np.ndarray, part: np.ndarray | slice, n: int) -> np.ndarray:
        """The probabilities of all n candidates, where `p` are those of this rank's part."""
        if self.tables.ranks.size == 1:
            return p
        every = np.zeros((n, p.shape[1]), np.float32)
        every[part] = p
        return self.tables.ranks.sum(every)

    def _loss(
        self, logits: torch.Tensor, batch: Batch, part: np.ndarray | slice, p: torch.Tensor
    ) -> torch.Tensor:
        target = self._tensor(batch.target[part])
        weight = self._tensor(batch.weight[part]).unsqueeze(1).repeat(1, p.shape[1])
        weight[:, PURCHASE:] *= self._feedback.weights(target[:, PURCHASE:], p[:, PURCHASE:])
        offset = torch.nn.functional.pad(
            self._tensor(batch.offset[part]).unsqueeze(1), (CLICK, p.shape[1] - 1 - CLICK)
        )
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

    def _forward(
        self, c: Candidates, looked: _Rows, share: _Share
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """(leaves, the tables' outputs they stand for, logits of the share's candidates)."""
        embedded = self.tables.embed(
            {USER: (share.user, None), ITEM: (share.item, None), CATEGORY: (share.category, None)}
        )
        outputs = [embedded[USER], embedded[ITEM], embedded[CATEGORY]]
        leaves = [e.detach().requires_grad_() for e in outputs]
        user, item, category = leaves
        category = category.index_select(0, self._tensor(share.category_of))  # [items, D]
        at, past, there = self._tensor(share.at), share.past, share.past.items != 0
        lengths = there.sum(1)
        starts = self._tensor(np.cumsum(lengths) - lengths)
        weights = self.ranker.history_weights(self._tensor(past.kinds), self._tensor(past.recency))
        weights = weights.view(-1).index_select(0, self._tensor(np.flatnonzero(there)))
        mean = torch.nn.functional.embedding_bag(
            self._tensor(share.history_at), item + category, starts, mode="sum", per_sample_weights=weights
        )
        logits = self.ranker(
            user, mean, self._tensor(past.context), item.index_select(0, at), category.index_select(0, at),
            self._tensor(looked.dense[share.part]), self._tensor(c.scenario[c.ctx][share.part]),
            self._tensor(c.position[share.part]), self._tensor(share.ctx),
        )  # fmt: skip
        return leaves, outputs, logits

    def _look_up(self, c: Candidates, user_rows: np.ndarray, rows: np.ndarray, admit: bool) -> _Rows:
        """Everything of the candidates that is in the tables, but the embeddings. The same on all ranks.

        user_rows [B] and rows [N] are those of users and items; `admit`: categories get a row.
        """
        tables = self.tables
        past = user_features(c.history, c.moment)
        # Distinct ids in their order, not rows in theirs: sums of floats must not depend on where a restart puts rows.
        ids = np.concatenate((c.item, past.items[past.items != 0]))
        items, inverse = np.unique(ids, return_inverse=True)
        item_rows = tables.rows(ITEM, items, admit=False)
        categories, category_of = np.unique(tables.values(ITEM, "category", item_rows), return_inverse=True)
        category_rows = tables.rows(CATEGORY, categories, admit=admit)
        at, history_at = inverse[: len(rows)], inverse[len(rows) :]
        every = _Share(slice(None), user_rows, item_rows, category_rows, category_of, at, history_at, past, c.ctx)
        return _Rows(stored_features(tables, rows, c.ts), every)

    def _share(self, looked: _Rows) -> _Share:
        """This rank's share of the batch: that of some of its contexts."""
        every, ranks = looked.every, self.tables.ranks
        if ranks.size == 1:
            return every
        self.tables.touch(ITEM, every.item)  # those of the others' shares too
        contexts = ranks.part(len(every.user))
        return every.of(contexts)

    def _first_seen(self, rows: np.ndarray, ts: np.ndarray) -> None:
        """The creation time of items that the catalogue gave none: their first example's."""
        new = (rows > 0) & (self.tables.values(ITEM, "created", rows) == 0)
        if new.any():
            distinct, which = np.unique(rows[new], return_inverse=True)
            created = np.full(len(distinct), np.iinfo(np.int64).max)
            np.minimum.at(created, which, np.maximum(ts[new], 1))
            self.tables.set(ITEM, "created", distinct, created)

    def _weights(self) -> list[torch.nn.Parameter]:
        return list(self.ranker.parameters())

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def stored_features(tables: EmbeddingTables, rows: np.ndarray, ts: np.ndarray | int) -> np.ndarray:
    """`item_features` of item rows int64 [n] as they are in the table now."""
    impressions, clicks, interactions, created = (
        tables.values(ITEM, name, rows) for name in ("impressions", "clicks", "interactions", "created")
    )
    return item_features(impressions, clicks, interactions, created, ts)


def candidates_of(rows: Examples, implicit: np.ndarray, drawn: np.ndarray) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """(the rows as candidates, then the negatives `drawn` int64 [m, k] for those at `implicit` int64 [m], in the same
    contexts; which row each candidate came with, int64 [n + m · k]; which row each context came with, int64 [B])."""
    first, ctx = unique_contexts(rows.history, rows.user, rows.ts, rows.scenario)
    every = np.concatenate((np.arange(len(rows)), np.repeat(implicit, drawn.shape[1])))
    return Candidates(
        user=rows.user[first], history=rows.history[first], moment=rows.ts[first],
        scenario=rows.scenario[first].astype(np.int64), item=np.concatenate((rows.item, drawn.ravel())),
        ctx=ctx[every], position=rows.position[every].astype(np.int64),
    ), every, first  # fmt: skip


def unique_contexts(history: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index int64 [B] of one row for each distinct (history, columns), which of them each row is int64 [n]).

    history: uint8 [n, HISTORY_BYTES]; columns: integers [n]. The rows of an impression share theirs, whatever they say.
    """
    numbers = [column.astype(np.int64)[:, None] for column in columns]
    words = np.concatenate((*numbers, np.ascontiguousarray(history).view(np.int64)), axis=1)
    with np.errstate(over="ignore"):
        factors = mix(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
        key = mix(words[:, 0] ^ words[:, 1]) + words.view(np.uint64) @ factors
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    if np.array_equal(words, words[first[inverse]]):
        return first, inverse
    return np.arange(len(words)), np.arange(len(words))  # two contexts share a hash: none is shared
