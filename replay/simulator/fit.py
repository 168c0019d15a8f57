"""The parameters of a marketplace, fitted to a log. What is fitted, and what a log cannot say: docs/simulator.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from embedding_store.errors import LogError
from replay.simulator.views import Views
from streams.events import Scenario

SESSION_GAP_MS = 30 * 60_000  # a user who comes back later than that begins a new session
QUANTILES = 101
BUCKETS = 10  # of durations, as many views in each
FEW = 50  # views below which a table of watch times is that of clicked and not clicked views together
CUT = 200  # page patterns kept


class FittedScenario(Struct, kw_only=True, frozen=True):
    """A scenario. `pages`: the positions that are filled, top first, with their share of the requests of the scenario;
    `position_odds`: log odds of a click at position 0, 1, … against the scenario's average."""

    share: float
    click_rate: float
    pages: list[tuple[list[int], float]]
    position_odds: list[float]


class FittedWatch(Struct, kw_only=True, frozen=True):
    """Watch time given duration, as D2Q has it (Zhan et al. 2022): quantiles of play / duration in each bucket of
    duration; bucket 0 is the unknown durations, with quantiles of play in ms.

    `edges`: ms, the buckets' lower ends from bucket 1 on. Indices: [not clicked, clicked][bucket][quantile].
    """

    plays: list[float]  # probability of a watch without and with a click
    edges: list[float]
    quantiles: list[list[list[float]]]


class FittedItems(Struct, kw_only=True, frozen=True):
    """Items of the log; `duration_ms` 0: not known.

    `prior`: the Beta distribution (a, b) of the items' click rates. `unseen`: how many more there are by Chao's
    estimate (1984), for `new_share` of the views are of an item that was never shown before (Good and Turing 1953).
    `deaths_per_s`: of the items that were shown more than once, how many a second leave for good.
    """

    ids: list[str | int]
    views: list[int]
    clicks: list[int]
    duration_ms: list[int]
    views_per_s: list[float]  # while it is on offer
    unseen_s: list[float]  # how long before the end of the log it was seen last
    prior: tuple[float, float]
    unseen: float
    new_share: float
    deaths_per_s: float


class FittedUsers(Struct, kw_only=True, frozen=True):
    """Users of the log, by their order in it: sessions (their activity) and shrunk click rate."""

    sessions: list[int]
    click_rate: list[float]
    prior: tuple[float, float]


class FittedActions(Struct, kw_only=True, frozen=True):
    """What follows a click: quantiles of its delay and of the purchase's (ms); rates by click."""

    click_ms: list[float]
    purchase_rate: float
    purchase_ms: list[float]
    cart_rate: float
    favourite_rate: float


