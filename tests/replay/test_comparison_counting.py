"""Popularity and item-kNN are what plain dictionaries make of the same stream."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest

from online_model.history import HISTORY, RECENT, unpack
from replay.comparison.counting import DecayedCounts, ItemKnn, Popularity, recent_items
from replay.comparison.stream import Stream
from tests.replay.comparison_logs import stream


def _short(impressions: bool) -> Stream:
    whole = stream(impressions)
    return Stream(whole.batches[:8], whole.implicit)


def test_counts_decay_through_any_number_of_rescalings() -> None:
    dice = np.random.default_rng(0)
    counts, plain = DecayedCounts(bits=14, half_life_ms=1_000), defaultdict(list)
    now = 1_700_000_000_000
    for _ in range(200):
        keys = dice.integers(-50, 50, size=20)
        ts = now + np.sort(dice.integers(1_000, size=20))
        counts.add(keys, ts)
        for key, at in zip(keys.tolist(), ts.tolist(), strict=True):
            plain[key].append(at)
        now += int(dice.integers(20_000))
        wanted = [sum(0.5 ** ((now - at) / 1_000) for at in plain[key]) for key in range(-60, 60)]
        np.testing.assert_allclose(counts.get(np.arange(-60, 60), now), wanted, rtol=1e-4, atol=1e-6)


def test_a_count_is_never_too_small_however_full_the_sketch_is() -> None:
    counts = DecayedCounts(bits=6, half_life_ms=1e12)
    keys = np.arange(300)
    counts.add(np.repeat(keys, 3), np.zeros(900, np.int64))
    assert (counts.get(keys, 0) >= 3 * 0.999).all()


@pytest.mark.parametrize("impressions", [True, False])
def test_popularity_is_that_of_plain_dictionaries(impressions: bool) -> None:
    some = _short(impressions)
    system, clicks, shown = Popularity(some), defaultdict(list), defaultdict(list)

    def count(of: dict, key: int, now: int) -> float:
        return sum(0.5 ** ((now - ts) / Popularity.HALF_LIFE_MS) for ts in of[key])

    for batch in some.batches:
        c = batch.scored.candidates
        wanted = []
        for item, ts in zip(c.item[:50].tolist(), c.ts[:50].tolist(), strict=True):
            mine = count(clicks, item, ts)
            base = (count(clicks, -1, ts) + 0.05) / (count(shown, -1, ts) + 1)
            rate = (mine + base * Popularity.PRIOR) / (count(shown, item, ts) + Popularity.PRIOR)
            wanted.append(rate if impressions else mine)
        np.testing.assert_allclose(system.score(c)[:50], wanted, rtol=1e-4, atol=1e-9)
        for item, ts, part, click in zip(
            batch.rows.item.tolist(), batch.rows.ts.tolist(), batch.rows.part, batch.rows.click, strict=True
        ):
            for of, yes in ((clicks, click == 1), (shown, part == 0)):
                if yes:
                    of[item].append(ts)
                    of[-1].append(ts)
        system.learn(batch)


def test_item_knn_is_that_of_plain_dictionaries() -> None:
    some = _short(impressions=False)
    system = ItemKnn(some)
    pairs: dict[frozenset[int], list[tuple[int, float]]] = defaultdict(list)
    clicks: dict[int, list[int]] = defaultdict(list)

    def decayed(found: list, now: int) -> float:
        return sum(w * 0.5 ** ((now - ts) / ItemKnn.HALF_LIFE_MS) for ts, w in found)

    for batch in some.batches:
        c = batch.scored.candidates
        popular = system._popular.score(c)
        wanted = []
        for at in range(min(40, len(c.item))):
            item, now = int(c.item[at]), int(c.ts[at])
            score = ItemKnn.FALLBACK * popular[at] / (1 + popular[at])
            for past, weight in _past(c.history[c.ctx[at]]):
                norm = math.sqrt(
                    decayed([(ts, 1) for ts in clicks[item]], now) * decayed([(ts, 1) for ts in clicks[past]], now)
                )
                score += weight * decayed(pairs[frozenset((item, past))], now) / (norm + ItemKnn.SHRINK)
            wanted.append(score)
        np.testing.assert_allclose(system.score(c)[:40], wanted, rtol=1e-3, atol=1e-9)
        rows = batch.rows.take(batch.rows.click == 1)
        for item, ts, history in zip(rows.item.tolist(), rows.ts.tolist(), rows.history, strict=True):
            clicks[item].append(ts)
            for past, weight in _past(history):
                pairs[frozenset((item, past))].append((ts, weight))
        system.learn(batch)
    assert len(pairs) > 300


def _past(history: np.ndarray) -> list[tuple[int, float]]:
    """(item, weight) of a user's state, each item once."""
    state = unpack(history[None])[0]
    found: dict[int, float] = {}
    for name, size in (("recent", RECENT), ("intent", HISTORY - RECENT)):
        for place in range(size):
            item = int(state[name]["item"][place])
            if item:
                found.setdefault(item, ItemKnn.NEAR**place)
    return list(found.items())


def test_recent_items_are_named_once_at_their_first_place() -> None:
    for batch in stream(impressions=False).batches[:8]:
        for row, history in zip(recent_items(batch.rows.history), batch.rows.history, strict=True):
            assert [int(item) for item in row if item] == [item for item, _ in _past(history)]
