"""Items like one: those clicked with it, and those whose vectors point where its own does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from embedding_store.ids import feature_id
from online_model.features import CATEGORY, ITEM, SELLER
from online_model.history import HISTORY
from online_model.serving.candidates import Query, Source
from online_model.serving.errors import UnknownItem
from online_model.serving.state import State


@dataclass
class Pairs:
    """n items beside the one that was asked about, the most similar first."""

    slots: np.ndarray  # int64 [n] of their cards
    together: np.ndarray  # float32 [n] how often both are clicked by one user, one after the other (neighbours.py)
    alike: np.ndarray  # float32 [n] the cosine of both vectors


def alike(state: State, index: Source, item: str | int, k: int, now_ms: int) -> Pairs:
    """At most k available items by the sum of both similarities, never `item` itself. Raises UnknownItem.

    Candidates are what the index finds for the item's own vector, and the neighbours that its row keeps.
    """
    own = np.array([feature_id(ITEM, item)], np.int64)
    row, slot = state.items.find(own), state.cards.find(own)
    if not row[0] and not slot[0]:
        raise UnknownItem(f"item {str(item)[:100]!r} is neither in the catalogue nor known to the model")
    vector = _vector(state, row, slot)
    past = np.zeros((1, HISTORY), np.int64)
    past[0, 0] = own[0]
    found = index.candidates(Query(vector, vector, past, now_ms, prior=0.0))
    ids = np.unique(np.concatenate((found, state.items.columns["neighbours"][row[0]])))
    slots = state.cards.find(ids)
    there = state.cards.available[slots] & (ids != own[0])
    ids, slots = ids[there], slots[there]
    together = state.similar(past, ids, now_ms)
    cosine = _cosine(torch.add(*state.vectors(state.items.find(ids))).numpy(), vector)
    best = np.argsort(-(together + cosine), kind="stable")[:k]
    return Pairs(slots[best], together[best], cosine[best])


def _vector(state: State, row: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """float32 [D] of the item, out of its card where it has no row."""
    item, content = state.vectors(row)
    if not row[0]:
        groups = {CATEGORY: (state.cards.categories, state.cards.category),
                  SELLER: (state.cards.sellers, state.cards.seller)}  # fmt: skip
        for table, (group, codes) in groups.items():
            content += state.tables[table].gather(state.tables[table].find(group.ids(codes[slot])))
    return (item + content)[0].numpy()


def _cosine(vectors: np.ndarray, to: np.ndarray) -> np.ndarray:
    """float32 [n] of vectors [n, D]; 0 where one of the two is zero."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(to)
    return np.divide(vectors @ to, lengths, out=np.zeros(len(vectors), np.float32), where=lengths > 0)
