"""The dense part of the model: one small network over gathered embeddings, three heads.

click: the probability of a click on an impression. watch: of a long view (LONG_VIEW) of what was played. purchase: of
a purchase after a click; how it learns while purchases are still to come, and what its logit then stands for, is said
in feedback.py, which may ask for further heads behind the three.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from embedding_store.errors import UsageError
from online_model.features import CLICK_PRIOR, CONTEXT, DENSE
from online_model.history import Kind
from online_model.settings import RankerSettings

CLICK, WATCH, PURCHASE = 0, 1, 2  # columns of the logits
HEADS = ("click", "watch", "purchase")
SCENARIO_COUNT = 4  # streams.events.SCENARIOS
POSITIONS = 64  # places told apart; those further down are as the last
PURCHASE_PRIOR = 0.05


class Ranker(nn.Module):
    """Scores candidates of contexts. A context is a user in a state at one moment.

    The first layer is split in what belongs to the context and what to the candidate, so that a thousand candidates
    of one user cost one context.
    """

    def __init__(self, dim: int, settings: RankerSettings, extra: int = 0) -> None:
        """`extra`: heads behind the three."""
        super().__init__()
        self.dim = dim
        heads = len(HEADS) + extra
        hidden, second = settings.hidden, settings.second
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.from_history = nn.Linear(dim, dim, bias=False)
            self.from_context = nn.Linear(2 * dim, hidden)
            self.from_item = nn.Linear(2 * dim + DENSE, hidden, bias=False)
            self.from_match = nn.Linear(dim, hidden, bias=False)
            self.from_scenario = nn.Embedding(SCENARIO_COUNT, hidden)
            self.second = nn.Linear(hidden, second)
            self.heads = nn.Linear(second, heads, bias=False)
            nn.init.eye_(self.from_history.weight)  # at first: what is like the history
            nn.init.zeros_(self.from_scenario.weight)
            nn.init.normal_(self.heads.weight, std=0.05)
            self.from_moment = nn.Linear(CONTEXT, hidden, bias=False)
            nn.init.zeros_(self.from_moment.weight)
        # The wide part. It starts as the item's click rate and the match, so that the first scores are sensible.
        purchase = [_logit(PURCHASE_PRIOR)] * (1 + extra)
        self.bias = nn.Parameter(torch.tensor([_logit(CLICK_PRIOR), 0.0, *purchase]))
        self.wide = nn.Parameter(torch.zeros(DENSE, heads))
        self.match = nn.Parameter(torch.zeros(heads))
        with torch.no_grad():
            self.wide[0, CLICK] = 1.0
            self.match[CLICK] = 1.0
        self.past_kind = nn.Parameter(torch.zeros(len(Kind) + 1))  # how much an entry of the history weighs:
        self.past_recency = nn.Parameter(torch.zeros(1))  # at first all the same
        self.place = nn.Embedding(POSITIONS, 1, padding_idx=0)
        nn.init.zeros_(self.place.weight)

    def history_weights(self, kinds: torch.Tensor, recency: torch.Tensor) -> torch.Tensor:
        """What each entry counts in `history_mean`, float32 [B, HISTORY]: in sum 1, or 0 where there is none.

        kinds: int64, recency: float32, both [B, HISTORY], as in UserFeatures.
        """
        there = kinds > 0
        logits = self.past_kind.index_select(0, kinds.reshape(-1)).view_as(recency) + recency * self.past_recency
        return torch.softmax(logits.masked_fill(~there, -1e9), 1) * there

    def query(self, user: torch.Tensor, history_mean: torch.Tensor) -> torch.Tensor:
        """[B, D] whose dot product with an item's vector (item + category) is the match: for retrieval."""
        return user + self.from_history(history_mean)

    def forward(
        self,
        user: torch.Tensor,
        history_mean: torch.Tensor,
        context: torch.Tensor,
        item: torch.Tensor,
        category: torch.Tensor,
        dense: torch.Tensor,
        scenario: torch.Tensor,
        position: torch.Tensor | None,
        ctx: torch.Tensor,
    ) -> torch.Tensor:
        """Logits float32 [N, 3 + extra] (click, watch, purchase, …) of N candidates of B contexts.

        user, history_mean: [B, D] (the mean of the vectors of the history's items by `history_weights`, zero for none);
        context: [B, CONTEXT] of `user_features`; item, category: [N, D]; dense: [N, DENSE] of `item_features`;
        scenario: int64 [N]; position: int64 [N], the place on the page, −1 unknown, None where nothing was shown yet;
        ctx: int64 [N], the candidate's context. The bias of a place is relative to the first, so what is served is the
        probability in the first place.
        """
        match = self.query(user, history_mean).index_select(0, ctx) * (item + category)
        x = self.from_context(torch.cat((user, history_mean), 1)) + self.from_moment(context)
        x = x.index_select(0, ctx) + self.from_item(torch.cat((item, category, dense), 1)) + self.from_match(match)
        x = torch.relu(x + self.from_scenario(scenario))
        logits = self.heads(torch.relu(self.second(x)))
        logits = logits + self.bias + dense @ self.wide + match.sum(1, keepdim=True) * self.match
        if position is None:
            return logits
        place = self.place(position.clamp(0, POSITIONS - 1))  # [N, 1]
        return logits + nn.functional.pad(place, (CLICK, logits.shape[1] - 1 - CLICK))

    def wide_parameters(self) -> list[torch.Tensor]:
        """Those that stand for themselves (no product with others), and so learn safely at a higher rate."""
        return [self.bias, self.wide, self.place.weight]

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of all weights by name, float32."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.named_parameters()}

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets all weights. Raises UsageError where names or shapes are others: the model's settings differ."""
        own = dict(self.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        if shapes != {name: w.shape for name, w in weights.items()}:
            raise UsageError(
                "the stored model has other dense weights than these settings: use the settings it was made with, "
                "or an empty data directory"
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))
