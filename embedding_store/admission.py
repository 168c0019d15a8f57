"""Which new ids get a row: all, those seen often enough, or each sighting with a probability.

An id seen once or twice, as most are in a stream without end, costs a few shared cells instead of a row. All of it is
a function of the ids, in the order they are learned, and of event time: a replay decides alike, a restart goes on from
what was committed.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

from embedding_store.ids import GOLDEN, finalised
from embedding_store.specs import RowRules

DEPTH = 4
_PAGE = 64  # cells written together
_TIME = -1  # the blob that says how often was halved; the others are pages
_MOST = 255


class CountSketch:
    """How often ids were seen: count-min with conservative update (Cormode and Muthukrishnan, J. Algorithms 2005;
    Estan and Varghese, SIGCOMM 2002), 4 rows of `cells` cells of one byte.

    An estimate is never below the true count (to 255). After N sightings it is more than e · N / cells above it with
    probability e^-4 = 1.8 % at most. With D distinct ids in it, about (1 − e^(−D / cells))^4 of them share all four
    cells with others, and may be counted too high at all: 2.4 % at D = cells / 2.
    Counts are halved, rounded down, at every multiple of `half_life_ms` of event time.
    """

    def __init__(self, cells: int, half_life_ms: int, seed: int) -> None:
        self._cells, self._half_life, self._seed = cells, half_life_ms, seed
        self._counts = np.zeros(DEPTH * cells, np.uint8)
        self._halved = 0  # event time // half-life
        self._dirty = np.zeros(len(self._counts) // _PAGE, bool)  # pages changed since `clean`

    def add(self, ids: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Distinct ids int64 [n], seen `times` int64 [n] more → how often in all, int64 [n] to 255."""
        at = np.stack([hashed(ids, self._seed + row) % np.uint64(self._cells) for row in range(DEPTH)]).astype(np.int64)
        at += np.arange(DEPTH)[:, None] * self._cells
        seen = np.minimum(self._counts[at].min(0) + times, _MOST)
        np.maximum.at(self._counts, at.ravel(), np.tile(seen.astype(np.uint8), DEPTH))
        self._dirty[at.ravel() // _PAGE] = True
        return seen

    def advance(self, now_ms: int) -> None:
        """Event time is `now_ms`; it never goes back."""
        halvings = now_ms // self._half_life - self._halved
        self._halved += halvings
        if halvings <= 0:  # fewer than none: the settings gave a shorter half-life before
            return
        self._dirty |= self._counts.reshape(-1, _PAGE).any(1)
        self._counts >>= min(halvings, 8 - 1)  # a byte cannot be shifted by more …
        if halvings > 8 - 1:
            self._counts[:] = 0  # … and is nothing then

    def changed(self) -> dict[int, bytes]:
        """What `load` wants, as far as it changed since `clean`."""
        pages = self._counts.reshape(-1, _PAGE)
        found = {int(page): pages[page].tobytes() for page in np.flatnonzero(self._dirty)}
        return found | {_TIME: msgspec.msgpack.encode(self._halved)} if found else {}

    def clean(self) -> None:
        """All of `changed` is written."""
        self._dirty[:] = False

    def load(self, blobs: Iterable[tuple[int, bytes]]) -> None:
        """All that was ever `changed`, the newest of each."""
        pages = self._counts.reshape(-1, _PAGE)
        for page, raw in blobs:
            if page == _TIME:
                self._halved = msgspec.msgpack.decode(raw, type=int)
            else:
                pages[page] = np.frombuffer(raw, np.uint8)


class Admission:
    """The rule of one table. `sketch`: None where the rule counts nothing."""

    def __init__(self, rules: RowRules) -> None:
        self._rules = rules
        counts = rules.admit_after > 1
        self.all = not counts and rules.admit_share == 1  # every id is admitted
        self.sketch = CountSketch(rules.admit_cells, rules.admit_half_life_ms, rules.admit_seed) if counts else None

    def admitted(self, ids: np.ndarray, examples: np.ndarray | None) -> np.ndarray:
        """Which of the ids int64 [n] (may repeat, each a sighting, none has a row) get one: distinct, ascending.

        examples: int64 [n] the example of each sighting, 0: it counts for none (a sampled negative). Where they are
        not given an id has one draw, however often it is seen. Not for a rule that admits all.
        """
        if examples is not None:
            ids, examples = ids[examples != 0], examples[examples != 0]
        if self.sketch is not None:
            distinct, times = np.unique(ids, return_counts=True)
            return distinct[self.sketch.add(distinct, times) >= self._rules.admit_after]
        salt = np.zeros_like(ids) if examples is None else examples
        drawn = hashed(ids ^ hashed(salt, ~self._rules.admit_seed).view(np.int64), self._rules.admit_seed)
        return np.unique(ids[drawn < np.uint64(self._rules.admit_share * 2.0**64)])


def hashed(ids: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n] → uint64 [n]: splitmix64's finaliser (Steele et al., OOPSLA 2014), twice; alike on every machine."""
    x = ids.astype(np.uint64)
    with np.errstate(over="ignore"):
        for salt in (np.uint64(seed % (1 << 64)), np.uint64(0)):
            x = finalised((x ^ salt) + GOLDEN)
    return x
