"""YooChoose (RecSys Challenge 2015): the clicks and the purchases of a shop's sessions.

Read are yoochoose-clicks.dat (session, time, item, category), yoochoose-buys.dat (session, time, item, price,
quantity), both without a header, and session-rec's tables of the clicks (SessionId, ItemId, Time in seconds). Users are
not known: a session stands for one. Nobody noted what was shown. A row that stands there twice gets the same id.

In the files 0 means "missing": for the price, the quantity and the category. Category S is a special offer, which is
where an item was clicked and not what it is; so neither is told to the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replay.readers.base import Layout, Record, TableReader
from replay.readers.values import MAX_QUANTITY, iso_millis, millis, name, number, whole
from streams.events import Click, Item, Purchase

NO_CATEGORY = ("", "0", "S")


class YooChoose(TableReader):
    name = "yoochoose"
    about = "YooChoose (RecSys 2015): clicks or purchases of a shop's sessions; no impressions"
    has_impressions = False
    columns = ("session", "time", "item", "category", "price", "quantity")
    layouts = (
        Layout(("SessionId", "Time", "ItemId", "", "", ""), delimiters=("\t", ","), header=True),
        Layout(("session", "time", "item", "category", "", "")),
        Layout(("session", "time", "item", "", "price", "quantity")),
    )

    def convert(self, row: Sequence[str], number_: int) -> Iterable[Record]:
        session, time, item_text, category, price, quantity = row
        user, item, key = whole(session, "id"), whole(item_text, "id"), self.row_key(row)
        # In the original files times are ISO 8601: a number there is another format's rating or price.
        ts = iso_millis(time) if category or quantity else millis(time, "s")
        event: Click | Purchase
        if quantity:
            cost = number(price, "price")
            pieces = whole(quantity, "quantity", MAX_QUANTITY)
            event = Purchase(event_id=key, ts=ts, user=user, item=item, quantity=pieces or 1, price=cost or None)
        else:
            event = Click(event_id=key, ts=ts, user=user, item=item)
        if category in NO_CATEGORY:
            return (event,)
        return Item(item=item, category=name(category, "category")), event
