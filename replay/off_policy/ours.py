"""Headrace as a target policy: trained on the first part of a log as a direct replay would, then fixed.

Scores are the model's probabilities of a click, in the context of each decision as of its time: the history grows
over the second part of the log, the weights do not. The epsilon or the temperature of the choice makes a policy of
them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from embedding_store.ids import feature_ids
from online_model.batch import Candidates, unique_contexts
from online_model.examples import Examples, Part
from online_model.features import ITEM
from online_model.settings import TrainerSettings
from replay.comparison.ours import Model
from replay.off_policy.decisions import Decisions, Lessons
from replay.off_policy.policies import Choice, Scoring

AT_ONCE = 32_768  # candidates in one pass of the network


def headrace(
    lessons: Lessons, judged: Decisions, until_ms: int, model: TrainerSettings, choice: Choice,
    progress: Callable[[float], None],
) -> Scoring:  # fmt: skip
    """The policy after all batches that were complete before `until_ms`; `judged` are decisions from then on.

    Raises UsageError where a table of the model is too small.
    """
    import torch

    torch.set_num_threads(1)  # the last bits hang on it
    learner = Model(model)
    for number, (catalogue, rows) in enumerate(lessons.batches):
        if int(rows.closed.max()) >= until_ms:
            break
        if catalogue:
            learner.trainer.catalogue(catalogue)
        learner.learn(rows)
        progress(number / len(lessons.batches))
    return Scoring(_Scores(learner, _shown(lessons, judged), judged), choice)


def _shown(lessons: Lessons, judged: Decisions) -> Examples:
    """The rows of the decisions, in their order: they know the user's state."""
    rows = Examples.concat([rows.take(rows.part == Part.SHOWN) for _, rows in lessons.batches])
    order = np.argsort(rows.example_id, kind="stable")
    return rows.take(order[np.searchsorted(rows.example_id[order], judged.example)])


class _Scores:
    """Every item's probability of a click at decisions. What one page's decisions share is scored once."""

    def __init__(self, model: Model, shown: Examples, judged: Decisions) -> None:
        self._model, self._shown = model, shown
        self._items = feature_ids(ITEM, judged.items)
        first, self._ctx = unique_contexts(shown.history, shown.user, shown.ts, shown.scenario, *shown.query.T)
        self._first = first

    def __call__(self, rows: slice) -> np.ndarray:
        """float64 [m, A] of the decisions at `rows`."""
        contexts, of = np.unique(self._ctx[rows], return_inverse=True)
        step = max(1, AT_ONCE // len(self._items))
        scores = [self._of(contexts[start : start + step]) for start in range(0, len(contexts), step)]
        return np.concatenate(scores)[of]

    def _of(self, contexts: np.ndarray) -> np.ndarray:
        shown, at, items = self._shown, self._first[contexts], self._items
        candidates = Candidates(
            user=shown.user[at], history=shown.history[at], moment=shown.ts[at], query=shown.query[at],
            scenario=shown.scenario[at].astype(np.int64), item=np.tile(items, len(at)),
            ctx=np.repeat(np.arange(len(at)), len(items)),
            position=np.full(len(at) * len(items), -1),
        )  # fmt: skip
        return self._model.score(candidates).reshape(len(at), len(items))
