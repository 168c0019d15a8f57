"""What users did of late, ahead of the model: a click changes that user's next answer before anything is learned.

A user's row holds the joiner's state (history.py) as of its version's positions: an action is in it if its offset in
the partition is below `next` and its ts below `watermark` (Coverage). LiveUsers keeps the actions of the topic `events`
itself, and folds those that a row does not hold into it, in the joiner's order, with the joiner's UserHistory.

Actions are kept whether rows hold them or not, until room is needed. So the same LiveUsers serves whatever replica
comes next, newer or older, and tells users who have no row.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from embedding_store.delta import Version
from embedding_store.errors import CorruptRecord
from online_model.features import USER
from online_model.history import EMPTY, UserHistory

FORGET = 0  # in place of a Kind: from here on nothing is known of the user


class Action(NamedTuple):
    """What a user did. Sorted, actions of a partition are in the order in which the joiner handles them."""

    moment: int  # ts; where it came late, the watermark at which it came
    tie: str  # event_id; "" where it came late: then it goes before all that is held of its moment
    offset: int
    ts: int  # ms
    partition: int
    item: int  # feature id
    kind: int  # Kind, or FORGET
    event_id: str


class Mark(NamedTuple):
    """How far rows are in a partition."""

    handled: int  # offset: all below it are in them
    next: int  # offset: none from it on is
    watermark: int  # ms
    aside: tuple[tuple[int, int], ...]  # offsets [from, to) that were never joined


Marks = Mapping[int, Mark]  # by partition


def marks_of(version: Version) -> Marks:
    """Where the rows of a version are. Raises CorruptRecord."""
    try:
        return {
            int(partition): Mark(
                int(at["handled"]),
                int(at["next"]),
                int(at["watermark"]),
                tuple((int(start), int(end)) for start, end in at["set_aside"]),
            )
            for partition, at in version.info.get("partitions", {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        name = f"{version.epoch}.{version.sequence}"
        raise CorruptRecord(f"version {name} does not say how far it is in its partitions ({error!r})") from error


class Coverage:
    """Which actions the user rows of one replica hold.

    Where a budget holds rows back (`owed` in a version's info) a version speaks for the rows that it brings; for all
    others the last version does that owed nothing. So memory grows with the users that came since then, until the
    trainer's `refresh_s` are over at the latest.
    """

    def __init__(self) -> None:
        self.marks: Marks = {}
        self._of: dict[int, Marks] = {}  # user → of the last version that brought the row, where that is newer

    def advance(self, version: Version, marks: Marks) -> None:
        """The replica has applied `version`, of which `marks_of` gave `marks`."""
        owed = version.base is not None and (version.info.get("owed") or {}).get("rows", 0)
        if not owed:
            self.marks, self._of = marks, {}
        elif USER in version.tables:
            self._of.update(dict.fromkeys(version.tables[USER].ids.tolist(), marks))

    def holds(self, user: int, action: Action) -> bool:
        """Whether the user's row, if there is one, is from after `action`."""
        mark = self._of.get(user, self.marks).get(action.partition)
        if mark is None or action.offset >= mark.next:
            return False
        return action.ts < mark.watermark or any(a <= action.offset < b for a, b in mark.aside)


class LiveUsers:
    """The last actions of all users. One thread adds and asks.

    Of more than `kept` actions the oldest go first, but those of users without a row, of which nothing else knows, only
    when there are `kept` / 2 of them. `dropped` counts those that were still needed.
    """

    def __init__(self, kept: int, disorder_ms: int) -> None:
        """`disorder_ms`: the joiner's, or late actions are put in another order than its own."""
        self._kept, self._disorder_ms = kept, disorder_ms
        self._watermarks: dict[int, int] = {}
        self._users: dict[int, list[Action]] = {}
        self._queue: deque[int] = deque()  # users, once for each of their actions, as these came
        self._rowless: deque[int] = deque()  # likewise, of those who had no row when their turn was over
        self._erased: dict[int, int] = {}  # user → places in the queues whose actions are gone
        self._ids: dict[int, set[str]] = {}  # of the actions kept, by partition
        self._holds: Callable[[int, Action], bool | None] = lambda user, action: False
        self.dropped = 0
        self.repeated = 0

    def __len__(self) -> int:
        """How many actions are kept."""
        return len(self._queue) + len(self._rowless) - sum(self._erased.values())

    def watch(self, holds: Callable[[int, Action], bool | None]) -> None:
        """`holds`: of the replica that serves (`Replica.holds`): None where the user has no row."""
        self._holds = holds

    def begin(self, partition: int, watermark: int) -> None:
        """What is added of `partition` from now on came when the joiner's watermark was this one (ms)."""
        self._watermarks[partition] = max(watermark, self._watermarks.get(partition, -1))

    def passes(self, partition: int, ts: int) -> None:
        """A record of `partition` with this ts was read, after all before it."""
        if ts - self._disorder_ms > self._watermarks.get(partition, -1):
            self._watermarks[partition] = ts - self._disorder_ms

    def add(self, user: int, partition: int, offset: int, ts: int, event_id: str, item: int, kind: int) -> None:
        """A user's action was read; an event_id that is still known is left out. `user`, `item`: feature ids."""
        watermark, ids = self._watermarks.get(partition, -1), self._ids.setdefault(partition, set())
        if event_id in ids:
            self.repeated += 1
            return
        ids.add(event_id)
        late = ts < watermark
        place = (watermark, "") if late else (ts, event_id)
        action = Action(*place, offset, ts, partition, item, kind, event_id)
        if not late:
            self.passes(partition, ts)
        actions = self._users.setdefault(user, [])
        insort(actions, action)
        if kind == FORGET:
            self._erase(user, actions[: actions.index(action)])
        self._queue.append(user)
        while len(self._queue) > self._kept:
            self._let_go()

    def history(self, user: int, row: bytes | None, coverage: Coverage, now_ms: int) -> bytes:
        """The user's state as of `now_ms`: `row` (None: there is none) with the actions with ts < now_ms that it does
        not hold. It is what the joiner makes of an impression of this moment, if both have read the same."""
        actions = self._users.get(user)
        if not actions:
            return row or EMPTY
        # A row without any action came before the user's first was learned: it holds none that is known here.
        row = None if row == EMPTY else row
        state, forgotten = UserHistory(row or EMPTY), -1
        for action in actions:
            if action.ts >= now_ms:
                continue
            held = row is not None and coverage.holds(user, action)
            if action.kind == FORGET:
                forgotten = action.moment
                state = state if held else UserHistory()
            elif not held and not (action.tie == "" and action.ts <= forgotten):  # late, from before: never joined
                state.push(action.item, action.ts, action.kind)
        return state.latest()

    def figures(self) -> dict[str, int]:
        """JSON-ready."""
        return {"kept": len(self), "users": len(self._users), "dropped": self.dropped, "repeated": self.repeated}

    def _erase(self, user: int, before: list[Action]) -> None:
        """Forgets actions of a user, the first ones."""
        del self._users[user][: len(before)]
        for action in before:
            self._ids[action.partition].discard(action.event_id)
        self._erased[user] = self._erased.get(user, 0) + len(before)

    def _let_go(self) -> None:
        """Makes room for one."""
        user = self._queue.popleft()
        if self._is_empty(user):
            return
        held = self._holds(user, self._users[user][0])
        if held is None:
            self._rowless.append(user)
            if len(self._rowless) <= self._kept // 2:
                return
            user = self._rowless.popleft()
            if self._is_empty(user):
                return
            held = self._holds(user, self._users[user][0])
        self.dropped += not held
        actions = self._users[user]
        gone = actions.pop(0)
        self._ids[gone.partition].discard(gone.event_id)
        if not actions:
            del self._users[user]

    def _is_empty(self, user: int) -> bool:
        """Whether the place of `user` that was taken from a queue is one of an action that was erased."""
        left = self._erased.get(user, 0)
        if left > 1:
            self._erased[user] = left - 1
        elif left:
            del self._erased[user]
        return left > 0

