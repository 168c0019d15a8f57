"""A training step in plain torch: `Trainer.step` without row maps, shared contexts and fused optimizers."""

from __future__ import annotations

import numpy as np
import torch

from embedding_store.initial import first_weights
from online_model.examples import Examples, Part, Source
from online_model.features import (
    CATEGORY,
    ITEM,
    MATCHES,
    RATE_SHARE,
    SELLER,
    USER,
    WORD,
    table_specs,
    user_features,
)
from online_model.feedback import probabilities, strategy
from online_model.history import RECENT
from online_model.ranker import CLICK, PURCHASE, WATCH, WATCH_TIME, Contexts, Items, Ranker
from online_model.settings import TrainerSettings
from online_model.watching import learned, quantiles
from tests.online_model.plain_model import PlainModel

TABLES = (USER, ITEM, CATEGORY, SELLER, WORD)


class PlainTrainer:
    """Tables are dictionaries: id → row. Rows of logs with impressions only."""

    def __init__(self, settings: TrainerSettings, about: dict[int, dict]) -> None:
        """about: item → category, seller, words as the catalogue has them."""
        self.settings, self.about = settings, about
        self.dim = settings.features.dim
        self.ranker = Ranker(self.dim, settings.ranker)
        wide = self.ranker.wide_parameters()
        deep = [p for p in self.ranker.parameters() if all(p is not w for w in wide)]
        self.adam = torch.optim.Adam([
            {"params": deep, "lr": settings.learning_rate}, {"params": wide, "lr": settings.wide_rate},
        ], eps=1e-5)  # fmt: skip
        self.rows: dict[str, dict[int, dict]] = {table: {} for table in TABLES}
        self.shown = self.now = 0
        self.labels: dict[int, list[float]] = {CLICK: [], WATCH: []}

    def step(self, rows: Examples) -> np.ndarray:
        """Scores and learns; probabilities [n, heads] from before."""
        n = len(rows)
        for i in range(n):
            self._admit(USER, int(rows.user[i]))
            self._admit(ITEM, int(rows.item[i]))
            own = self.rows[ITEM][int(rows.item[i])]
            own["created"] = own.get("created") or int(rows.ts[i])
        past = user_features(rows.history, rows.ts)
        for item in {int(i) for i in np.concatenate((rows.item, past.items.ravel()))} & set(self.rows[ITEM]):
            for table in (CATEGORY, SELLER):
                self._admit(table, self.rows[ITEM][item].get(table, 0))
            for word in self.rows[ITEM][item].get("words", ()):
                self._admit(WORD, int(word))
        for word in rows.query.ravel().tolist():
            self._admit(WORD, word)
        leaves = {
            table: {i: {**row, "weights": row["weights"].clone().requires_grad_()} for i, row in own.items()}
            for table, own in self.rows.items()
        }
        asked = zip(rows.user, rows.history, rows.ts, rows.scenario, rows.query, rows.item, strict=True)
        as_of = np.where(rows.part == Part.SHOWN, rows.ts, rows.closed).tolist()
        model = PlainModel(leaves, self.dim, self._rate())
        contexts, items = model.inputs(list(asked), torch.tensor(rows.position.tolist()), as_of)
        logits = self.ranker(contexts, items)
        self._learn(rows, logits, leaves, self._retrieval(rows, contexts, items, model, max(as_of)))
        self._count(rows)
        return probabilities(logits.detach(), strategy("calibrated", entire=True)).numpy()

    def _learn(self, rows: Examples, logits: torch.Tensor, leaves: dict, retrieval: torch.Tensor) -> None:
        plays = self.ranker.plays.numpy()
        loss = self.settings.retrieval * retrieval
        for i in range(len(rows)):
            loss = loss + _loss(rows.take(slice(i, i + 1)), logits[i], plays)
        self.adam.zero_grad()
        loss.backward()
        for p in self.ranker.parameters():
            if p.grad is not None:
                p.grad /= self.settings.batch_size
        self.adam.step()
        s = self.settings.features
        for table, own in leaves.items():
            for i, leaf in own.items():
                gradient, row = leaf["weights"].grad, self.rows[table][i]
                if gradient is not None:
                    row["momentum"] += float((gradient**2).mean())
                    rate = s.learning_rate * RATE_SHARE[table]
                    row["weights"] = row["weights"] - rate * gradient / (row["momentum"] ** 0.5 + s.eps)
        played = rows.play_ms >= 0
        if played.any():
            new = learned(plays, rows.play_ms[played], rows.duration_ms[played])
            self.ranker.plays.copy_(torch.from_numpy(new))

    def _retrieval(self, rows: Examples, contexts: Contexts, items: Items, model: PlainModel, now: int) -> torch.Tensor:
        """Each clicked one among the shown ones of the batch, less those of the same item."""
        a, b = self.ranker.towers(contexts)
        shown = [j for j in range(len(rows)) if rows.part[j] == Part.SHOWN]
        total = torch.zeros(())
        for i in shown:
            if rows.click[i] != 1:
                continue
            logits, own = [], 0
            for j in shown:
                if j != i and rows.item[j] == rows.item[i]:
                    continue
                own = len(logits) if j == i else own
                seen = self.rows[ITEM][int(rows.item[j])].get("impressions", 0)
                chance = len(shown) * (seen + 1) / (self.shown + len(rows)) / len(rows)
                numbers = items.numbers[j, :-MATCHES] @ self.ranker.tower_numbers
                near = torch.tensor(model.near(int(rows.item[j]), rows.history[i], now), dtype=torch.float32)
                numbers = numbers + near @ self.ranker.tower_near
                logits.append(a[i] @ items.item[j] + b[i] @ items.content[j] + numbers - np.log(chance))
            total = total - torch.log_softmax(torch.stack(logits), 0)[own]
        return total

    def _count(self, rows: Examples) -> None:
        self.labels[CLICK] += [float(click) for click in rows.click if click >= 0]
        watched = (rows.play_ms >= 0) & (rows.duration_ms > 0)
        self.labels[WATCH] += (rows.play_ms >= rows.duration_ms / 2)[watched].astype(float).tolist()
        self.ranker.rated.copy_(torch.tensor([[len(labels), sum(labels)] for labels in self.labels.values()]))
        self.now = max(self.now, int(rows.closed.max()))
        self._befriend(rows)
        for i in range(len(rows)):
            if rows.click[i] == 1:
                row = self.rows[ITEM][int(rows.item[i])]
                passed = (self.now - row.get("heat_ms", 0)) / 1000
                heats = zip(row.get("heat", (0.0, 0.0)), (3_600, 259_200), strict=True)
                row["heat"] = [h * 0.5 ** (passed / half) + 1 for h, half in heats]
                row["heat_ms"] = self.now
        self.shown += int((rows.part == Part.SHOWN).sum())
        for i in range(len(rows)):
            if rows.source[i] == Source.IMPRESSION and rows.part[i] in (Part.SHOWN, Part.LATE_CLICK):
                item = self.rows[ITEM][int(rows.item[i])]
                for table, owner in ((ITEM, int(rows.item[i])), *((t, item.get(t, 0)) for t in (CATEGORY, SELLER))):
                    if owner:
                        row = self.rows[table][owner]
                        row["impressions"] = row.get("impressions", 0) + int(rows.part[i] == Part.SHOWN)
                        row["clicks"] = row.get("clicks", 0) + int(rows.click[i] == 1)

    def _befriend(self, rows: Examples) -> None:
        """What is clicked after what, the heaviest 24 of it."""
        clicked: dict[int, list[int]] = {}
        for i in np.flatnonzero(rows.click == 1).tolist():
            clicked.setdefault(int(rows.item[i]), []).append(i)
        for item, clicks in clicked.items():
            row = self.rows[ITEM][item]
            left = 0.5 ** ((self.now - row.get("heat_ms", 0)) / 1000 / 2_592_000)
            weights = {i: w * left for i, w in zip(row.get("neighbours", ()), row.get("nearness", ()), strict=True)}
            for i in clicks:
                entries = user_features(rows.history[i : i + 1], self.now).items[0].tolist()
                for place, entry in enumerate(entries):
                    if entry and entry not in entries[:place]:
                        near = 0.8 ** (place if place < RECENT else place - RECENT)
                        weights[entry] = weights.get(entry, 0.0) + near
            kept = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[:24]
            row["neighbours"], row["nearness"] = [i for i, _ in kept], [w for _, w in kept]
            row["taken"] = row.get("taken", 0.0) * left + len(clicks)

    def _rate(self) -> float:
        """The usual click rate."""
        clicks = self.labels[CLICK]
        return (sum(clicks) + 1) / (len(clicks) + 20)

    def _admit(self, table: str, i: int) -> None:
        if i and i not in self.rows[table]:
            (settings,) = (spec.settings for spec in table_specs(self.settings.features) if spec.name == table)
            row = {"weights": torch.from_numpy(first_weights(settings, np.array([i])))[0], "momentum": 0.0}
            self.rows[table][i] = row | (self.about.get(i, {}) if table == ITEM else {})


def _loss(row: Examples, logits: torch.Tensor, plays: np.ndarray) -> torch.Tensor:
    """Of one row."""
    loss = torch.zeros(())
    if row.click[0] >= 0:
        loss = loss + bce(logits[CLICK], row.click[0])
    if row.play_ms[0] >= 0:
        if row.duration_ms[0] > 0:
            loss = loss + bce(logits[WATCH], row.play_ms[0] * 2 >= row.duration_ms[0])
        q = float(quantiles(plays, row.play_ms, row.duration_ms)[0])
        loss = loss + q * bce(logits[WATCH_TIME], 1) + (1 - q) * bce(logits[WATCH_TIME], 0)
    if row.part[0] in (Part.SHOWN, Part.PURCHASE):  # over all impressions: one negative, and one positive more
        q = torch.sigmoid(logits[CLICK]) * torch.sigmoid(logits[PURCHASE])
        loss = loss - torch.log(q / (1 + q) if row.purchase[0] == 1 else 1 / (1 + q))
    return loss


def bce(logit: torch.Tensor, label: float) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(logit if label else -logit)