class Fitted(Struct, kw_only=True, frozen=True):
    """All of it; `views`, `from_ms` and `to_ms` say what it was fitted to. JSON by `save` and `load`."""

    views: int
    from_ms: int
    to_ms: int
    requests_per_s: float
    session_lengths: list[float]
    session_gaps_s: list[float]
    click_rate: float
    scenarios: dict[Scenario, FittedScenario]
    users: FittedUsers
    items: FittedItems
    actions: FittedActions
    watch: FittedWatch | None

    def save(self, path: Path) -> None:
        """Writes JSON. LogError if it cannot."""
        try:
            path.write_bytes(msgspec.json.encode(self))
        except OSError as error:
            raise LogError(f"{path}: {error.strerror}; choose a place that can be written") from None

    @staticmethod
    def load(path: Path) -> Fitted:
        """Reads what `save` wrote. LogError if it is something else."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=Fitted)
        except OSError as error:
            raise LogError(f"{path}: {error.strerror}; name a file that was saved by a fit") from None
        except msgspec.DecodeError as error:
            raise LogError(f"{path}: not a fit ({error}); name a file that was saved by a fit") from None


def fit(views: Views) -> Fitted:
    """The parameters of the world that `views` come from. LogError if they are all of one moment."""
    span_s = (int(views.ts.max()) - int(views.ts.min())) / 1000
    if span_s <= 0:
        raise LogError("everything in this log happens at one moment: fit to a longer one")
    rate = _rate(int(views.clicked.sum()), len(views))
    sessions, lengths, gaps = _sessions(views)
    return Fitted(
        views=len(views), from_ms=int(views.ts.min()), to_ms=int(views.ts.max()),
        requests_per_s=len(np.unique(views.page)) / span_s, session_lengths=lengths, session_gaps_s=gaps,
        click_rate=rate,
        scenarios={name: _scenario(views, name) for name in sorted(set(views.scenario.tolist()))},
        users=_users(views, sessions), items=_items(views, span_s), actions=_actions(views), watch=_watch(views),
    )  # fmt: skip


def shrunk_rates(clicks: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Empirical Bayes: the posterior mean rate of each group and the Beta prior (a, b) of all, by moments (Kleinman
    1973). Where the groups differ no more than by luck, all rates are the mean."""
    total, mean = views.sum(), _rate(int(clicks.sum()), int(views.sum()))
    groups, variance = len(views), mean * (1 - mean)
    between = float((views * (clicks / views - mean) ** 2).sum())
    room = float(total - (views**2).sum() / total) - (groups - 1)
    share = (between - (groups - 1) * variance) / (variance * room) if room > 0 else 0.0
    strength = 1.0 / float(np.clip(share, 1e-6, 0.9)) - 1.0
    a, b = mean * strength, (1 - mean) * strength
    return (clicks + a) / (views + strength), (a, b)


def log_odds(rate: np.ndarray | float) -> np.ndarray:
    """float64, as `rate`."""
    rate = np.asarray(rate, np.float64)
    return np.log(rate) - np.log1p(-rate)


def _rate(clicks: int, views: int) -> float:
    """A rate that is neither 0 nor 1 (half a click added to each side)."""
    return clicks / views if 0 < clicks < views else (clicks + 0.5) / (views + 1)


def _table(values: np.ndarray) -> list[float]:
    return np.quantile(values, np.linspace(0, 1, QUANTILES)).tolist() if len(values) else []


def _scenario(views: Views, name: Scenario) -> FittedScenario:
    here = views.where(views.scenario == name)
    first = np.flatnonzero(np.diff(here.page, prepend=-1))
    patterns = Counter(tuple(page.tolist()) for page in np.split(here.position, first[1:]))
    kept = patterns.most_common(CUT)
    rate = _rate(int(here.clicked.sum()), len(here))
    shown = np.bincount(here.position)
    rates, _ = shrunk_rates(np.bincount(here.position, here.clicked)[shown > 0], shown[shown > 0])
    odds = np.zeros(len(shown))
    odds[shown > 0] = log_odds(rates) - log_odds(rate)
    return FittedScenario(
        share=len(first) / len(np.unique(views.page)), click_rate=rate, position_odds=odds.tolist(),
        pages=[(sorted(page), count / sum(c for _, c in kept)) for page, count in kept],
    )  # fmt: skip


def _sessions(views: Views) -> tuple[np.ndarray, list[float], list[float]]:
    """Sessions of each user (int64 [users]), how many requests they have, and the gaps within them (quantiles, s)."""
    _, first = np.unique(views.page, return_index=True)
    order = np.lexsort((views.ts[first], views.user[first]))
    user, ts = views.user[first][order], views.ts[first][order]
    gap = np.diff(ts, prepend=ts[0])
    new = (np.diff(user, prepend=-1) != 0) | (gap > SESSION_GAP_MS)
    starts = np.flatnonzero(new)
    lengths = np.diff(np.append(starts, len(user)))
    inside = gap[~new] / 1000
    table = np.quantile(lengths, np.linspace(0, 1, QUANTILES), method="nearest").astype(float).tolist()
    return np.bincount(user[starts], minlength=len(views.users)), table, _table(inside) or [0.0]


def _users(views: Views, sessions: np.ndarray) -> FittedUsers:
    shown = np.bincount(views.user, minlength=len(views.users))
    known = np.flatnonzero(shown)
    rates, prior = shrunk_rates(np.bincount(views.user, views.clicked, len(views.users))[known], shown[known])
    return FittedUsers(sessions=sessions[known].tolist(), click_rate=rates.tolist(), prior=prior)


