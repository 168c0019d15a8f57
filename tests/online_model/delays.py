"""A stream of clicks whose purchases come late, with everything about it known: how likely, and how late.

Truth does not drift. A click of one of KINDS kinds of items leads to a purchase with probability CHANCE[kind] (inside
the window); its delay is exponential with a mean that depends on the kind, cut at the window: kinds that are bought
often are bought late. Rows are made under the joiner's contract (online_model/examples.py) for a given wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedding_store.ids import feature_id
from online_model.examples import QUERY_WORDS, Examples, Part, Source, example_id, request_name, row_id
from online_model.history import EMPTY, as_array

START = 1_700_000_000_000  # ms UTC
HOUR = 3_600_000
WINDOW = 72 * HOUR
KINDS = 6
CHANCE = np.array([0.05, 0.10, 0.15, 0.22, 0.30, 0.40])
MEAN_DELAY = np.array([2, 4, 8, 16, 32, 48]) * HOUR  # before it is cut at the window


@dataclass
class Clicks:
    """n clicks in the order of time."""

    ts: np.ndarray  # int64 [n]
    user: np.ndarray  # int64 [n] number
    kind: np.ndarray  # int64 [n]
    delay: np.ndarray  # int64 [n] ms from the click to the purchase, -1: never

    @property
    def chance(self) -> np.ndarray:
        """The true probability of a purchase, float64 [n]."""
        return CHANCE[self.kind]


def make_clicks(n: int, windows: float, seed: int, users: int = 50) -> Clicks:
    """n clicks spread evenly over so many purchase windows."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(KINDS, size=n)
    bought = rng.random(n) < CHANCE[kind]
    mean = MEAN_DELAY[kind]
    # The inverse of the exponential's distribution, cut at the window.
    delay = -mean * np.log1p(-rng.random(n) * -np.expm1(-WINDOW / mean))
    ts = START + np.sort(rng.integers(int(windows * WINDOW), size=n))
    return Clicks(ts, rng.integers(users, size=n), kind, np.where(bought, delay.astype(np.int64), -1))


def make_rows(clicks: Clicks, wait_ms: int) -> Examples:
    """The joiner's rows of these clicks with `purchase_wait_ms` = wait_ms, in the order in which they come."""
    n, delay = len(clicks.ts), clicks.delay
    all_, bought = np.arange(n), np.flatnonzero(delay >= 0)
    first = _part(clicks, all_, Part.SHOWN, click=1, purchase=-1 if wait_ms else 0)
    late = _part(clicks, bought, Part.PURCHASE, purchase=1)
    late.closed, late.delay_ms = clicks.ts[bought] + delay[bought], delay[bought]
    parts = [first, late]
    if wait_ms:
        slow = np.flatnonzero((delay < 0) | (delay > wait_ms))
        no = _part(clicks, slow, Part.NOT_BOUGHT, purchase=0)
        no.closed = clicks.ts[slow] + wait_ms
        parts.append(no)
    rows = Examples.concat(parts)
    return rows.take(np.lexsort((rows.part, rows.example_id, rows.closed)))


def _part(clicks: Clicks, which: np.ndarray, part: Part, click: int = -1, purchase: int = -1) -> Examples:
    n = len(which)
    items = np.array([feature_id("item", k) for k in range(KINDS)], np.int64)
    users = np.array([feature_id("user", u) for u in range(int(clicks.user.max()) + 1)], np.int64)
    keys = [example_id(request_name(int(i)), feature_id("item", int(clicks.kind[i]))) for i in which]
    return Examples(
        row_id=np.array([row_id(k, part) for k in keys], np.int64),
        example_id=np.array(keys, np.int64),
        part=np.full(n, part, np.uint8), source=np.full(n, Source.IMPRESSION, np.uint8),
        ts=clicks.ts[which], closed=clicks.ts[which].copy(), user=users[clicks.user[which]],
        item=items[clicks.kind[which]], scenario=np.zeros(n, np.uint8), position=np.full(n, -1, np.int16),
        propensity=np.full(n, np.nan, np.float32), rate=np.ones(n, np.float32),
        click=np.full(n, click, np.int8), purchase=np.full(n, purchase, np.int8),
        play_ms=np.full(n, -1, np.int64), duration_ms=np.full(n, -1, np.int64), delay_ms=np.full(n, -1, np.int64),
        query=np.zeros((n, QUERY_WORDS), np.int64),
        history=as_array([EMPTY] * n), item_raw=np.array([str(k) for k in clicks.kind[which]], object),
    )  # fmt: skip
