"""A user's state from the list of actions, each counted by itself: `UserHistory` and the joiner are held to it."""

from __future__ import annotations

import numpy as np

from online_model.history import HISTORY_DTYPE

KINDS = {"click": 1, "watch": 2, "cart": 3, "favourite": 4, "purchase": 5}
COUNTERS = {"click": 0, "watch": 1, "cart": 2, "favourite": 2, "purchase": 3}
PANES_S = [15 * 60, 6 * 3600, 42 * 3600]  # a quarter of an hour, of a day, of a week


def plain_state(actions: list[tuple[int, int, str]]) -> np.ndarray:
    """uint8 [HISTORY_BYTES] of actions (item, ts in ms, kind) in the order they came."""
    state = np.zeros((), HISTORY_DTYPE)
    seconds = [min(ts // 1000, 2**32 - 1) for _, ts, _ in actions]
    for name, size, kinds in (("recent", 14, ("click", "watch")), ("intent", 6, ("cart", "favourite", "purchase"))):
        entries: list[tuple[int, int, int]] = []
        for (item, _, kind), second in zip(actions, seconds, strict=True):
            same = entries and (entries[-1][0], entries[-1][2]) == (item, KINDS[kind])
            if kind in kinds and not same:
                entries.append((item, second, KINDS[kind]))
        for place, entry in enumerate(entries[::-1][:size]):
            state[name][place] = entry
    newest = max(seconds, default=0)
    state["newest"] = newest
    for horizon, width in enumerate(PANES_S):
        for (_, _, kind), second in zip(actions, seconds, strict=True):
            pane = second // width
            if newest // width - 4 < pane:
                at = horizon, pane % 4, COUNTERS[kind]
                state["counts"][at] = min(int(state["counts"][at]) + 1, 65_535)
    return np.frombuffer(state.tobytes(), np.uint8)
