"""KuaiRand logs (Gao et al. 2022): one row is a video that was shown, with what the user did with it.

A row becomes an impression at `time_ms`, a click 1 ms later if there was one, and a watch.
- The log has one time only. The click must come after its impression, and features see strictly smaller times, so
  it is put 1 ms later: the least that orders them.
- The watch is reported when the play ends, as players do: `time_ms` + `play_time_ms`. Any earlier and the system
  would know how long somebody watches before they have. It is put after the click where the play is shorter, and
  inside the 30 minutes that an impression stays open where it is longer.
- A row that stands in the file twice, character by character, gets the same event ids both times (they are a hash of
  the row), so that the joiner counts the second as a duplicate. A row number would make two examples of one view.
  Rows of one view (user, video, time) that differ elsewhere share the request, so they are one example too.
- Nothing is said about the videos, so there are no Items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from replay.readers.base import BadRow, DelimitedReader, Record, millis, whole
from streams.events import Click, Impression, Watch

LONGEST_PLAY_MS = 29 * 60_000
MAX_PLAY_MS = 1 << 40  # of the record's own field


class KuaiRand(DelimitedReader):
    name = "kuairand"
    has_impressions = True
    delimiters = "\t,"
    header = True
    columns = ("user_id", "video_id", "time_ms", "is_click", "play_time_ms", "duration_ms")

    def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
        user, video, time_ms, is_click, play_time, duration = row
        if is_click not in ("0", "1"):
            raise BadRow("is_click", f"{is_click[:40]!r} is neither 0 nor 1")
        ts, play = millis(time_ms), whole(play_time, "play_time", MAX_PLAY_MS)
        duration_ms = whole(duration, "duration", MAX_PLAY_MS)
        viewer, item, request = whole(user, "id"), whole(video, "id"), f"kuairand-{user}-{ts}"
        key = f"kuairand-{xxhash.xxh3_64_hexdigest(self.line.encode())}"
        yield Impression(
            event_id=f"{key}-i", ts=ts, user=viewer, scenario="video", request_id=request, items=[item], positions=[0]
        )
        if is_click == "1":
            yield Click(
                event_id=f"{key}-c", ts=ts + 1, user=viewer, scenario="video", request_id=request, item=item
            )
        yield Watch(
            event_id=f"{key}-w", ts=ts + min(max(play, 2), LONGEST_PLAY_MS), user=viewer, scenario="video",
            request_id=request, item=item, play_ms=play, duration_ms=duration_ms,
        )  # fmt: skip
