"""One step of the model: look rows up, score, and learn from what was scored, in a single forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from embedding_store.tables import EmbeddingTables
from online_model.batch import Batch, Candidates
from online_model.features import (
    CATEGORY,
    ITEM,
    MATCHES,
    SELLER,
    USER,
    WORD,
    UserFeatures,
    item_numbers,
    matches,
    user_features,
)
from online_model.feedback import Strategy, probabilities
from online_model.losses import loss_sum, retrieval_loss
from online_model.neighbours import Lists, lists_of, neighbour_numbers, similar
from online_model.ranker import CLICK, PURCHASE, WAYS, Contexts, Items, Ranker
from online_model.stages import Stages

FAR = 1e-3  # of an item that none of the history's items is a neighbour of
USUAL_BATCHES, USUAL_ROWS = 100, 64
ADAM_EPS = 1e-5  # gradients are means: below this they are what rounding leaves of zero, and must not be scaled up
_NONE = np.empty(0, np.int64)


@dataclass
class Outcome:
    """What a step gave."""

    p: np.ndarray  # float32 [N, heads] probabilities of click, watch, …, from before the step
    rows: np.ndarray  # int64 [N] rows of the candidates' items, 0 where the table is full
    loss: float  # the mean of a row
    learned: bool  # False: nothing of the model was changed


@dataclass
class UsualLoss:
    """The mean loss of a row as it was of late, so that one that explodes is told from it."""

    mean: float = 0.0
    batches: int = 0

    def add(self, loss: float) -> None:
        """Of one more batch."""
        self.batches += 1
        self.mean += (loss - self.mean) / min(self.batches, USUAL_BATCHES)

    def limit(self, times: float, rows: int) -> float:
        """The mean loss from which on a batch of so many rows explodes; 0 times: none. A few rows may be unlucky."""
        if not times or self.batches < USUAL_BATCHES:
            return math.inf
        return times * self.mean * max(1.0, USUAL_ROWS / max(rows, 1))


@dataclass
class _Share:
    """b contexts and their n candidates: what of them is in the tables. Distinct rows, and who needs which."""

    part: np.ndarray | slice  # which of the candidates
    user: np.ndarray  # int64 [b] rows
    item: np.ndarray  # int64 [m] rows, of candidates and of what is in histories
    category: np.ndarray  # int64 [c] rows
    seller: np.ndarray  # int64 [s] rows
    word: np.ndarray  # int64 [w] rows
    category_of: np.ndarray  # int64 [m], the place in `category`
    seller_of: np.ndarray  # int64 [m], the place in `seller`
    title_of: np.ndarray  # int64 [m, TITLE_WORDS], the places in `word`
    query: np.ndarray  # int64 [b, QUERY_WORDS], the places in `word`
    at: np.ndarray  # int64 [n], the candidate's place in `item`
    told_from: np.ndarray  # int64 [c], the places in `item` of what retrieval tells positives from: of all ranks
    entries: np.ndarray  # int64 [b, HISTORY], the places in `item`; of any where there is no entry
    past: UserFeatures  # of the b contexts
    scenario: np.ndarray  # int64 [b]
    ctx: np.ndarray  # int64 [n] the candidate's context

    def of(self, contexts: slice) -> _Share:
        """That of some of the contexts."""
        part = np.flatnonzero((self.ctx >= contexts.start) & (self.ctx < contexts.stop))
        past = UserFeatures(*(column[contexts] for column in vars(self.past).values()))
        at, entries, query = self.at[part], self.entries[contexts], self.query[contexts]
        there = past.items != 0
        n, others = len(at), len(self.told_from)
        items, place = np.unique(np.concatenate((at, self.told_from, entries[there])), return_inverse=True)
        new_entries = np.zeros_like(entries)
        new_entries[there] = place[n + others :]
        categories, category_of = np.unique(self.category_of[items], return_inverse=True)
        sellers, seller_of = np.unique(self.seller_of[items], return_inverse=True)
        titles = self.title_of[items]
        words, word_of = np.unique(np.concatenate((titles.ravel(), query.ravel())), return_inverse=True)
        return _Share(
            part, self.user[contexts], self.item[items], self.category[categories], self.seller[sellers],
            self.word[words], category_of, seller_of, word_of[: titles.size].reshape(titles.shape),
            word_of[titles.size :].reshape(query.shape), place[:n], place[n : n + others], new_entries, past,
            self.scenario[contexts], self.ctx[part] - contexts.start,
        )  # fmt: skip


@dataclass
class _Rows:
    """What of N candidates is in the tables."""

    numbers: np.ndarray  # float32 [N, NUMBERS]
    every: _Share  # all of it
    similarity: np.ndarray  # float32 [B, c] of `neighbours.similar`: all contexts, all distinct items of candidates
    column: np.ndarray  # int64 [N] which of the c items the candidate is

    def near(self) -> np.ndarray:
        """The candidates' numbers of `similarity`, float32 [N, NEIGHBOURS]."""
        return neighbour_numbers(self.similarity[self.every.ctx, self.column])


