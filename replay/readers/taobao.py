"""Taobao UserBehavior (Tianchi data set 649): user, item, category, behaviour, time in seconds; no header.

The log tells what users did, not what they were shown: a page view is a click that nobody can hold against an
impression. One row is one event. Times are full seconds, in which a user may well do the same twice, so that the
event ids are the numbers of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replay.readers.base import Record, TableReader
from replay.readers.values import BadRow, millis, whole
from streams.events import Cart, Click, Favourite, Item, Purchase

KINDS: dict[str, type[Click | Cart | Favourite | Purchase]] = {
    "pv": Click, "cart": Cart, "fav": Favourite, "buy": Purchase,
}  # fmt: skip


class Taobao(TableReader):
    name = "taobao"
    about = "Taobao UserBehavior: page views (as clicks), carts, favourites and purchases; no impressions"
    has_impressions = False
    columns = ("user_id", "item_id", "category_id", "behavior", "timestamp")

    def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
        user, item, category, behaviour, seconds = row
        kind = KINDS.get(behaviour)
        if kind is None:
            raise BadRow("behaviour", f"{behaviour[:40]!r} is none of {', '.join(KINDS)}")
        item_id = whole(item, "id")
        event = kind(event_id=f"taobao-{number}", ts=millis(seconds, "s"), user=whole(user, "id"), item=item_id)
        return Item(item=item_id, category=whole(category, "id")), event
