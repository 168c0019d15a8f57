"""Next-item figures: where the item that was taken stands among others, scored before it is learned.

HR@K is the share of positives with rank ≤ K, NDCG@K the mean of 1 / log2(1 + rank) over those (0 for the others), MRR
the mean of 1 / rank. Ranks begin with 1; a tie takes the middle of the places it covers, so a model that scores all
alike ranks in the middle, not first.

Against a sample of the items they are other figures than against all: they are larger, and may order two models
otherwise (Krichene and Rendle, "On sampled metrics for item recommendation", KDD 2020). So they say how many were
`among`, the positive included, and whether these were a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedding_store.ids import GOLDEN, finalised
from online_model.ranker import WAYS

K = 10


class Ranking:
    """The ranks since the start, and the last `window` one by one.

    There are several ways to put items in order by which is asked for next: by the click, which is learned against what
    else was shown; by the affinity of the two towers, learned against what else is clicked; and by that times how near
    the item is to those of the history (neighbours.py): in a batch of few users most items are near to all of them, so
    little is learned there of how much that says among all items. Which of them is best hangs on the log; each positive
    is ranked in all WAYS, and what counts is the rank by the one that has gained most until then.
    """

    def __init__(self, window: int, among: int, sampled: bool = True) -> None:
        """among: items ranked each time, the positive included; sampled: whether these are not all that there are."""
        self._ranks = np.zeros(window, np.float32)
        self._sums = np.zeros(3)  # since the start: hits, gains, reciprocal ranks
        self._gained = np.zeros(len(WAYS))  # since the start: the gains of each way
        self._count = 0  # remembered or forgotten
        self._total = 0  # that the sums are of
        self._among, self._sampled = among, sampled

    @property
    def way(self) -> int:
        """The one of WAYS to go by."""
        return int(np.argmax(self._gained))

    def add(self, every: Sequence[np.ndarray]) -> None:
        """Ranks [n] by each of WAYS, from 1 on, ties in the middle."""
        ranks = every[self.way].astype(np.float32)
        self._gained += [_sums(each)[1] for each in every]
        self._sums += _sums(ranks)
        kept = ranks[-len(self._ranks) :]
        self._ranks[(self._count + len(ranks) - len(kept) + np.arange(len(kept))) % len(self._ranks)] = kept
        self._count += len(ranks)
        self._total += len(ranks)

    def metrics(self) -> dict:
        """JSON-ready: `hr_at_10`, `ndcg_at_10`, `mrr` (None where there are no ranks), `count` since the start; the
        same of the last ranks in "recent"; `among` and `sampled`; `way`, the one that is gone by now."""
        recent = self._ranks[: self._count]
        return {
            **_figures(self._sums, self._total), "among": self._among, "sampled": self._sampled,
            "way": WAYS[self.way], "recent": _figures(_sums(recent), len(recent)),
        }  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays (copies)."""
        counts = [self._count, self._total, len(self._ranks), self._among]
        return {"ranks": self._ranks[: self._count].copy(), "sums": self._sums.copy(),
                "gained": self._gained.copy(), "counts": np.array(counts, np.int64)}  # fmt: skip

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave. Ranks among another number of items are other figures: it then begins anew. With another
        window the ranks by themselves are forgotten, the totals are not."""
        count, total, window, among = (int(n) for n in state["counts"])
        if among != self._among:
            return
        self._sums[:], self._gained[:], self._total = state["sums"], state["gained"], total
        if window == len(self._ranks):
            self._count = count
            self._ranks[: len(state["ranks"])] = state["ranks"]


def ranked(row_ids: np.ndarray, one_in: int, seed: int) -> np.ndarray:
    """Which of the rows int64 [n] are ranked: one in so many, by a hash of the row and the seed. bool [n]."""
    salt = finalised(np.array([seed], np.uint64) + GOLDEN)
    return finalised(row_ids.astype(np.uint64) ^ salt) % np.uint64(one_in) == 0


def mid_ranks(positive: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The rank of each positive's score [n] among those of its others [n, m], without the positive: float32 [n]."""
    above, alike = (others > positive[:, None]).sum(1), (others == positive[:, None]).sum(1)
    return (1 + above + alike / 2).astype(np.float32)


def _sums(ranks: np.ndarray) -> np.ndarray:
    ranks = ranks.astype(np.float64)
    hit = ranks <= K
    return np.array([hit.sum(), (hit / np.log2(1 + ranks)).sum(), (1 / ranks).sum()])


def _figures(sums: np.ndarray, count: int) -> dict:
    names = (f"hr_at_{K}", f"ndcg_at_{K}", "mrr")
    return {**{name: float(s) / count if count else None for name, s in zip(names, sums, strict=True)}, "count": count}
