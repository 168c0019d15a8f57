"""Actions of users beside their rows: whatever replica serves, none is lost or counts twice, and memory is bounded."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store.columns import TableRows
from embedding_store.delta import Version
from embedding_store.errors import CorruptRecord
from online_model.features import USER
from online_model.history import EMPTY, Kind, UserHistory
from online_model.serving.live import FORGET, Coverage, LiveUsers, marks_of

ANN, BOB = 1, 2  # feature ids
FAR = 1 << 42


def act(live: LiveUsers, user: int, offset: int, ts: int, item: int = 7, kind: int = Kind.CLICK) -> None:
    live.add(user, 0, offset, ts, f"e{offset}", item, kind)


def state_of(*actions: tuple[int, int]) -> bytes:
    """Of clicks (item, ts)."""
    history = UserHistory()
    for item, ts in actions:
        history.push(item, ts, Kind.CLICK)
    return history.latest()


def version(next_: int, watermark: int, owed: int = 0, put: list[int] | None = None, whole: bool = False) -> Version:
    mark = {"handled": next_, "next": next_, "watermark": watermark, "set_aside": []}
    info = {"partitions": {"0": mark}, "owed": {"rows": owed}}
    tables = {USER: TableRows(np.array(put or [], np.int64), {})}
    return Version(1, 2, None if whole else (1, 1), info=info, tables=tables)


def covering(*versions: Version) -> Coverage:
    made = Coverage()
    for one in versions:
        made.advance(one, marks_of(one))
    return made


def test_an_action_shows_at_once_and_not_before_its_time() -> None:
    live = LiveUsers(100, 250)
    act(live, ANN, 0, 1_000)
    assert live.history(ANN, None, Coverage(), 1_000) == EMPTY
    assert live.history(ANN, None, Coverage(), 1_001) == state_of((7, 1_000))
    assert live.history(BOB, None, Coverage(), FAR) == EMPTY


@pytest.mark.parametrize(("next_", "watermark", "held"), [(1, 1_001, True), (0, 1_001, False), (1, 1_000, False)])
def test_a_row_holds_what_was_read_and_released(next_: int, watermark: int, held: bool) -> None:
    live = LiveUsers(100, 250)
    act(live, ANN, 0, 1_000)
    row = state_of((3, 500))
    expected = row if held else state_of((3, 500), (7, 1_000))
    assert live.history(ANN, row, covering(version(next_, watermark)), FAR) == expected


def test_what_was_never_joined_is_not_part_of_the_state() -> None:
    live = LiveUsers(100, 250)
    act(live, ANN, 3, 1_000)
    aside = version(9, 500)
    aside.info["partitions"]["0"]["set_aside"] = [[2, 5]]
    assert live.history(ANN, state_of((3, 400)), covering(aside), FAR) == state_of((3, 400))


def test_rows_that_are_held_back_are_not_believed_to_be_newer_than_they_are() -> None:
    live = LiveUsers(100, 250)
    act(live, ANN, 0, 1_000)
    act(live, BOB, 1, 1_000)
    row, both = state_of((3, 500)), state_of((3, 500), (7, 1_000))
    coverage = covering(version(0, 0), version(2, 2_000, owed=1, put=[ANN]))
    assert live.history(ANN, both, coverage, FAR) == both
    assert live.history(BOB, row, coverage, FAR) == both
    paid = version(3, 2_500)
    coverage.advance(paid, marks_of(paid))
    assert live.history(BOB, both, coverage, FAR) == both


def test_a_snapshot_holds_all_rows_whatever_is_owed() -> None:
    live = LiveUsers(100, 250)
    act(live, ANN, 0, 1_000)
    assert live.history(ANN, state_of((7, 1_000)), covering(version(1, 1_001, owed=5, whole=True)), FAR) == state_of(
        (7, 1_000)
    )


def test_an_older_replica_may_follow_a_newer_one() -> None:
    live = LiveUsers(100, 250)
    for offset, item in enumerate([5, 6, 7]):
        act(live, ANN, offset, 1_000 + offset, item)
    all_three = state_of((5, 1_000), (6, 1_001), (7, 1_002))
    for learned in (3, 1, 0, 2):
        row = state_of(*[(5 + i, 1_000 + i) for i in range(learned)])
        assert live.history(ANN, row, covering(version(learned, 1_000 + learned)), FAR) == all_three


def test_a_forgotten_user_starts_anew_and_leaves_nothing_behind() -> None:
    live = LiveUsers(100, 250)
    act(live, ANN, 0, 1_000, 5)
    act(live, ANN, 1, 2_000, 0, FORGET)
    assert live.history(ANN, state_of((3, 500)), Coverage(), FAR) == EMPTY
    assert len(live) == 1, "what was before is not kept"
    act(live, ANN, 2, 3_000, 6)
    act(live, ANN, 3, 1_500, 9)  # late, and from before
    assert live.history(ANN, state_of((3, 500)), Coverage(), FAR) == state_of((6, 3_000))


def test_memory_is_bounded_and_what_was_needed_is_counted() -> None:
    live = LiveUsers(10, 250)
    live.watch(lambda user, action: action.offset < 15)  # held so far
    for offset in range(25):
        act(live, offset % 3, offset, offset)
        act(live, offset % 3, offset, offset)  # twice
    assert len(live) == 10
    assert (live.dropped, live.repeated) == (0, 25)
    for offset in range(25, 30):
        act(live, offset % 3, offset, offset)
    assert (len(live), live.dropped) == (10, 5)


def test_users_without_a_row_are_kept_longest() -> None:
    live = LiveUsers(10, 250)
    live.watch(lambda user, action: None if user == ANN else True)
    act(live, ANN, 0, 1_000)
    for offset in range(1, 200):
        act(live, BOB, offset, 1_000 + offset)
    assert live.history(ANN, None, Coverage(), FAR) == state_of((7, 1_000))
    for offset in range(200, 220):
        act(live, ANN, offset, 1_000 + offset)
    assert len(live) == 15
    assert live.dropped == 21 - 15


def test_forgotten_actions_take_no_place_from_others() -> None:
    live = LiveUsers(10, 250)
    live.watch(lambda user, action: False)
    for offset in range(5):
        act(live, ANN, offset, 1_000)
    act(live, ANN, 5, 1_001, 0, FORGET)
    for offset in range(6, 15):
        act(live, BOB, offset, 1_000)
    assert (len(live), live.dropped) == (10, 0)
    act(live, BOB, 15, 1_000)
    assert (len(live), live.dropped) == (10, 1)
    assert live.history(ANN, None, Coverage(), FAR) == EMPTY


def test_a_version_that_does_not_say_where_it_is_is_refused() -> None:
    broken = version(1, 1)
    del broken.info["partitions"]["0"]["next"]
    with pytest.raises(CorruptRecord, match=r"version 1\.2 does not say how far"):
        marks_of(broken)
