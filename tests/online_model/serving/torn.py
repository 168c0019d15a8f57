"""Reads of a replica while versions come: each must be of one version, wholly.

A version's every number, of rows and of dense weights, is made of its own sequence. All items therefore score the same,
as no other version's of the last LEVELS do. A read is one request and its answer: its candidates count as one read, not
as many. What it must say comes from a replica that was made of that version alone, and never saw another.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from embedding_store.delta import Version
from online_model.features import CARD, CATEGORY, ITEM, USER
from online_model.serving.holder import Holder
from online_model.serving.replica import Replica
from tests.online_model.serving.world import (
    DIM,
    NOW,
    cards,
    category_rows,
    dense,
    ids,
    item_rows,
    rank,
    recommend,
    replica,
    user_rows,
)

ITEMS, LEVELS = 40, 400
READS_A_VERSION = 20


@dataclass
class Torn:
    """What was seen."""

    reads: int = 0
    versions: int = 0
    swaps: int = 0  # of these, loaded as a snapshot on another thread
    mixed: int = 0  # reads that are not wholly of the version that they name


def uniform(sequence: int, dense_of: dict[str, np.ndarray], items: int = ITEMS) -> Version:
    """A version made of its sequence; three of the items come and go."""
    level = 0.2 + 0.002 * (sequence % LEVELS)
    some = items + sequence % 3
    gone = ids(ITEM, range(some, items + 3))
    return Version(
        epoch=1, sequence=sequence, base=(1, sequence - 1), created_ms=NOW,
        dense={name: np.full_like(w, level / 10) for name, w in dense_of.items()},
        tables={
            ITEM: item_rows(range(some), np.full((some, DIM), level), [0] * some, impressions=[sequence] * some),
            USER: user_rows(["u"], np.full((1, DIM), level), [[1_000 + sequence]]),  # like none of the items
            CATEGORY: category_rows([0], np.full((1, DIM), level)),
        },
        gone={ITEM: gone, CARD: gone}, blobs={CARD: cards(range(some))},
    )  # fmt: skip


def alone(version: Version) -> Replica:
    """A replica that knows this version only."""
    return replica(replace(version, base=None), epsilon=0.0)


def torn_reads(reads: int, seed: int = 0) -> Torn:
    """So many reads over a replica that versions are applied to and snapshots swapped into, at random."""
    dice, seen, sequence, weights = np.random.default_rng(seed), Torn(), 1, dense()
    holder = Holder(alone(uniform(1, weights)))
    with ThreadPoolExecutor(1) as loader:
        loading = None
        while seen.reads < reads:
            sequence += 1
            version = uniform(sequence, weights)
            if sequence % 50 == 0:
                loading = loader.submit(alone, version)  # it is made while the reads go on
            else:
                holder.apply(version)
            wanted = alone(version if loading is None else uniform(sequence - 1, weights))
            score = rank(wanted, "u", "live", [0]).items[0].score
            for _ in range(READS_A_VERSION):
                _read(holder, dice, wanted.version, score, seen)
            if loading is not None:
                holder.swap(loading.result())
                loading, seen.swaps = None, seen.swaps + 1
            seen.versions += 1
    return seen


def _read(holder: Holder, dice: np.random.Generator, version: str, score: float, seen: Torn) -> None:
    made = holder.replica
    assert isinstance(made, Replica)
    if dice.random() < 0.5:
        answer = rank(made, "u", "live", dice.choice(ITEMS, 5, replace=False).tolist())
        scores = [item.score for item in answer.items]
    else:
        shown = recommend(made, "u", "live", 5)
        answer, scores = shown, [item.score for item in shown.items]  # type: ignore[assignment]
    seen.reads += 1
    seen.mixed += answer.model_version != version or not np.allclose(scores, score, rtol=1e-5, atol=0)
