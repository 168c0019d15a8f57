"""What was put aside comes back in order, and for work in proportion to it."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from streams import open_impressions
from streams.join_state import Changes, Numbers, Shown
from streams.open_impressions import SCANNED, OpenImpressions

USER, ITEMS = 7, 5


class _Aside:
    """A store that has all of one user's impressions, by request as the real one."""

    def __init__(self, shown: list[Shown]) -> None:
        self._shown = sorted(shown, key=lambda s: (s.request, s.number))

    def load(self, user: int, request: int | None) -> list[Shown]:
        return [s for s in self._shown if s.user == user and request in (None, s.request)]

    def order(self, first: int, end: int) -> Iterable[tuple[int, int, int, int]]:
        return [(s.number, s.ts, s.user, s.request) for s in self._shown if first <= s.number < end]


def _shown(number: int) -> Shown:
    request = random.Random(number).randrange(1 << 40)  # as hashes are: in no order
    return Shown(number, USER, request, 1_000 + number, 0, b"", ("i",), (number % ITEMS,), None, None, b"")


def _opened(count: int) -> tuple[OpenImpressions, list[Shown]]:
    shown = [_shown(number) for number in range(count)]
    impressions, numbers = OpenImpressions(Numbers(), _Aside(shown)), Numbers()
    for one in shown:
        impressions.add(one, Changes(0, numbers, numbers, {}))
    impressions.put_aside(0)
    assert impressions.examples == 0
    return impressions, shown


def test_all_that_a_user_has_aside_comes_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put in order one by one, a user with ten times as much open would take a hundred times as long."""
    moved, by_number = [], open_impressions._by_number
    monkeypatch.setattr(open_impressions, "_by_number", lambda some: moved.append(len(got := by_number(some))) or got)
    impressions, shown = _opened(1_000)
    found = impressions.find(USER, 3, None, 5_000, 0)
    assert found == shown[998]
    assert impressions.examples == 1_000
    assert sum(moved) <= 2 * len(shown)


def test_requests_that_come_back_one_by_one_are_found_in_their_order() -> None:
    """Beside what is indexed already: a user that has more than SCANNED in memory."""
    impressions, shown = _opened(4 * SCANNED)
    dice = random.Random(1)
    back = dice.sample(shown, 3 * SCANNED)
    for number, one in enumerate(back):
        assert impressions.find(USER, one.ids[0], one.request, one.ts, 0) == one
        mine = impressions._users[USER]
        here = sorted(back[: number + 1], key=lambda s: s.number)
        assert list(mine.shown) == here
        for item in range(ITEMS):
            newest = [s for s in mine.newest_first(item) if item in s.ids]
            assert newest == [s for s in reversed(here) if item in s.ids]
    changes = Changes(0, Numbers(), Numbers(next=len(shown)), {})
    impressions.put_aside(0)
    assert impressions.find(USER, 2, None, 5_000, 0) == shown[4 * SCANNED - 1 - (4 * SCANNED - 1 - 2) % ITEMS]
    for _ in shown:
        impressions.close(changes)
    assert impressions.examples == 0
