"""What the ranker is given of one candidate, the plain way: rows from dictionaries, entry by entry, word by word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from online_model.features import CATEGORY, ITEM, SELLER, USER, WORD, user_features
from online_model.history import RECENT
from online_model.ranker import Contexts, Items

Rows: TypeAlias = Mapping[str, Mapping[int, Mapping[str, Any]]]  # table → id → column → its value, `weights` a tensor


class PlainModel:
    def __init__(self, rows: Rows, dim: int, rate: float) -> None:
        """rate: the usual click rate."""
        self.rows, self.zero, self.rate = rows, torch.zeros(dim), rate

    def inputs(
        self, asked: Sequence[tuple], position: torch.Tensor | None = None, as_of: Sequence[int] | None = None
    ) -> tuple[Contexts, Items]:
        """asked: (user id, history, ts, scenario, ids of the query's words, item id) each; every one a context.
        as_of: the time of an item's numbers, where it is not ts."""
        as_of = [one[2] for one in asked] if as_of is None else as_of
        contexts = [self._context(*one[:5]) for one in asked]
        now = max(as_of)
        items = [self._item(one[5], one[1], one[2], at, now) for one, at in zip(asked, as_of, strict=True)]
        return (
            Contexts(*(torch.stack(column) for column in zip(*contexts, strict=True))),
            Items(*(torch.stack(column) for column in zip(*items, strict=True)), position, torch.arange(len(asked))),
        )

    def _context(self, user, history, ts, scenario, query) -> list[torch.Tensor]:
        past = user_features(history[None], ts)
        entries = [self.weights(ITEM, i) + self.content(i) if i else self.zero for i in past.items[0].tolist()]
        return [
            self.weights(USER, user), torch.stack(entries), torch.from_numpy(past.kinds[0]),
            torch.from_numpy(past.recency[0]), self.mean(query), torch.from_numpy(past.context[0]),
            torch.tensor(int(scenario)),
        ]  # fmt: skip

    def _item(self, item, history, ts, as_of, now) -> list[torch.Tensor]:
        numbers = torch.tensor(self.numbers(item, history, ts, as_of), dtype=torch.float32)
        near = torch.tensor(self.near(item, history, now), dtype=torch.float32)
        return [self.weights(ITEM, item), self.content(item), numbers, near]

    def weights(self, table: str, i: int) -> torch.Tensor:
        row = self.rows[table].get(int(i))
        return self.zero if row is None else row["weights"]

    def column(self, item: int, name: str) -> Any:
        row = self.rows[ITEM].get(int(item))
        return 0 if row is None else row.get(name, 0)

    def content(self, item: int) -> torch.Tensor:
        words = self.column(item, "words")
        return (
            self.weights(CATEGORY, self.column(item, "category")) + self.weights(SELLER, self.column(item, "seller"))
            + self.mean([] if isinstance(words, int) else words)
        )  # fmt: skip

    def mean(self, words) -> torch.Tensor:
        known = [self.weights(WORD, w) for w in words if int(w) in self.rows[WORD]]
        return sum(known, self.zero) / max(len(known), 1)

    def numbers(self, item: int, history: np.ndarray, ts: int, as_of: int | None = None) -> list[float]:
        as_of = ts if as_of is None else as_of
        created = int(self.column(item, "created"))
        age = np.log1p(max(int(as_of) - created, 0) / 3_600_000) / 3 if created > 0 else 0.0
        groups = [(CATEGORY, self.column(item, "category")), (SELLER, self.column(item, "seller"))]
        rates = [self._rates(table, i) for table, i in ((ITEM, item), *groups)]
        past = user_features(history[None], ts)
        recency, alike = past.recency[0].tolist(), []
        for name in ("", "category", "seller"):
            own = self.column(item, name) if name else item
            others = [self.column(i, name) if name and i else i for i in past.items[0].tolist()]
            same = [r for r, other in zip(recency, others, strict=True) if other == own != 0]
            alike += [max(same, default=0.0), sum(same) / (sum(recency) + 1e-6)]
        heats, passed = self.column(item, "heat"), max(int(as_of) - int(self.column(item, "heat_ms")), 0) / 1000
        heats = [0.0, 0.0] if isinstance(heats, int) else [float(h) for h in heats]
        left = [np.log1p(h * 0.5 ** (passed / half)) for h, half in zip(heats, (3_600, 259_200), strict=True)]
        return [*rates[0], age, *left, *rates[1], *rates[2], *alike]

    def near(self, item: int, history: np.ndarray, now: int) -> list[float]:
        """What the history's items say of it, each at its first place in one of the two lists."""
        similarity, seen = 0.0, {0}
        for place, entry in enumerate(user_features(history[None], now).items[0].tolist()):
            if entry not in seen:
                seen.add(entry)
                pair = self._listed(item, entry, now) + (self._listed(entry, item, now) if entry != item else 0.0)
                often = self._left(item, "taken", now) * self._left(entry, "taken", now)
                similarity += 0.8 ** (place if place < RECENT else place - RECENT) * pair / (often**0.5 + 10)
        return [similarity, np.log1p(100 * similarity) / 3]

    def _listed(self, owner: int, other: int, now: int) -> float:
        neighbours = self.column(owner, "neighbours")
        known = [] if isinstance(neighbours, int) else list(neighbours)
        return float(self._left(owner, "nearness", now)[known.index(other)]) if other in known else 0.0

    def _left(self, item: int, name: str, now: int) -> Any:
        passed = max(int(now) - int(self.column(item, "heat_ms")), 0) / 1000
        return np.asarray(self.column(item, name), np.float64) * 0.5 ** (passed / 2_592_000)

    def _rates(self, table: str, i: int) -> list[float]:
        row = self.rows[table].get(int(i), {})
        shown, clicks, others = (int(row.get(name, 0)) for name in ("impressions", "clicks", "interactions"))
        strength = 1 / self.rate + 1 / (1 - self.rate)
        clicked = min(clicks, shown) + self.rate * strength
        logit = np.log(clicked / (shown + strength - clicked)) - np.log(self.rate / (1 - self.rate))
        return [logit, np.log1p(shown) / 3, np.log1p(others) / 3, float(shown + others == 0)]
