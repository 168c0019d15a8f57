"""The impressions that can still be acted on: found by request or by item, and closed in the order of their times.

All that is open of one (user, request) is in memory together or not at all. Past a cap the users that were not
touched for the longest are put aside: the store has them, and what is left in memory of them is nothing. What is asked
for comes back alone, a user as a whole only if an action does not say its request. So memory hangs on the cap, and not
on how many windows are open.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter

from streams.join_state import FOREVER, Aside, Changes, Numbers, Shown

PAGE = 1024  # numbers
SCANNED = 16  # impressions of a user are looked through one by one, more are indexed


class _Mine:
    """What is in memory of what one user has open, by number. Where it is much, there is an index of it."""

    __slots__ = ("_items", "_requests", "shown", "whole")

    def __init__(self) -> None:
        self.shown: deque[Shown] = deque()
        self.whole = False  # the store has nothing of the user that is not here
        self._items: dict[int, deque[Shown]] | None = None  # by item, each by number
        self._requests: dict[int, deque[Shown]] = {}

    def add(self, shown: Shown) -> None:
        """A new one."""
        self.shown.append(shown)
        if self._items is not None:
            self._put(self._items, shown)

    def bring_back(self, back: list[Shown]) -> None:
        """Some that were put aside. All at once: each alone would put all in order that are here."""
        self.shown = _by_number((*self.shown, *back))
        if self._items is None:
            return
        for shown in back:
            self._put(self._items, shown)
        for item in {item for shown in back for item in shown.ids}:
            self._items[item] = _by_number(self._items[item])
        for request in {shown.request for shown in back}:
            self._requests[request] = _by_number(self._requests[request])

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

    def of_request(self, request: int) -> Sequence[Shown]:
        """Those of the request, by number."""
        if len(self.shown) <= SCANNED:
            return [shown for shown in self.shown if shown.request == request]
        return self._index()[1].get(request, ())

    def _index(self) -> tuple[dict[int, deque[Shown]], dict[int, deque[Shown]]]:
        if self._items is None:
            self._items = {}
            for shown in self.shown:
                self._put(self._items, shown)
        return self._items, self._requests

    def _put(self, items: dict[int, deque[Shown]], shown: Shown) -> None:
        for item in shown.ids:
            items.setdefault(item, deque()).append(shown)
        self._requests.setdefault(shown.request, deque()).append(shown)


def _by_number(shown: Iterable[Shown]) -> deque[Shown]:
    return deque(sorted(shown, key=attrgetter("number")))


class OpenImpressions:
    """Those of one partition, from `numbers` on. `examples`: how many are in memory."""

    def __init__(self, numbers: Numbers, aside: Aside) -> None:
        self.numbers = replace(numbers)
        self.examples = 0
        self._aside = aside
        self._shown: dict[int, Shown] = {}  # by number
        self._users: dict[int, _Mine] = {}  # the last one touched is at the end
        self._pages: dict[int, array[int]] = {}  # number // PAGE → ts, user and request of each number
        self._forgotten: set[int] = set()  # numbers of impressions that are gone before their time

    def items_of(self, user: int, request: int, since: int) -> list[int]:
        """The items that (user, request) has open from impressions not older than `since`."""
        return [item for shown in self._of(user, request) if shown.ts >= since for item in shown.ids]

    def add(self, shown: Shown, changes: Changes) -> None:
        """A new one, with the next number, after `items_of` its user and request."""
        self.numbers.next += 1
        page = self._page(shown.number // PAGE)
        at = 3 * (shown.number % PAGE)
        page[at], page[at + 1], page[at + 2] = shown.ts, shown.user, shown.request
        changes.shown[shown.number] = shown
        changes.opened.append((shown.number, shown.ts, shown.user, shown.request))
        self._note((shown,))
        self._mine(shown.user).add(shown)

    def get(self, number: int, user: int, request: int) -> Shown | None:
        """The impression; None if it is closed, or the user was forgotten."""
        return self._shown.get(number) or next((s for s in self._of(user, request) if s.number == number), None)

    def find(self, user: int, item: int, request: int | None, ts: int, since: int) -> Shown | None:
        """The impression of [since, ts] that an action at `ts` is on: the request's, else the item's newest."""
        if request is not None:
            for shown in reversed(self._of(user, request)):
                if since <= shown.ts <= ts and item in shown.ids:
                    return shown
        mine = self._whole(user)
        for shown in () if mine is None else mine.newest_first(item):
            if shown.ts < since:
                break
            if shown.ts <= ts and item in shown.ids:
                return shown
        return None

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
        return self._shown.get(number) or self.get(number, *self._named(number))

    def close(self, changes: Changes) -> None:
        """Closes the first impression that is not closed."""
        number = self.numbers.first
        self.numbers.first += 1
        user, request = self._named(number)
        if number in self._shown:
            mine = self._users[user]
            self.examples -= len(mine.close().ids)
            del self._shown[number]
            if not mine.shown:
                del self._users[user]
        self._forgotten.discard(number)
        changes.shown.pop(number, None)
        if number < changes.before.next:
            changes.closed.append((user, request, number))
        if self.numbers.first % PAGE == 0:
            self._pages.pop(number // PAGE, None)

    # --- forgetting and putting aside ---------------------------------------------------------------------------

    def forget(self, user: int, changes: Changes) -> list[Shown]:
        """Forgets all that the user has open, and returns it. Their numbers are closed when their time comes."""
        mine = self._whole(user)
        gone = [] if mine is None else list(mine.shown)
        if gone:
            self._drop(user)
        for shown in gone:
            self._forgotten.add(shown.number)
            changes.shown.pop(shown.number, None)
            if shown.number < changes.before.next:
                changes.closed.append((user, shown.request, shown.number))
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

    def _of(self, user: int, request: int) -> Sequence[Shown]:
        """What (user, request) has open, by number. It stays in memory until the next `put_aside`."""
        mine = self._users.pop(user, None)
        if mine is not None:
            self._users[user] = mine
            found = mine.of_request(request)
            if found or mine.whole:
                return found
        if self._load(user, request):
            return self._users[user].of_request(request)
        return ()

    def _whole(self, user: int) -> _Mine | None:
        """All that the user has open is in memory, until the next `put_aside`."""
        mine = self._users.pop(user, None)
        if mine is not None:
            self._users[user] = mine
        if mine is None or not mine.whole:
            self._load(user)
            mine = self._users.get(user)
            if mine is not None:
                mine.whole = True
        return mine

    def _load(self, user: int, request: int | None = None) -> bool:
        """Brings back what was put aside, as the store has it since the last commit. Whether there was any."""
        if self.numbers.next - self.numbers.first <= len(self._shown) + len(self._forgotten):
            return False
        first, here, gone = self.numbers.first, self._shown, self._forgotten
        stored = self._aside.load(user, request)
        back = [s for s in stored if s.number >= first and s.number not in here and s.number not in gone]
        if not back:
            return False
        self._note(back)
        self._mine(user).bring_back(back)
        return True

    def _drop(self, user: int) -> None:
        for shown in self._users.pop(user).shown:
            del self._shown[shown.number]
            self.examples -= len(shown.ids)

    def _note(self, come: Iterable[Shown]) -> None:
        for shown in come:
            self._shown[shown.number] = shown
            self.examples += len(shown.ids)

    def _mine(self, user: int) -> _Mine:
        mine = self._users.get(user)
        if mine is None:
            mine = self._users[user] = _Mine()
        return mine

    def _ts(self, number: int) -> int:
        return FOREVER if number >= self.numbers.next else self._page(number // PAGE)[3 * (number % PAGE)]

    def _named(self, number: int) -> tuple[int, int]:
        """User and request."""
        page, at = self._page(number // PAGE), 3 * (number % PAGE)
        return page[at + 1], page[at + 2]

    def _page(self, index: int) -> array[int]:
        page = self._pages.get(index)
        if page is None:
            page = self._pages[index] = array("q", bytes(24 * PAGE))
            for number, *rest in self._aside.order(index * PAGE, (index + 1) * PAGE):
                at = 3 * (number % PAGE)
                page[at : at + 3] = array("q", rest)
        return page
