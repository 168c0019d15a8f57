"""A training step in plain torch: `Trainer.step` without row maps, shared contexts and fused optimizers."""

from __future__ import annotations

import numpy as np
import torch

from embedding_store.initial import first_weights
from online_model.examples import Examples, Part, Source
from online_model.features import CATEGORY, ITEM, item_features, table_specs, user_features
from online_model.feedback import probabilities, strategy
from online_model.ranker import Ranker
from online_model.settings import TrainerSettings


class PlainTrainer:
    """Tables are dictionaries: id → row. Rows of logs with impressions only."""

    def __init__(self, settings: TrainerSettings, categories: dict[int, int]) -> None:
        self.settings, self.categories = settings, categories
        self.dim = settings.features.dim
        self.ranker = Ranker(self.dim, settings.ranker)
        wide = self.ranker.wide_parameters()
        deep = [p for p in self.ranker.parameters() if all(p is not w for w in wide)]
        self.adam = torch.optim.Adam([
            {"params": deep, "lr": settings.learning_rate}, {"params": wide, "lr": settings.wide_rate},
        ])  # fmt: skip
        self.tables: dict[str, dict[int, torch.Tensor]] = {"user": {}, ITEM: {}, CATEGORY: {}}
        self.momentum: dict[str, dict[int, float]] = {"user": {}, ITEM: {}, CATEGORY: {}}
        self.stats: dict[int, list[int]] = {}  # item → impressions, clicks, created

    def step(self, rows: Examples) -> np.ndarray:
        """Scores and learns; probabilities [n, 3] from before."""
        n = len(rows)
        for i in range(n):
            item, user = int(rows.item[i]), int(rows.user[i])
            self._admit("user", user)
            self._admit(ITEM, item)
            self.stats.setdefault(item, [0, 0, 0])
            before = self.stats[item][2]
            self.stats[item][2] = int(rows.ts[i]) if before == 0 else before
        past = user_features(rows.history, rows.ts)
        known = set(self.tables[ITEM]) & {int(i) for i in np.concatenate((rows.item, past.items.ravel()))}
        for item in known:
            self._admit(CATEGORY, self.categories.get(item, 0))
        leaves = {t: {i: w.clone().requires_grad_() for i, w in rows.items()} for t, rows in self.tables.items()}
        zero = torch.zeros(self.dim)

        def category_of(item):
            return leaves[CATEGORY].get(self.categories.get(item, 0), zero) if item in known else zero

        def vector(item):
            return leaves[ITEM].get(item, zero) + category_of(item)

        users, means, items, categories, dense = [], [], [], [], []
        for i in range(n):
            users.append(leaves["user"][int(rows.user[i])])
            means.append(self._mean(past.items[i], past.kinds[i], past.recency[i], vector))
            item = int(rows.item[i])
            items.append(leaves[ITEM][item])
            categories.append(category_of(item))
            shown, clicks, created = self.stats[item]
            one = [np.array([v]) for v in (shown, clicks, 0, created)]
            dense.append(torch.from_numpy(item_features(*one, int(rows.ts[i])))[0])
        logits = self.ranker(
            torch.stack(users), torch.stack(means), torch.from_numpy(past.context),
            *(torch.stack(x) for x in (items, categories, dense)),
            torch.tensor(rows.scenario.tolist()), torch.tensor(rows.position.tolist()), torch.arange(n),
        )  # fmt: skip
        self._learn(rows, logits, leaves)
        for i in range(n):
            if rows.source[i] == Source.IMPRESSION and rows.part[i] in (Part.SHOWN, Part.LATE_CLICK):
                self.stats[int(rows.item[i])][0] += int(rows.part[i] == Part.SHOWN)
                self.stats[int(rows.item[i])][1] += int(rows.click[i] == 1)
        return probabilities(logits.detach(), strategy("calibrated")).numpy()

    def _mean(self, items, kinds, recency, vector) -> torch.Tensor:
        """The weighted mean of a history, entry by entry."""
        total, weights = torch.zeros(self.dim), torch.zeros(())
        for item, kind, near in zip(items.tolist(), kinds.tolist(), recency.tolist(), strict=True):
            if item:
                weight = torch.exp(self.ranker.past_kind[kind] + near * self.ranker.past_recency)
                total, weights = total + weight * vector(item), weights + weight
        return total / weights if weights else total

    def _learn(self, rows: Examples, logits: torch.Tensor, leaves: dict[str, dict[int, torch.Tensor]]) -> None:
        loss = torch.zeros(())
        for i in range(len(rows)):
            if rows.click[i] >= 0:
                loss = loss + bce(logits[i, 0], rows.click[i])
            if rows.play_ms[i] >= 0 and rows.duration_ms[i] > 0:
                loss = loss + bce(logits[i, 1], rows.play_ms[i] * 2 >= rows.duration_ms[i])
            if rows.purchase[i] >= 0:
                loss = loss + bce(logits[i, 2], rows.purchase[i])
        self.adam.zero_grad()
        loss.backward()
        for p in self.ranker.parameters():
            p.grad /= len(rows)
        self.adam.step()
        s = self.settings.features
        for table, own in leaves.items():
            for i, leaf in own.items():
                if leaf.grad is not None and i != 0:
                    self.momentum[table][i] += float((leaf.grad**2).mean())
                    self.tables[table][i] -= s.learning_rate * leaf.grad / (self.momentum[table][i] ** 0.5 + s.eps)

    def _admit(self, table: str, i: int) -> None:
        if i and i not in self.tables[table]:
            (settings,) = (spec.settings for spec in table_specs(self.settings.features) if spec.name == table)
            self.tables[table][i] = torch.from_numpy(first_weights(settings, np.array([i])))[0]
            self.momentum[table][i] = 0.0


def bce(logit: torch.Tensor, label: float) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(logit if label else -logit)