@dataclass
class _Others:
    """What retrieval tells positives from: c of the N candidates, of all ranks."""

    item: torch.Tensor  # [c, D]
    content: torch.Tensor  # [c, D]
    which: np.ndarray  # int64 [c], ascending


class Learner:
    """The ranker over the tables, and its optimizer (Adam; the tables have their own, fused in their backward)."""

    def __init__(
        self, tables: EmbeddingTables, ranker: Ranker, feedback: Strategy, learning_rate: float, wide_rate: float,
        batch_rows: int, retrieval: float = 0.0, clip: float = 0.0, bf16: bool = False,
    ) -> None:  # fmt: skip
        """batch_rows: of a usual batch. retrieval: the weight of the two towers' loss. clip: the largest norm of the
        ranker's gradient, those of the tables shrink with it; 0: any. bf16: the dense layers compute in bfloat16, sums
        and weights stay float32."""
        self._clip, self._bf16, self._batch_rows = clip, bf16, batch_rows
        self.stages = Stages()
        self.tables, self.ranker, self._feedback, self._retrieval = tables, ranker, feedback, retrieval
        self._device = ranker.bias.device
        self._weights = list(ranker.parameters())
        self._adam = adam_of(ranker, learning_rate, wide_rate)

    def learn(self, batch: Batch, most: float = math.inf) -> Outcome:
        """Scores the batch, then learns it. Statistics are read, not changed. Admits users, items and all of theirs.

        Where the mean loss of a row is more than `most`, or anything is not finite, nothing of the model is changed.

        Two backward passes, so that nothing is updated before all is known to be sound: fused optimizers update during
        theirs. The first goes to the tables' outputs; what it gives is checked, agreed on by the ranks, and clipped;
        the second hands it to the tables.
        """
        c, tables = batch.candidates, self.tables
        tables.begin_step(batch.now_ms)
        user_rows = tables.rows(USER, c.user, admit=True, examples=batch.sighting)
        rows = tables.rows(ITEM, c.item, admit=True, examples=batch.example)
        self._first_seen(rows, c.ts)
        told_from = np.flatnonzero(batch.shown | (batch.example == 0)) if self._retrieval else _NONE
        looked = self._look_up(c, user_rows, rows, batch.as_of, told_from, admit=True)
        share, sampled = self._share(looked, learning=True), self._sampled(batch, rows)
        leaves, outputs = self._embed(share)
        vectors = self._vectors(share, leaves)
        contexts, items = self._inputs(c, looked, share, leaves, vectors)
        self.stages.done("look_up")
        mean_of_past = self.ranker.history_mean(contexts)
        logits = self._logits(contexts, items, mean_of_past)
        p = probabilities(logits.detach(), self._feedback)
        loss = self._loss(logits, batch, share.part, p)
        if self._retrieval:
            item, content = (v.index_select(0, self._tensor(share.told_from)) for v in vectors)
            others = _Others(item, content, told_from)
            loss = loss + self._retrieval * self._retrieval_loss(
                self.ranker.towers(contexts, mean_of_past), others, batch, looked, share, sampled
            )
        self.stages.done("forward")
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        mean = self._mean(loss.detach(), len(c.item))
        norm = self._gathered(_finite([loss.detach(), *grads]))
        learned = math.isfinite(norm) and mean <= most
        if learned:
            # Tables learn from sums, the ranker from means, as of a usual batch: a click comes at once and alone, what
            # was not clicked with its page, and by the mean of a small step clicks would count for more.
            usual = len(c.item) * self._batch_rows / max(1, int(np.count_nonzero(batch.example)))
            # All ranks agree: they have the same gradient of the ranker, and what goes to the tables takes its share.
            left = min(1.0, self._clip / max(norm / usual, 1e-12)) if self._clip else 1.0
            for w in self._weights:
                if w.grad is not None:
                    w.grad *= left / usual
            if left < 1:
                grads = [g * left for g in grads]
            torch.autograd.backward(outputs, grads)
            self._adam.step()
            self.ranker.count_rates(self._tensor(batch.target), self._tensor(batch.rows_for))
        every = self._of_all(p.cpu().numpy(), share.part, len(c.item))
        self.stages.done("backward")
        return Outcome(every, rows, mean, learned)

    @torch.no_grad()
    def score(self, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities float32 [N, heads], float32 [N, len(WAYS)] by which next items may be put in order): admits
        nothing, learns nothing."""
        tables, n = self.tables, len(candidates.item)
        user_rows = tables.rows(USER, candidates.user, admit=False)
        rows = tables.rows(ITEM, candidates.item, admit=False)
        looked = self._look_up(candidates, user_rows, rows, candidates.ts, _NONE, admit=False)
        share = self._share(looked, learning=False)
        leaves, _ = self._embed(share)
        contexts, items = self._inputs(candidates, looked, share, leaves, self._vectors(share, leaves))
        mean = self.ranker.history_mean(contexts)
        p = probabilities(self._logits(contexts, items, mean), self._feedback)
        a, b = self.ranker.towers(contexts, mean)
        affinity = (a.index_select(0, items.ctx) * items.item + b.index_select(0, items.ctx) * items.content).sum(1)
        affinity = affinity + items.numbers[:, :-MATCHES] @ self.ranker.tower_numbers
        affinity = affinity + items.near @ self.ranker.tower_near
        ways = torch.stack((p[:, CLICK], affinity, affinity + torch.log(items.near[:, 0] + FAR)), 1)
        every = self._of_all(torch.cat((p, ways), 1).cpu().numpy(), share.part, n)
        return every[:, : -len(WAYS)], every[:, -len(WAYS) :]

    def _logits(self, contexts: Contexts, items: Items, mean: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self.ranker(contexts, items, mean).float()

    def _mean(self, loss: torch.Tensor, n: int) -> float:
        """The mean loss of a row, where `loss` is the sum of this rank's share."""
        return float(self.tables.ranks.sum(np.array([float(loss)]))[0]) / n

    def _gathered(self, sound: bool) -> float:
        """Adds up the ranker's gradients over the ranks. Their norm; not finite where one of them is not, or any rank
        is not `sound`."""
        if self.tables.ranks.size > 1:
            for w in self._weights:
                if w.grad is None:
                    w.grad = torch.zeros_like(w)
            said = torch.tensor([float(not sound)], device=self._device)
            flat = torch.cat([w.grad.ravel() for w in self._weights if w.grad is not None] + [said])
            self.tables.ranks.add_up(flat)
            sound = float(flat[-1]) == 0
            parts = flat[:-1].split([w.numel() for w in self._weights])
            for w, gradient in zip(self._weights, parts, strict=True):
                w.grad = gradient.view_as(w).clone()
        grads = [w.grad for w in self._weights if w.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if sound else math.inf

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
        target, heads = self._tensor(batch.target[part]), p.shape[1]
        weight = self._tensor(batch.weight[part]).unsqueeze(1).repeat(1, heads)
        offset = torch.nn.functional.pad(self._tensor(batch.offset[part]).unsqueeze(1), (CLICK, heads - 1 - CLICK))
        if self._feedback.entire:
            impression = self._tensor(batch.impression[part])
            log_p = torch.nn.functional.logsigmoid(logits[:, [CLICK, PURCHASE]])
            log_p = log_p[:, 1] + torch.where(impression, log_p[:, 0], 0.0)
            learned = self._feedback.over_impressions(log_p)
            logits = torch.cat((logits[:, :PURCHASE], learned.unsqueeze(1), logits[:, PURCHASE + 1 :]), 1)
            weight[:, PURCHASE] = self._tensor(batch.rows_for[part])
            p = torch.cat((p[:, :PURCHASE], log_p.detach().exp().unsqueeze(1), p[:, PURCHASE + 1 :]), 1)
        weight[:, PURCHASE:] *= self._feedback.weights(target[:, PURCHASE:], p[:, PURCHASE:])
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

    def _retrieval_loss(
        self, towers: tuple[torch.Tensor, torch.Tensor], told_from: _Others, batch: Batch, looked: _Rows, share: _Share,
        sampled: np.ndarray,
    ) -> torch.Tensor:  # fmt: skip
        """Of the positives of this rank's share.

        towers: [b, D] each, of the share's contexts; sampled: float32 [N], log of the probability that a draw gives the
        candidate's item.
        """
        clicked = (batch.target[:, CLICK] == 1) & batch.shown
        positive = np.arange(len(clicked))[share.part]
        positive, whose = positive[clicked[positive]], share.ctx[clicked[share.part]]
        if not len(positive):
            return towers[0].new_zeros(())
        columns = told_from.which
        a, b = (side.index_select(0, self._tensor(whose)) for side in towers)
        own = looked.numbers[columns, :-MATCHES]
        # A number that is the same for all tells none of them apart: its gradient is to be zero, not what rounding
        # leaves of a sum of a thousand shares, which Adam would scale up.
        numbers = self._tensor(own - own.mean(0))
        logits = a @ told_from.item.T + b @ told_from.content.T + numbers @ self.ranker.tower_numbers
        if self.ranker.settings.neighbours:
            similarity = looked.similarity[np.ix_(looked.every.ctx[positive], looked.column[columns])]
            logits = logits + self._tensor(neighbour_numbers(similarity)) @ self.ranker.tower_near
        return retrieval_loss(
            logits, self._tensor(np.searchsorted(columns, positive)), self._tensor(sampled[columns]),
            self._tensor(batch.candidates.item[columns]), self._tensor(batch.weight[positive]),
        )  # fmt: skip

    def _sampled(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """log Q of the candidates' items, float32 [N]: in a draw from this batch, of shown ones and of negatives.

        What is shown is as frequent as it was so far; an item that was not yet counts one.
        """
        drawn = batch.example == 0
        shown = int(batch.shown.sum())
        seen = sum(self.tables.values(ITEM, name, rows) for name in ("impressions", "interactions"))
        often = (seen + 1) / (batch.shown_before + len(rows))
        return np.log((shown * often + int(drawn.sum()) * batch.chance) / len(rows) + 1e-12).astype(np.float32)

    def _embed(self, share: _Share) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(leaves, the tables' outputs they stand for) of user, item, category, seller, word."""
        rows = {USER: share.user, ITEM: share.item, CATEGORY: share.category, SELLER: share.seller, WORD: share.word}
        embedded = self.tables.embed({table: (own, None) for table, own in rows.items()})
        outputs = [embedded[table] for table in rows]
        return [e.detach().requires_grad_() for e in outputs], outputs

    def _vectors(self, share: _Share, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, content) of the share's distinct items, [m, D] each."""
        _, item, category, seller, word = leaves
        content = category.index_select(0, self._tensor(share.category_of))
        content = content + seller.index_select(0, self._tensor(share.seller_of))
        return item, content + self._mean_of_words(share.title_of, share.word, word)

    def _inputs(
        self, c: Candidates, looked: _Rows, share: _Share, leaves: list[torch.Tensor],
        vectors: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[Contexts, Items]:  # fmt: skip
        """What the ranker is given of the share."""
        (user, *_, word), (item, content) = leaves, vectors
        past = share.past
        there = self._tensor((past.items != 0).astype(np.float32)).unsqueeze(2)
        entries = (item + content).index_select(0, self._tensor(share.entries).view(-1))
        at = self._tensor(share.at)
        return Contexts(
            user, entries.view(*past.items.shape, item.shape[1]) * there, self._tensor(past.kinds),
            self._tensor(past.recency),
            self._mean_of_words(share.query, share.word, word), self._tensor(past.context),
            self._tensor(share.scenario),
        ), Items(
            item.index_select(0, at), content.index_select(0, at), self._tensor(looked.numbers[share.part]),
            self._tensor(looked.near()[share.part]),
            self._tensor(c.position[share.part]), self._tensor(share.ctx),
        )  # fmt: skip

    def _mean_of_words(self, places: np.ndarray, rows: np.ndarray, words: torch.Tensor) -> torch.Tensor:
        """int64 [m, n] places in `rows` → [m, D]: the mean over those that have a row, zero where none has."""
        if len(rows) < 2:
            return words.new_zeros((len(places), words.shape[1]))
        there = (rows[places] != 0).astype(np.float32)
        weights = there / np.maximum(there.sum(1, keepdims=True), 1)
        return embedding_bag(self._tensor(places), words, per_sample_weights=self._tensor(weights), mode="sum")

    def _look_up(
        self, c: Candidates, user_rows: np.ndarray, rows: np.ndarray, as_of: np.ndarray, told_from: np.ndarray,
        admit: bool,
    ) -> _Rows:  # fmt: skip
        """Everything of the candidates that is in the tables, but the embeddings. The same on all ranks.

        user_rows [B] and rows [N] are those of users and items; as_of [N]: the time of their numbers; told_from: the
        candidates that retrieval tells positives from; `admit`: what belongs to them gets a row.
        """
        tables, n = self.tables, len(rows)
        past = user_features(c.history, c.moment)
        there = past.items != 0
        # Distinct ids in their order, not rows in theirs: sums of floats must not depend on where a restart puts rows.
        ids = np.concatenate((c.item, past.items[there]))
        items, inverse = np.unique(ids, return_inverse=True)
        item_rows = tables.rows(ITEM, items, admit=False)
        entries = np.zeros(past.items.shape, np.int64)
        entries[there] = inverse[n:]
        at = inverse[:n]
        groups = {name: tables.values(ITEM, name, item_rows) for name in (CATEGORY, SELLER)}
        places, group_rows = {}, {}
        for name, own in groups.items():
            distinct, places[name] = np.unique(own, return_inverse=True)
            group_rows[name] = tables.rows(name, distinct, admit=admit)
        titles = tables.values(ITEM, "words", item_rows)
        words, word_of = np.unique(np.concatenate((titles.ravel(), c.query.ravel())), return_inverse=True)
        word_rows = tables.rows(WORD, words, admit=admit)
        every = _Share(
            slice(None), user_rows, item_rows, group_rows[CATEGORY], group_rows[SELLER], word_rows,
            places[CATEGORY], places[SELLER], word_of[: titles.size].reshape(titles.shape),
            word_of[titles.size :].reshape(c.query.shape), at, at[told_from], entries, past, c.scenario,
            c.ctx,
        )  # fmt: skip
        of_entries = [past.items] + [np.where(there, own[entries], 0) for own in groups.values()]
        of_items = [c.item] + [own[at] for own in groups.values()]
        rows_of = {name: own[places[name][at]] for name, own in group_rows.items()} | {ITEM: rows}
        rate = self.ranker.click_rate()
        own_numbers = item_numbers(lambda table, name: tables.values(table, name, rows_of[table]), as_of, rate)
        numbers = np.concatenate((own_numbers, matches(past, of_entries, of_items, c.ctx)), axis=1)
        similarity, column = self._similar(past.items, c.item, items, item_rows, int(as_of.max(initial=0)))
        return _Rows(numbers, every, similarity, column)

    def _similar(
        self, past: np.ndarray, item: np.ndarray, items: np.ndarray, rows: np.ndarray, now_ms: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `similar` says. items, rows int64 [m]: all ids, ascending, and their rows."""
        if not self.ranker.settings.neighbours:
            return np.zeros((len(past), 1), np.float32), np.zeros(len(item), np.int64)

        def lists(ids: np.ndarray) -> Lists:
            own = rows[np.searchsorted(items, ids)]
            return lists_of(ids, lambda name: self.tables.values(ITEM, name, own), now_ms)

        return similar(past, item, lists)

    def _share(self, looked: _Rows, learning: bool) -> _Share:
        """This rank's share of the batch: that of some of its contexts."""
        every, ranks = looked.every, self.tables.ranks
        if ranks.size == 1:
            return every
        if learning:
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

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def adam_of(ranker: Ranker, learning_rate: float, wide_rate: float) -> torch.optim.Adam:
    """The ranker's optimizer."""
    wide = ranker.wide_parameters()
    ids = {id(p) for p in wide}
    deep = [p for p in ranker.parameters() if id(p) not in ids]
    groups = [{"params": deep, "lr": learning_rate}, {"params": wide, "lr": wide_rate}]
    return torch.optim.Adam(groups, eps=ADAM_EPS, fused=True)


def _finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all numbers in them are: one question, as each costs a step some microseconds."""
    largest = torch.nn.utils.get_total_norm([t for t in tensors if t.numel()], math.inf)
    return bool(torch.isfinite(largest))
