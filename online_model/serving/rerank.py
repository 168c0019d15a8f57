"""What a page may look like: rules that say, place by place, which of the candidates left may come next.

A rule restricts; it never chooses. Who is chosen among those who may come is the exploration's to say, so a propensity
is that of a draw among them, and stays exact. As far as there are candidates for it: where none may come by all rules,
the category gap gives way first, then the cap of sellers. Who has no category (no seller) breaks no rule of it.
"""

from __future__ import annotations

import numpy as np

from online_model.serving.settings import Reranking

GAP, CAP = "category gap", "seller cap"
_NEVER, _NEVER_FULL = -(1 << 30), 1 << 30


class Rules:
    """The rules over one page, as it fills. `category`, `seller`: int [n] of the candidates, 0 none."""

    def __init__(self, settings: Reranking, category: np.ndarray, seller: np.ndarray) -> None:
        self._settings, self._any = settings, bool(settings.category_gap or settings.seller_cap)
        self.left = np.ones(len(category), bool)  # not placed yet
        self._categories, self._category = np.unique(category, return_inverse=True)
        self._sellers, self._seller = np.unique(seller, return_inverse=True)
        self._last = np.full(len(self._categories), _NEVER)  # the last place of a category
        self._often = np.zeros(len(self._sellers), np.int64)  # items of a seller
        self._place = 0

    def may_come(self) -> np.ndarray:
        """Which of the candidates left may take the next place: int64 [m] ascending, m ≥ 1 as long as one is left."""
        if not self._any:
            return np.flatnonzero(self.left)
        gap, cap, left = self.forbidden(GAP), self.forbidden(CAP), self.left
        for forbidden in (gap | cap, cap, gap):
            found = np.flatnonzero(left & ~forbidden)
            if len(found):
                return found
        return np.flatnonzero(left)

    def forbidden(self, rule: str) -> np.ndarray:
        """bool [n]: which candidates the rule GAP or CAP forbids in the next place."""
        if rule == GAP:
            return (self._place - self._last <= self._settings.category_gap)[self._category]
        return (self._often >= (self._settings.seller_cap or _NEVER_FULL))[self._seller]

    def placed(self, candidate: int) -> None:
        """It took the next place."""
        self.left[candidate] = False
        category, seller = self._category[candidate], self._seller[candidate]
        if self._categories[category]:
            self._last[category] = self._place
        if self._sellers[seller]:
            self._often[seller] += 1
        self._place += 1
