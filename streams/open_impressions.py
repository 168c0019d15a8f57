"""The impressions that can still be acted on: found by request or by item, and closed in the order of their times.

A user's open impressions are in memory all together or not at all. Past a cap the users that were not touched for the
longest are put aside: the store has them, and what is left in memory of them is nothing. They come back whole when one
of their events or timers does. So memory hangs on the cap, and not on how many windows are open.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from streams.join_state import FOREVER, Aside, Changes, Numbers, Shown

PAGE = 1024  # numbers
SCANNED = 16  # impressions of a user are looked through one by one, more are indexed


class _Mine:
    """What one user has open, by number. Where it is much, there is an index of it."""

    __slots__ = ("_items", "_requests", "shown")

    def __init__(self) -> None:
        self.shown: deque[Shown] = deque()
        self._items: dict[int, deque[Shown]] | None = None  # by item, each by number
        self._requests: dict[int, deque[Shown]] = {}

    def add(self, shown: Shown) -> None:
        self.shown.append(shown)
        if self._items is not None:
            self._put(shown)

    def close(self) -> Shown:
        """Takes out the oldest."""
        shown = self.shown.popleft()
        items, requests = self._items, self._requests
        if items is not None:
            for item in shown.ids:
                items[item].popleft()
                if not items[item]:
                    del items[item]
            requests[shown.request].popleft()
            if not requests[shown.request]:
                del requests[shown.request]
        return shown

    def newest_first(self, item: int) -> Iterator[Shown]:
        """Those that have the item, and perhaps others."""
        if len(self.shown) <= SCANNED:
            return reversed(self.shown)
        return reversed(self._index()[0].get(item, ()))

    def of_request(self, request: int) -> Iterable[Shown]:
        if len(self.shown) <= SCANNED:
            return [shown for shown in self.shown if shown.request == request]
        return self._index()[1].get(request, ())

    def _index(self) -> tuple[dict[int, deque[Shown]], dict[int, deque[Shown]]]:
        if self._items is None:
            self._items = {}
            for shown in self.shown:
                self._put(shown)
        return self._items, self._requests

    def _put(self, shown: Shown) -> None:
        assert self._items is not None
        for item in shown.ids:
            self._items.setdefault(item, deque()).append(shown)
        self._requests.setdefault(shown.request, deque()).append(shown)


class OpenImpressions:
    """Those of one partition, from `numbers` on. `examples`: how many are in memory."""

    def __init__(self, numbers: Numbers, aside: Aside) -> None:
        self.numbers = replace(numbers)
        self.examples = 0
        self._aside = aside
        self._shown: dict[int, Shown] = {}  # by number
        self._users: dict[int, _Mine] = {}  # the last one touched is at the end
        self._pages: dict[int, array[int]] = {}  # number // PAGE → ts and user of each number
        self._forgotten: set[int] = set()  # numbers of impressions that are gone before their time

    def need(self, user: int) -> None:
        """From here on all that the user has open is in memory, until the next `put_aside`."""
        mine = self._users.pop(user, None)
        if mine is not None:
            self._users[user] = mine
        elif self.numbers.next - self.numbers.first > len(self._shown):
            for shown in self._aside.load(user):
                # The store has it as of the last commit.
                if shown.number >= self.numbers.first and shown.number not in self._forgotten:
                    self._add(shown)

    def add(self, shown: Shown, changes: Changes) -> None:
        """A new one, with the next number; its user was needed."""
        self.numbers.next += 1
        page = self._page(shown.number // PAGE)
        at = 2 * (shown.number % PAGE)
        page[at], page[at + 1] = shown.ts, shown.user
        changes.shown[shown.number] = shown
        changes.opened.append((shown.number, shown.ts, shown.user))
        self._add(shown)

    def get(self, number: int, user: int) -> Shown | None:
        """The impression; None if it is closed, or the user was forgotten."""
        self.need(user)
        return self._shown.get(number)

    def items_of(self, user: int, request: int, since: int) -> list[int]:
        """The items that (user, request) has open from impressions not older than `since`. The user was needed."""
        mine = self._users.get(user)
        if mine is None:
            return []
        return [item for shown in mine.of_request(request) if shown.ts >= since for item in shown.ids]

    def find(self, user: int, item: int, request: int | None, ts: int, since: int) -> Shown | None:
        """The impression of [since, ts] that an action at `ts` is on: the request's, else the item's newest.

        The user was needed.
        """
        mine = self._users.get(user)
        newest = None
        for shown in () if mine is None else mine.newest_first(item):
            if shown.ts < since:
                break
            if shown.ts <= ts and item in shown.ids:
                if request is None or shown.request == request:
                    return shown
                newest = newest or shown
        return newest

    # --- time ---------------------------------------------------------------------------------------------------

    def next_wait(self) -> int:
        """The ts of the first impression that waits, FOREVER if none does."""
        return self._ts(self.numbers.waiting)

    def next_end(self) -> int:
        """The ts of the first impression that is not closed, FOREVER if all are."""
        return self._ts(self.numbers.first)

    def end_wait(self) -> Shown | None:
        """The first impression that waits does no more. None if its user was forgotten."""
        number = self.numbers.waiting
        self.numbers.waiting += 1
        return self._shown.get(number) or self.get(number, self._user(number))

    def close(self, changes: Changes) -> None:
        """Closes the first impression that is not closed."""
        number = self.numbers.first
        self.numbers.first += 1
        user = self._user(number)
        if number in self._shown:
            mine = self._users[user]
            self.examples -= len(mine.close().ids)
            del self._shown[number]
            if not mine.shown:
                del self._users[user]
        self._forgotten.discard(number)
        changes.shown.pop(number, None)
        if number < changes.before.next:
            changes.closed.append((user, number))
        if self.numbers.first % PAGE == 0:
            self._pages.pop(number // PAGE, None)

    # --- forgetting and putting aside ---------------------------------------------------------------------------

    def forget(self, user: int, changes: Changes) -> list[Shown]:
        """Forgets all that the user has open, and returns it. Their numbers are closed when their time comes."""
        self.need(user)
        mine = self._users.get(user)
        gone = [] if mine is None else list(mine.shown)
        if gone:
            self._drop(user)
        for shown in gone:
            self._forgotten.add(shown.number)
            changes.shown.pop(shown.number, None)
            if shown.number < changes.before.next:
                changes.closed.append((user, shown.number))
        return gone

    def put_aside(self, cap: int) -> None:
        """The store has everything as it is: at most `cap` examples need stay in memory."""
        for user in list(self._users) if self.examples > cap else ():
            if self.examples <= cap:
                break
            self._drop(user)
        near = {number // PAGE for number in (self.numbers.first, self.numbers.waiting, self.numbers.next)}
        for page in self._pages.keys() - near:
            del self._pages[page]

    def _drop(self, user: int) -> None:
        for shown in self._users.pop(user).shown:
            del self._shown[shown.number]
            self.examples -= len(shown.ids)

    def _add(self, shown: Shown) -> None:
        self._shown[shown.number] = shown
        mine = self._users.get(shown.user)
        if mine is None:
            mine = self._users[shown.user] = _Mine()
        mine.add(shown)
        self.examples += len(shown.ids)

    def _ts(self, number: int) -> int:
        return FOREVER if number >= self.numbers.next else self._page(number // PAGE)[2 * (number % PAGE)]

    def _user(self, number: int) -> int:
        return self._page(number // PAGE)[2 * (number % PAGE) + 1]

    def _page(self, index: int) -> array[int]:
        page = self._pages.get(index)
        if page is None:
            page = self._pages[index] = array("q", bytes(16 * PAGE))
            for number, ts, user in self._aside.order(index * PAGE, (index + 1) * PAGE):
                at = 2 * (number % PAGE)
                page[at], page[at + 1] = ts, user
        return page
