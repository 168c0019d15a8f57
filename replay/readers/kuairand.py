"""KuaiRand logs (Gao et al. 2022): one row is a video that was shown, with what the user did with it.

A row becomes an impression at `time_ms`, a click 1 ms later if there was one, and a watch.
- The watch is reported when the play ends, as players do: `time_ms` + `play_time_ms`. Any earlier and the system
  would know how long somebody watches before they have. It is put after the click where the play is shorter, and
  inside the 30 minutes that an impression stays open where it is longer.
- A view that stands in the file twice gets the same event ids both times (they are a hash of the columns read), so
  that the joiner counts the second as a duplicate. A row number would make two examples of one view. Rows of one
  view (user, video, time) that differ elsewhere share the request, so they are one example too.
- Nothing is said about the videos, so there are no Items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replay.readers.base import Layout, Record, TableReader, shown
from replay.readers.values import MAX_PLAY_MS, flag, millis, whole
from streams.events import Watch

LONGEST_PLAY_MS = 29 * 60_000


class KuaiRand(TableReader):
    name = "kuairand"
    about = "KuaiRand: short videos shown one by one, with clicks and how long each was watched"
    has_impressions = True
    columns = ("user_id", "video_id", "time_ms", "is_click", "play_time_ms", "duration_ms")
    layouts = (Layout(columns, delimiters=("\t", ","), header=True),)

    def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
        user, video, time_ms, is_click, play_time, duration = row
        ts, clicked = millis(time_ms), flag(is_click, "is_click")
        play, duration_ms = whole(play_time, "play_time", MAX_PLAY_MS), whole(duration, "duration", MAX_PLAY_MS)
        viewer, item, request, key = whole(user, "id"), whole(video, "id"), f"kuairand-{user}-{ts}", self.row_key(row)
        yield from shown(key, ts, viewer, item, request, clicked, scenario="video")
        yield Watch(
            event_id=f"{key}-w", ts=ts + played_for(play), user=viewer, scenario="video", request_id=request,
            item=item, play_ms=play, duration_ms=duration_ms,
        )  # fmt: skip


def played_for(play_ms: int) -> int:
    """How long after its impression a watch is reported: after the click, and while the impression is open."""
    return min(max(play_ms, 2), LONGEST_PLAY_MS)
