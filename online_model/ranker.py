"""The dense part of the model: one network over gathered embeddings, for all scenarios and tasks.

    context (user, history, query, moment) ─┐ first layer, split:   gates of scenario,
    candidate (item, content, numbers)     ─┤ once per context,     moment and user ──→ second ──→ experts, mixed by
    attention of it over the history       ─┘ once per candidate                                 task ──→ heads

| part | after | setting |
|---|---|---|
| attention of the candidate over the history | Zhou et al., "Deep interest network", KDD 2018 | attention |
| gates of what is known beforehand on the first layer | Chang et al., "PEPNet", KDD 2023, section 3.2 | gates |
| experts that each task mixes for itself | Ma et al., "MMoE", KDD 2018 | experts |
| purchase over all impressions: click × purchase after it | Ma et al., "ESMM", SIGIR 2018 | entire_space |
| watch time as its quantile among like durations | Zhan et al., "D2Q", KDD 2022 | watch_quantiles |
| a wide part beside the deep one | Cheng et al., "Wide & deep learning", DLRS 2016 | |
| a weight of each user and item by itself | Guo et al., "DeepFM", IJCAI 2017, section 2.1 | |

Heads: click, the probability of a click on an impression. watch: of a long view (LONG_VIEW) of what was played.
watch_time: the quantile of the play's length (watching.py). purchase: of a purchase after a click; how it learns while
purchases are still to come, and what its logit then stands for, is said in feedback.py, which may ask for further heads
behind these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import silu

from embedding_store.errors import UsageError
from online_model.features import CLICK_PRIOR, CONTEXT, MATCHES, NUMBERS
from online_model.history import Kind
from online_model.neighbours import NEIGHBOURS
from online_model.settings import RankerSettings
from online_model.watching import BINS, GROUPS

CLICK, WATCH, WATCH_TIME, PURCHASE = 0, 1, 2, 3  # columns of the logits
HEADS = ("click", "watch", "watch_time", "purchase")
WAYS = ("click", "affinity", "near")  # to put next items in order (evaluation/ranking.py)
SCENARIO_COUNT = 4  # streams.events.SCENARIOS
POSITIONS = 64  # places told apart; those further down are as the last
PURCHASE_PRIOR = 0.05
RATED, RATED_OF = 2, 3_000  # heads that start from the rate of their labels: click, watch; in so many rows
_RATE_PRIOR, _RATE_STRENGTH = (CLICK_PRIOR, 0.5), 20.0  # and before there are any
_FIRST_ORDER = (0.7, 0.3, 0.3)  # of user, item, content: learned on from there, towards 0 where all are alike
_DEEP_SHARE = 0.5  # of the numbers, in the deep part: the wide one says what they mean by themselves
LEAK, SHARPNESS = 0.1, 8.0  # of the units
SCENARIO_DIM, GATE_WIDTH = 8, 32  # of the gates


@dataclass
class Contexts:
    """B users, each in a state, at a moment, in a scenario; D: the tables' dim."""

    user: torch.Tensor  # [B, D]
    entries: torch.Tensor  # [B, HISTORY, D] vectors of the history's items, zero where there is none
    kinds: torch.Tensor  # int64 [B, HISTORY] of `UserFeatures`
    recency: torch.Tensor  # [B, HISTORY]
    query: torch.Tensor  # [B, D] mean of the words searched for, zero for none
    moment: torch.Tensor  # [B, CONTEXT]
    scenario: torch.Tensor  # int64 [B]


@dataclass
class Items:
    """N candidates."""

    item: torch.Tensor  # [N, D]
    content: torch.Tensor  # [N, D] category + seller + mean of the title's words
    numbers: torch.Tensor  # [N, NUMBERS]
    near: torch.Tensor  # [N, NEIGHBOURS] what the history's items say of it (neighbours.py)
    position: torch.Tensor | None  # int64 [N] place on the page, -1 unknown; None where nothing was shown yet
    ctx: torch.Tensor  # int64 [N] the candidate's context


