"""Open Bandit Dataset (Saito et al. 2020): what ZOZOTOWN's bandits showed, with which probability, and the clicks.

A row is one item at one of three positions of a page: an impression with its propensity, and a click 1 ms later if
there was one.
- There is no user id, only four hashed features of the user. The hash of the four stands for the user: it is all that
  the bandit knew about whom it served, so a model that is to be compared with it should know no less and no more. A
  history is then that of some 230 groups of like users, not of people.
- Rows of one group at the same microsecond are one page view and share the request; its rows stay impressions of their
  own, which the joiner puts together. A time in ms alone would mix page views.
- Event ids are a hash of time (in µs), group, item, position and the rest: no two rows of the files are alike, so
  nothing is taken for a duplicate.
- Positions are counted from 1 in the files and from 0 here. The item context file is no log, and is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from replay.readers.base import Layout, Record, TableReader, shown
from replay.readers.values import BadRow, flag, millis, number, whole

USER_FEATURES = tuple(f"user_feature_{i}" for i in range(4))
MAX_POSITION = 1000


class OpenBandit(TableReader):
    name = "openbandit"
    about = "Open Bandit: single impressions with position, logged propensity and click; users are groups"
    has_impressions = True
    has_users = False
    columns = ("timestamp", "item_id", "position", "click", "propensity_score", *USER_FEATURES)
    layouts = (Layout(columns, header=True),)

    def convert(self, row: Sequence[str], number_: int) -> Iterable[Record]:
        time, item, position, click, propensity, *features = row
        ts, place = millis(time, "s"), whole(position, "position", MAX_POSITION)
        share = number(propensity, "propensity", 0.0, 1.0)
        if place == 0 or share == 0:
            raise BadRow("position" if place == 0 else "propensity", "0 cannot have been shown")
        group = f"group-{xxhash.xxh3_64_hexdigest(chr(31).join(features).encode())}"
        return shown(
            self.row_key(row), ts, group, whole(item, "id"), f"openbandit-{group}-{time}",
            flag(click, "click"), position=place - 1, propensity=share,
        )  # fmt: skip
