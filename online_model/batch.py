"""What a step is given: candidates of contexts, and what is learned from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from online_model.examples import Examples, Part, Source
from online_model.features import mix
from online_model.ranker import CLICK


@dataclass
class Candidates:
    """N candidates of B contexts. A context is a user in a state, at a moment, in a scenario."""

    user: np.ndarray  # int64 [B] ids
    history: np.ndarray  # uint8 [B, HISTORY_BYTES] states
    moment: np.ndarray  # int64 [B] ms UTC
    scenario: np.ndarray  # int64 [B]
    query: np.ndarray  # int64 [B, QUERY_WORDS] ids of words, 0 none
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
    as_of: np.ndarray  # int64 [N] ms UTC that the candidate's numbers are of
    target: np.ndarray  # float32 [N, heads], nan where nothing is learned
    weight: np.ndarray  # float32 [N] of all of the row's losses
    offset: np.ndarray  # float32 [N] added to the click's logit for learning alone
    impression: np.ndarray  # bool [N] of an impression: purchases may be learned from all of these
    rows_for: np.ndarray  # float32 [N] how many rows the row stands for, whatever `weight` says
    chance: float  # that of an item to be drawn as a negative …
    shown_before: int  # how many were shown so far
    shown: np.ndarray  # bool [N] … or it was shown, or clicked without that: retrieval learns from both


def batch_of(
    rows: Examples,
    target: np.ndarray,
    sampling: tuple[np.ndarray, np.ndarray],
    implicit: np.ndarray,
    drawn: np.ndarray,
    now_ms: int,
    chance: float,
    shown_before: int,
) -> Batch:
    """The rows as candidates, then the negatives drawn for those at `implicit`, in the same contexts.

    Numbers are those of the moment that the row was shown; in rows that come later (a purchase days after its click) of
    when they were complete. Else ages and counts, which only grow, would tell positives from the negatives that are
    learned meanwhile, and the model would take what is new for what nobody buys.
    """
    candidates, every, first = candidates_of(rows, implicit, drawn)
    negative = np.full((drawn.size, target.shape[1]), np.nan, np.float32)
    negative[:, CLICK] = 0
    weight, offset = sampling
    return Batch(
        now_ms=now_ms, candidates=candidates, sighting=rows.row_id[first],
        as_of=np.where(rows.part == Part.SHOWN, rows.ts, rows.closed)[every],
        example=np.append(rows.row_id, np.zeros(drawn.size, np.int64)),
        target=np.concatenate((target, negative)), weight=weight[every], offset=offset[every],
        impression=(rows.source == Source.IMPRESSION)[every], rows_for=(1 / rows.rate)[every], chance=chance,
        shown_before=shown_before, shown=np.append(rows.part == Part.SHOWN, np.zeros(drawn.size, bool)),
    )  # fmt: skip


def candidates_of(rows: Examples, implicit: np.ndarray, drawn: np.ndarray) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """(the rows as candidates, then the negatives `drawn` int64 [m, k] for those at `implicit` int64 [m], in the same
    contexts; which row each candidate came with, int64 [n + m · k]; which row each context came with, int64 [B])."""
    first, ctx = unique_contexts(rows.history, rows.user, rows.ts, rows.scenario, *rows.query.T)
    every = np.concatenate((np.arange(len(rows)), np.repeat(implicit, drawn.shape[1])))
    return Candidates(
        user=rows.user[first], history=rows.history[first], moment=rows.ts[first],
        scenario=rows.scenario[first].astype(np.int64), query=rows.query[first],
        item=np.concatenate((rows.item, drawn.ravel())),
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
