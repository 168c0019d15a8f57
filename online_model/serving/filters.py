"""Which items a request may be answered with: made once for all cards, so that no source starves behind a filter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedding_store.ids import feature_ids
from online_model.features import ITEM
from online_model.serving.api import Filters
from online_model.serving.state import SLOT, State


@dataclass(frozen=True)
class Allowed:
    """What the filters let through."""

    slots: np.ndarray  # bool by slot of the catalogue
    rows: np.ndarray  # bool [state.items.end] by item row


def allowed(state: State, filters: Filters, seen: np.ndarray) -> Allowed | None:
    """None: all that is available, as without filters. seen: int64 ids of the user's history, 0 none."""
    seen = seen if filters.unseen else seen[:0]
    if filters.in_stock and not (len(seen) or filters.categories or filters.region or filters.blocked):
        return None
    cards = state.cards
    slots = (cards.available if filters.in_stock else cards.listed).copy()
    if filters.categories:
        slots &= cards.categories.among(filters.categories)[cards.category]
    if filters.region:
        slots &= cards.places.sold_in(filters.region)[cards.regions]
    blocked = feature_ids(ITEM, filters.blocked)
    slots[cards.find(np.concatenate((blocked, seen)))] = False
    return Allowed(slots, slots[state.items.used(SLOT)])
