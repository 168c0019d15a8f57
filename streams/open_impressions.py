"""The impressions that can still be acted on: found by request or by item, and closed in the order of their times.

A user's open impressions are in memory all together or not at all. Past a cap the users that were not touched for the
longest are put aside: the store has them, and what is left in memory of them is nothing. They come back whole when one
of their events or timers does. So memory hangs on the cap, and not on how many windows are open.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace

from streams.join_state import FOREVER, Aside, Changes, Numbers, Shown

PAGE = 1024  # numbers


class OpenImpressions:
    """Those of one partition, from `numbers` on. `examples`: how many are in memory."""

    def __init__(self, numbers: Numbers, aside: Aside) -> None:
        self.numbers = replace(numbers)
        self.examples = 0
        self._aside = aside
        self._shown: dict[int, Shown] = {}  # by number
        self._users: dict[int, deque[Shown]] = {}  # by user, each by number; the last one touched is at the end
        # One impression mostly, so that is what is there; where it is several: by item, and in order.
        self._requests: dict[tuple[int, str], Shown | dict[int, Shown]] = {}  # by (user, request)
        self._newest: dict[tuple[int, int], Shown | deque[Shown]] = {}  # by (user, item)
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
                    self._index(shown)

    def add(self, shown: Shown, changes: Changes) -> None:
        """A new one, with the next number; its user was needed."""
        self.numbers.next += 1
        page = self._page(shown.number // PAGE)
        at = 2 * (shown.number % PAGE)
        page[at], page[at + 1] = shown.ts, shown.user
        changes.shown[shown.number] = shown
        changes.opened.append((shown.number, shown.ts, shown.user))
        self._index(shown)

    def get(self, number: int, user: int) -> Shown | None:
        """The impression; None if it is closed, or the user was forgotten."""
        self.need(user)
        return self._shown.get(number)

    def of_request(self, user: int, request: str) -> Shown | dict[int, Shown] | None:
        """What (user, request) has open: one impression, or several by item. The user was needed."""
        return self._requests.get((user, request))

    def find(self, user: int, item: int, request: str | None, ts: int, since: int) -> Shown | None:
        """The impression of [since, ts] that an action at `ts` is on: the request's, else the item's newest.

        The user was needed.
        """
        if request is not None:
            same = self._requests.get((user, request))
            shown = same.get(item) if isinstance(same, dict) else same
            if shown is not None and since <= shown.ts <= ts and item in shown.ids:
                return shown
        others = self._newest.get((user, item), ())
        newest_first = (others,) if isinstance(others, Shown) else reversed(others)
        shown = next((shown for shown in newest_first if shown.ts <= ts), None)
        return shown if shown is not None and shown.ts >= since else None

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
            self._remove(self._shown[number])
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
        gone = list(self._users.get(user, ()))
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
        for shown in self._users.pop(user, ()):
            del self._shown[shown.number]
            self.examples -= len(shown.ids)
            self._requests.pop((user, shown.request), None)
            for item in shown.ids:
                self._newest.pop((user, item), None)

    # --- the index ----------------------------------------------------------------------------------------------

    def _index(self, shown: Shown) -> None:
        user = shown.user
        self._shown[shown.number] = shown
        self._users.setdefault(user, deque()).append(shown)
        self.examples += len(shown.ids)
        request = (user, shown.request)
        same = self._requests.setdefault(request, shown)
        if same is not shown:
            if not isinstance(same, dict):
                self._requests[request] = same = dict.fromkeys(same.ids, same)
            same.update(dict.fromkeys(shown.ids, shown))
        newest = self._newest
        for item in shown.ids:
            others = newest.setdefault((user, item), shown)
            if others is not shown:
                if not isinstance(others, deque):
                    newest[user, item] = others = deque([others])
                others.append(shown)

    def _remove(self, shown: Shown) -> None:
        """Out of the index: the oldest one of its user."""
        user = shown.user
        del self._shown[shown.number]
        mine = self._users[user]
        mine.popleft()
        if not mine:
            del self._users[user]
        self.examples -= len(shown.ids)
        request = (user, shown.request)
        same = self._requests[request]
        if isinstance(same, dict) and len(same) > len(shown.ids):
            for item in shown.ids:
                del same[item]
        else:
            del self._requests[request]
        for item in shown.ids:
            others = self._newest[user, item]
            if isinstance(others, deque) and len(others) > 1:
                others.popleft()
            else:
                del self._newest[user, item]

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