class Ranker(nn.Module):
    """Scores candidates of contexts.

    The first layer is split in what belongs to the context and what to the candidate, so that a thousand candidates
    of one user cost one context.
    """

    plays: torch.Tensor  # float32 [GROUPS, BINS] of watching.py
    rated: torch.Tensor  # float32 [RATED, 2] of the first RATED_OF rows with a label: how many, how many positives

    def __init__(self, dim: int, settings: RankerSettings, extra: int = 0) -> None:
        """`extra`: heads behind those of HEADS."""
        super().__init__()
        self.dim, self.settings = dim, settings
        heads = len(HEADS) + extra
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._make_first(dim, settings)
            self._make_deep(dim, settings, heads)
        # The wide part. It starts as the item's click rate and the match, so that the first scores are sensible.
        purchase = [_logit(PURCHASE_PRIOR)] * (1 + extra)
        self.bias = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, *purchase]))
        self.first_order = nn.Parameter(torch.tensor(_FIRST_ORDER))
        # Not of purchases: counts and ages only grow, so they are larger whenever the positives come, days after the
        # negatives, and at a high rate it would be learned from that who buys (`python -m tests.figures.feedback`).
        self.wide = nn.Parameter(torch.zeros(NUMBERS, PURCHASE))
        self.match = nn.Parameter(torch.zeros(heads))
        with torch.no_grad():
            self.wide[0, CLICK] = 1.0
            self.match[CLICK] = 1.0
        self.tower_numbers = nn.Parameter(torch.zeros(NUMBERS - MATCHES))
        # Nor of purchases: by the time they are learned their own click is among what is counted.
        self.wide_near = nn.Parameter(torch.zeros(NEIGHBOURS, PURCHASE))
        self.tower_near = nn.Parameter(torch.zeros(NEIGHBOURS))
        self.past_kind = nn.Parameter(torch.zeros(len(Kind) + 1))  # how much an entry of the history weighs:
        self.past_recency = nn.Parameter(torch.zeros(1))  # at first all the same
        self.register_buffer("plays", torch.zeros(GROUPS, BINS))
        self.register_buffer("rated", torch.zeros(RATED, 2))
        self.place = nn.Embedding(POSITIONS, 1, padding_idx=0)
        nn.init.zeros_(self.place.weight)

    def _make_first(self, dim: int, settings: RankerSettings) -> None:
        """The first layer, and what is made of the history."""
        hidden = settings.widths[0]
        self.from_history = nn.Linear(dim, dim, bias=False)
        self.from_query = nn.Linear(dim, dim, bias=False)
        self.from_context = nn.Linear(3 * dim, hidden)
        self.from_moment = nn.Linear(CONTEXT, hidden, bias=False)
        self.from_item = nn.Linear(2 * dim, hidden, bias=False)
        self.from_numbers = nn.Linear(NUMBERS, hidden, bias=False)
        self.from_match = nn.Linear(dim, hidden, bias=False)
        self.from_scenario = nn.Embedding(SCENARIO_COUNT, hidden)
        if settings.attention:
            self.attend = nn.Linear(dim, dim, bias=False)
            self.from_attended = nn.Linear(2 * dim, hidden, bias=False)
            self.attend_kind = nn.Parameter(torch.zeros(len(Kind) + 1))
            self.attend_recency = nn.Parameter(torch.zeros(1))
            with torch.no_grad():
                self.attend.weight.copy_(torch.eye(dim) * dim**-0.5)
        nn.init.eye_(self.from_history.weight)  # at first: what is like the history
        for layer in (self.from_query, self.from_scenario, self.from_moment):
            nn.init.zeros_(layer.weight)

    def _make_deep(self, dim: int, settings: RankerSettings, heads: int) -> None:
        """The gates, the layers behind the first, and the user's tower."""
        hidden, second, third = settings.widths
        if settings.gates:
            self.scenario = nn.Embedding(SCENARIO_COUNT, SCENARIO_DIM)
            self.gate_in = nn.Linear(SCENARIO_DIM + CONTEXT + dim, GATE_WIDTH)
            self.gate_out = nn.Linear(GATE_WIDTH, hidden)
            nn.init.zeros_(self.gate_out.weight)
            nn.init.zeros_(self.gate_out.bias)  # at first all gates are open: 2σ(0) = 1
        self.second = nn.Linear(hidden, second)
        self.experts = nn.Linear(second, settings.experts * third)
        if settings.experts > 1:
            self.mixture = nn.Linear(second, heads * settings.experts)
        self.heads = nn.Parameter(0.05 * torch.randn(heads, third))
        self.tower = nn.Linear(3 * dim + CONTEXT, 2 * dim, bias=False)
        nn.init.zeros_(self.tower.weight)

    def rates(self) -> torch.Tensor:
        """The rates of click and watch that the model starts from, [RATED]: of its first rows, then they stay.

        Learned step by step, a bias would take thousands of rows to get from a prior to a log's rate, and whatever is
        learned meanwhile would have to make up for it.
        """
        prior = torch.tensor(_RATE_PRIOR, device=self.rated.device)
        return (self.rated[:, 1] + _RATE_STRENGTH * prior) / (self.rated[:, 0] + _RATE_STRENGTH)

    def click_rate(self) -> float:
        """That of `rates`."""
        return float(self.rates()[CLICK])

    def history_mean(self, contexts: Contexts) -> torch.Tensor:
        """The mean of the history's vectors by learned weights of kind and recency, [B, D]; zero where it is empty."""
        there = contexts.kinds > 0
        kind = self.past_kind.index_select(0, contexts.kinds.reshape(-1)).view_as(contexts.recency)
        logits = kind + contexts.recency * self.past_recency
        weights = torch.softmax(logits.masked_fill(~there, -1e9), 1) * there
        return torch.bmm(weights.unsqueeze(1), contexts.entries).squeeze(1)

    def query(self, contexts: Contexts, mean: torch.Tensor) -> torch.Tensor:
        """[B, D] whose dot product with an item's vector (item + content) is the match."""
        return contexts.user + self.from_history(mean) + self.from_query(contexts.query)

    def towers(self, contexts: Contexts, mean: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What items are retrieved by: a, b [B, D]; the affinity to an item is a · item + b · content + its numbers
        (less the matches) · `tower_numbers` + `near` · `tower_near`. mean: of `history_mean`, where it was
        made already.

        Two towers (Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys
        2019). The item's is linear, so that it can be taken over to the user's side: when it changes no item has to be
        touched.
        """
        mean = self.history_mean(contexts) if mean is None else mean
        query = self.query(contexts, mean)
        known = torch.cat((contexts.user, mean, contexts.query, contexts.moment), 1)
        a, b = self.tower(known).split(self.dim, 1)
        return query + a, query + b

    def forward(self, contexts: Contexts, items: Items, mean: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [N, heads + extra]. mean: of `history_mean`, where it was made already.

        The bias of a place is relative to the first, so what is served is the probability in the first place.
        """
        mean, ctx = self.history_mean(contexts) if mean is None else mean, items.ctx
        vector, numbers = items.item + items.content, self._numbers(items)
        match = self.query(contexts, mean).index_select(0, ctx) * vector
        x = self.from_context(torch.cat((contexts.user, mean, contexts.query), 1))
        x = x + self.from_moment(contexts.moment) + self.from_scenario(contexts.scenario)
        x = _bent(torch.addmm(x.index_select(0, ctx), *self._candidate(contexts, items, vector, numbers, match)))
        if self.settings.gates:
            x = x * self._gates(contexts).index_select(0, ctx)
        x = _bent(self.second(x))
        logits = self._tasks(x) + self.bias + match.sum(1, keepdim=True) * self.match
        return logits + nn.functional.pad(self._wide(contexts, items, numbers), (0, logits.shape[1] - PURCHASE))

    def _candidate(
        self, contexts: Contexts, items: Items, vector: torch.Tensor, numbers: torch.Tensor, match: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs [N, n], weights [n, hidden]) of the candidate's part of the first layer: one product of all, as each
        of its own would write [N, hidden] and be added."""
        inputs, layers = [items.item, items.content], [self.from_item]
        if self.settings.attention:
            attended = self._attended(contexts, vector, items.ctx)
            inputs, layers = [*inputs, attended, attended * vector], [*layers, self.from_attended]
        inputs, layers = [*inputs, numbers * _DEEP_SHARE, match], [*layers, self.from_numbers, self.from_match]
        return torch.cat(inputs, 1), torch.cat([layer.weight for layer in layers], 1).T

    def _numbers(self, items: Items) -> torch.Tensor:
        if self.settings.matches:
            return items.numbers
        return items.numbers * (torch.arange(NUMBERS, device=items.numbers.device) < NUMBERS - MATCHES)

    def _wide(self, contexts: Contexts, items: Items, numbers: torch.Tensor) -> torch.Tensor:
        """The wide part of the logits before that of purchases, [N, PURCHASE].

        What user, item and content add to the click by themselves, the first numbers of their vectors, needs no other
        weight to be right first, so it is learned from the first rows on.
        """
        wide = numbers @ self.wide + nn.functional.pad(torch.logit(self.rates()), (0, PURCHASE - RATED))
        if self.settings.neighbours:
            wide = wide + items.near @ self.wide_near
        user, item, content = self.first_order
        click = user * contexts.user[:, :1].index_select(0, items.ctx)
        click = click + item * items.item[:, :1] + content * items.content[:, :1]
        if items.position is not None:
            click = click + self.place(items.position.clamp(0, POSITIONS - 1))
        return wide + nn.functional.pad(click, (CLICK, PURCHASE - 1 - CLICK))

    def _attended(self, contexts: Contexts, vector: torch.Tensor, ctx: torch.Tensor) -> torch.Tensor:
        """For each candidate the history as it matters to it, [N, D]. Nothing is an entry too, with a logit of 0."""
        bias = self.attend_kind.index_select(0, contexts.kinds.reshape(-1)).view_as(contexts.recency)
        bias = (bias + contexts.recency * self.attend_recency).masked_fill(contexts.kinds == 0, -1e9)
        asked = self.attend(vector).unsqueeze(1)
        if len(contexts.user) == 1:
            entries, bias = contexts.entries.expand(len(ctx), -1, -1), bias.expand(len(ctx), -1)
        else:
            entries, bias = contexts.entries.index_select(0, ctx), bias.index_select(0, ctx)
        logits = torch.bmm(asked, entries.transpose(1, 2)).squeeze(1) + bias  # [N, HISTORY]
        weights = torch.softmax(nn.functional.pad(logits, (0, 1)), 1)[:, :-1]
        return torch.bmm(weights.unsqueeze(1), entries).squeeze(1)

    def _gates(self, contexts: Contexts) -> torch.Tensor:
        """2σ of a small network of what is known of the context beforehand, [B, hidden]; it does not move the user."""
        known = (self.scenario(contexts.scenario), contexts.moment, contexts.user.detach())
        return 2 * torch.sigmoid(self.gate_out(_bent(self.gate_in(torch.cat(known, 1)))))

    def _tasks(self, x: torch.Tensor) -> torch.Tensor:
        """The deep part of the logits, [N, heads]: each head of its own mixture of the experts."""
        count, heads = self.settings.experts, len(self.heads)
        experts = _bent(self.experts(x))
        if count == 1:
            return experts @ self.heads.T
        said = experts.view(len(x), count, -1) @ self.heads.T  # [N, experts, heads]: a head is linear in its mixture
        weights = torch.softmax(self.mixture(x).view(len(x), count, heads), 1)
        return (said * weights).sum(1)

    def wide_parameters(self) -> list[torch.Tensor]:
        """Those that stand for themselves (no product with others), and so learn safely at a higher rate."""
        wide, near = [self.wide, self.tower_numbers], [self.wide_near, self.tower_near]
        return [self.bias, self.first_order, self.place.weight, *wide, *near]

    def count_rates(self, target: torch.Tensor, rows_for: torch.Tensor) -> None:
        """Rows that were learned, for `rates`. target: float32 [N, heads], nan where nothing is said; rows_for: float32
        [N], how many rows each stands for."""
        short = self.rated[:, 0] < RATED_OF
        if not short.any():
            return
        said = torch.isfinite(target[:, :RATED]) & short
        counted = torch.stack((said.to(target.dtype), torch.where(said, target[:, :RATED], 0.0)), 2)
        self.rated += (rows_for[:, None, None] * counted).sum(0)

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of all weights, of `plays` and `rated` by name, float32."""
        return {name: t.detach().cpu().numpy().copy() for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets all weights. Raises UsageError where names or shapes are others: the model's settings differ."""
        own = self._tensors()
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        if shapes != {name: w.shape for name, w in weights.items()}:
            raise UsageError(
                "the stored model has other dense weights than these settings: use the settings it was made with, "
                "or an empty data directory"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))


class _Bent(torch.autograd.Function):
    """A leaky relu, x or x / 10, with its bend rounded off. Leaky: a unit that is dead for all of a stream's first
    examples would stay so. Smooth: at a bend rounding decides on which side a unit is, and two ranks drift from one.

    (1 - LEAK) / SHARPNESS · silu(SHARPNESS · x) + LEAK · x, in place where that can be: what a layer gives is larger
    than the caches, and made of five operations it costs a step as much as its products do.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return silu(SHARPNESS * x, inplace=True).mul_((1 - LEAK) / SHARPNESS).add_(x, alpha=LEAK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        sharp = SHARPNESS * x
        return torch.ops.aten.silu_backward(grad, sharp).mul_(1 - LEAK).add_(grad, alpha=LEAK)


def _bent(x: torch.Tensor) -> torch.Tensor:
    return _Bent.apply(x)


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))