def _items(views: Views, span_s: float) -> FittedItems:
    shown = np.bincount(views.item, minlength=len(views.items))
    known = np.flatnonzero(shown)
    clicks = np.bincount(views.item, views.clicked, len(views.items))
    _, prior = shrunk_rates(clicks[known], shown[known])
    deaths = _deaths(views, shown, span_s)
    first, last = np.full(len(shown), np.inf), np.full(len(shown), -np.inf)
    np.minimum.at(first, views.item, views.ts / 1000)
    np.maximum.at(last, views.item, views.ts / 1000)
    # Views spread evenly over a life reach from 1 / (n + 1) to n / (n + 1) of it.
    life = (last - first)[known] * (shown[known] + 1) / np.maximum(shown[known] - 1, 1)
    life = np.where((life > 0) & (deaths > 0) & (shown[known] > 1), np.clip(life, span_s / 100, span_s), span_s)
    duration = np.zeros(len(views.items), np.int64)
    np.maximum.at(duration, views.item, views.duration_ms)
    once, twice = int((shown == 1).sum()), int((shown == 2).sum())
    return FittedItems(
        ids=[views.items[n] for n in known.tolist()], views=shown[known].tolist(),
        clicks=clicks[known].astype(int).tolist(), duration_ms=duration[known].tolist(),
        views_per_s=(shown[known] / life).tolist(), unseen_s=(views.ts.max() / 1000 - last[known]).tolist(),
        prior=prior, unseen=once * (once - 1) / (2 * (twice + 1)), new_share=once / len(views),
        deaths_per_s=deaths,
    )  # fmt: skip


def _deaths(views: Views, shown: np.ndarray, span_s: float) -> float:
    """The hazard of exponential lives: of the items seen in the first half of the time, and more than once at all, the
    share that is seen in the second half as well is (1 - exp(-x)) / x, x = hazard · half the time."""
    late = views.ts - views.ts.min() > span_s * 500
    often = shown[views.item] > 1
    first, again = (np.unique(views.item[often & half]) for half in (~late, late))
    kept = float(np.isin(first, again).mean()) if len(first) else 1.0
    low, high = 1e-9, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle) / middle > kept else (low, middle)
    return low / (span_s / 2) if kept < 1 else 0.0


def _actions(views: Views) -> FittedActions:
    clicked = views.clicked
    bought, clicks = views.purchase_ms >= 0, max(1, int(clicked.sum()))
    return FittedActions(
        click_ms=_table(views.click_ms[clicked]) or [0.0],
        purchase_rate=float(bought.sum()) / clicks, purchase_ms=_table(views.purchase_ms[bought]) or [0.0],
        cart_rate=float((views.cart & clicked).sum()) / clicks,
        favourite_rate=float((views.favourite & clicked).sum()) / clicks,
    )  # fmt: skip


def _watch(views: Views) -> FittedWatch | None:
    played = views.play_ms >= 0
    if not played.any():
        return None
    known = views.duration_ms > 0
    lengths = views.duration_ms[played & known]
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BUCKETS + 1)[:-1])) if len(lengths) else np.array([])
    bucket = np.where(known, np.maximum(1, np.searchsorted(edges, views.duration_ms, "right")), 0)
    value = np.where(known, views.play_ms / np.maximum(views.duration_ms, 1), views.play_ms)
    tables: list[list[list[float]]] = []
    plays = []
    for clicked in (False, True):
        mine = views.clicked == clicked
        plays.append(float(played[mine].mean()) if mine.any() else 0.0)
        tables.append([])
        for n in range(len(edges) + 1):
            chosen = mine & played & (bucket == n)
            if chosen.sum() < FEW:
                chosen = played & (bucket == n)
            tables[-1].append(_table(value[chosen]) or [0.0])
    return FittedWatch(plays=plays, edges=edges.tolist(), quantiles=tables)
