"""Why an item is where it is: what each task makes of its score, what it would lose unknown, which rules moved it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from online_model.features import HEAT_S, MATCHES, NUMBERS, RATES
from online_model.ranker import SCENARIO_COUNT, Contexts, Items
from online_model.serving.api import Explanation
from online_model.serving.explore import Page
from online_model.serving.rerank import CAP, GAP, Rules
from online_model.serving.scoring import Asked, Scored, Scorer
from online_model.serving.settings import Scoring

MOST = 100  # items of an answer that are explained: some fifteen more passes of the network
TASKS = ("click", "watch", "purchase")
_SHOWN_NEVER = (0.0,) * (RATES - 1) + (1.0,)  # `rates` of what was not counted yet
# The candidates' numbers by what they are of, and what they are where that is unknown.
_AGE = RATES + 1
_HEAT = _AGE + len(HEAT_S)
_GROUPS: dict[str, tuple[slice, float | tuple[float, ...]]] = {
    "item's counts": (slice(0, RATES), _SHOWN_NEVER), "age": (slice(RATES, _AGE), 0.0),
    "item's clicks of late": (slice(_AGE, _HEAT), 0.0),
    "category's counts": (slice(_HEAT, _HEAT + RATES), _SHOWN_NEVER),
    "seller's counts": (slice(_HEAT + RATES, _HEAT + 2 * RATES), _SHOWN_NEVER),
}  # fmt: skip


def explained(
    scorer: Scorer, asked: Asked, scored: Scored, weigh: Scoring, which: list[int], rules: list[list[str]]
) -> list[Explanation | None]:
    """Explanations of the candidates `which`, places in `scored`, None behind the first MOST; rules: what moved each.

    tasks: parts of the score; they sum to it. features: by how much the score falls where a group of features is as if
    unknown: the default row for user, item and content (category, seller and words), no history (nor what it has in
    common with the item), no query, a moment that says nothing, counts of zero, no co-clicks; the scenario against the
    mean of all four. Groups work together, so the falls do not sum to the score.
    """
    at = np.array(which[:MOST], np.int64)
    ids = scored.ids[at]
    parts = scorer.parts(scored.p[at], ids, weigh).astype(np.float64)
    falls = _falls(scorer, asked, ids, weigh)
    made: list[Explanation | None] = [
        Explanation(
            dict(zip(TASKS, parts[i].tolist(), strict=True)), {name: float(fall[i]) for name, fall in falls.items()},
            rules[i],
        )
        for i in range(len(at))
    ]  # fmt: skip
    return made + [None] * (len(which) - len(made))


def moves(page: Page, rules: Rules) -> list[list[str]]:
    """In words what put each candidate of the page in its place. rules: those of the page, before its first place.
    Candidates are places in the order of scores; places are `position`s: the first is 0."""
    ruled, held = _without_draws(rules)
    place = {candidate: at for at, candidate in enumerate(ruled)}
    said: list[list[str]] = []
    for at, (candidate, surprise) in enumerate(zip(page.shown, page.surprises, strict=True)):
        words, expected = [], place[candidate]
        if expected > candidate:
            by = " and ".join(rule for rule, whom in held.items() if whom[candidate])
            words.append(f"{by} moved it from {candidate} to {expected}")
        elif expected < candidate:
            words.append(f"moved from {candidate} to {expected}: the rules held others back")
        if surprise:
            words.append(f"explored: would have been at place {expected}")
        elif at != expected:
            words.append(f"moved from {expected} to {at}: others were explored")
        said.append(words)
    return said


def _without_draws(rules: Rules) -> tuple[list[int], dict[str, np.ndarray]]:
    """All candidates in the order of rules and scores alone; by rule whom it held back, bool [n]: who was
    forbidden where a worse one took the place."""
    order: list[int] = []
    held = {rule: np.zeros(len(rules.left), bool) for rule in (CAP, GAP)}
    for _ in rules.left:
        candidate = int(rules.may_come()[0])
        for rule, whom in held.items():
            whom[:candidate] |= (rules.left & rules.forbidden(rule))[:candidate]
        order.append(candidate)
        rules.placed(candidate)
    return order, held


def _falls(scorer: Scorer, asked: Asked, ids: np.ndarray, weigh: Scoring) -> dict[str, np.ndarray]:
    """By how much the scores fall without each group of features: float32 [n] each."""
    items = scorer.items(asked, ids)

    def score(inputs: Contexts, mean: torch.Tensor, items: Items) -> np.ndarray:
        return scorer.combined(scorer.probabilities(inputs, mean, items), ids, weigh)

    base = score(asked.inputs, asked.mean, items)
    falls = {name: base - score(*without) for name, without in _without(asked, items)}
    others = [
        score(replace(asked.inputs, scenario=torch.tensor([index])), asked.mean, items)
        for index in range(SCENARIO_COUNT)
    ]
    return falls | {"scenario": base - np.mean(others, axis=0)}


def _without(asked: Asked, items: Items) -> Iterator[tuple[str, tuple[Contexts, torch.Tensor, Items]]]:
    """The inputs without each group of features."""
    inputs, mean = asked.inputs, asked.mean
    for name in ("user", "query", "moment"):
        yield name, (replace(inputs, **{name: torch.zeros_like(getattr(inputs, name))}), mean, items)
    nothing = {name: torch.zeros_like(getattr(inputs, name)) for name in ("entries", "kinds", "recency")}
    strange = _numbers(items, slice(NUMBERS - MATCHES, NUMBERS), 0.0)
    yield "history", (replace(inputs, **nothing), torch.zeros_like(mean), strange)
    for name, field in {"item": "item", "content": "content", "co-clicks": "near"}.items():
        yield name, (inputs, mean, replace(items, **{field: torch.zeros_like(getattr(items, field))}))
    for name, (columns, unknown) in _GROUPS.items():
        yield name, (inputs, mean, _numbers(items, columns, unknown))


def _numbers(items: Items, columns: slice, unknown: float | tuple[float, ...]) -> Items:
    numbers = items.numbers.clone()
    numbers[:, columns] = torch.tensor(unknown)
    return replace(items, numbers=numbers)
