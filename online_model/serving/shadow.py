"""A second model beside the one that serves: click probabilities of both for the same items, against what was clicked.

An item counts as not clicked once WINDOW_MS of event time have passed since it was shown. The figure is the difference
of the mean log losses, shadow minus serving, an item. Items of a request hang together, so its interval is that of a
ratio of sums over requests (Cochran, Sampling Techniques, 1977, section 6.3): with d_r the sum of the differences of
request r, n_r its items, D = Σ d_r / Σ n_r and R requests, the variance is R / (R − 1) · Σ (d_r − D n_r)² / (Σ n_r)².
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

WINDOW_MS = 60_000
KEPT = 10_000  # requests
Z = 1.96  # of a normal distribution 95 % are within so many standard deviations
LEAST = 1e-7  # a probability is no nearer to 0 or 1


def log_losses(p: npt.ArrayLike, clicked: np.ndarray) -> np.ndarray:
    """Log losses float64 [n] in nats of probabilities [n] where `clicked` bool [n]."""
    clipped = np.clip(np.asarray(p, np.float64), LEAST, 1 - LEAST)
    return -np.where(clicked, np.log(clipped), np.log1p(-clipped))


class Comparison:
    """Of the last KEPT requests."""

    def __init__(self) -> None:
        self._sums: deque[tuple[int, float, float]] = deque(maxlen=KEPT)  # items, both models' summed losses

    def add(self, serving: npt.ArrayLike, shadow: npt.ArrayLike, clicked: np.ndarray) -> None:
        """A request: both models' probabilities [n] of its items, and which were clicked, bool [n]; n > 0."""
        ours, theirs = log_losses(serving, clicked).sum(), log_losses(shadow, clicked).sum()
        self._sums.append((len(clicked), float(ours), float(theirs)))

    def figures(self) -> dict[str, float | None]:
        """JSON-ready. `low`, `high`: the 95 % interval of `difference`; below 0 the shadow is better. None: too few."""
        if not self._sums:
            return dict.fromkeys(("log_loss", "shadow_log_loss", "difference", "low", "high")) | {"requests": 0}
        n, ours, theirs = np.array(self._sums).T
        items, d, requests = n.sum(), theirs - ours, len(n)
        difference = d.sum() / items
        low = high = None
        if requests > 1:
            deviation = np.sqrt(requests / (requests - 1) * np.sum((d - difference * n) ** 2)) / items
            low, high = float(difference - Z * deviation), float(difference + Z * deviation)
        return {
            "requests": requests, "log_loss": float(ours.sum() / items), "shadow_log_loss": float(theirs.sum() / items),
            "difference": float(difference), "low": low, "high": high,
        }  # fmt: skip


@dataclass(slots=True)
class _Page:
    """What was shown for a request, until its clicks are known."""

    ts: int
    places: dict[str, int]  # item → place
    serving: Sequence[float]
    shadow: Sequence[float] | None = None
    clicked: set[int] = field(default_factory=set)


class Pages:
    """Pages that wait for their clicks, at most `most` of them; then they go into `comparison`."""

    def __init__(self, most: int = 50_000) -> None:
        self.comparison = Comparison()
        self._most = most
        self._pages: OrderedDict[str, _Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def show(self, request: str, ts: int, items: Sequence[str], serving: Sequence[float]) -> bool:
        """These items were shown at `ts` (ms), with the serving model's probabilities. False: there is no room."""
        if len(self._pages) >= self._most:
            return False
        self._pages[request] = _Page(ts, {item: place for place, item in enumerate(items)}, serving)
        return True

    def score(self, request: str, shadow: Sequence[float]) -> None:
        """The shadow's probabilities of the same items."""
        if (page := self._pages.get(request)) is not None:
            page.shadow = shadow

    def click(self, request: str, item: str) -> None:
        """A click that says for which request it is."""
        page = self._pages.get(request)
        if page is not None and item in page.places:
            page.clicked.add(page.places[item])

    def moves(self, ts: int) -> int:
        """Event time has come to `ts` (ms): pages whose window is over count, how many do not for lack of a shadow."""
        lacking = 0
        while self._pages:
            page = next(iter(self._pages.values()))
            if page.ts + WINDOW_MS >= ts:
                break
            self._pages.popitem(last=False)
            if page.shadow is None:
                lacking += 1
                continue
            clicked = np.zeros(len(page.serving), bool)
            clicked[list(page.clicked)] = True
            self.comparison.add(page.serving, page.shadow, clicked)
        return lacking
