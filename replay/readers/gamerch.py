"""Google Merchandise Store: the all_sessions table of the Google Analytics sample, one product of one hit a row.

The visit (`visitId`) stands for the user: the visitors' own ids are rounded in the public copies, and many meet in one.
The time of a row is the start of the visit, `visitId` in seconds, and `time` ms.

`eCommerceAction_type` says what was done. 0 is a product on a page: an impression. 1 (click in a list) and 2 (its
details) are an impression and a click 1 ms later: in this table each product of a visit has one row, so the row of the
click is that of the showing, too. 3 is a cart, 6 a purchase. 4 (taken out of the cart) and 5 (checkout) have no event
here and are set aside, as `removed` and `checkout`. Products of one hit share the request. Prices are in millionths.
The rows are a sample of the hits: its click rate is not the shop's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replay.readers.base import Layout, Record, TableReader, shown
from replay.readers.values import MAX_PLAY_MS, MAX_QUANTITY, BadRow, SetAside, millis, name, number, whole
from streams.events import Cart, Item, Purchase

MILLIONTHS = 1e6


class GaMerch(TableReader):
    name = "gamerch"
    about = "Google Merchandise Store (GA all_sessions): products on pages, clicks, carts, purchases of visits"
    has_impressions = True
    columns = (
        "visitId", "time", "productSKU", "v2ProductName", "v2ProductCategory", "productPrice", "currencyCode",
        "productQuantity", "eCommerceAction_type",
    )  # fmt: skip
    layouts = (
        Layout(
            columns, delimiters=(",", "\t"), header=True, quoted=True,
            optional=frozenset({"currencyCode", "productQuantity", "v2ProductName", "v2ProductCategory"}),
        ),
    )  # fmt: skip

    def convert(self, row: Sequence[str], number_: int) -> Iterable[Record]:
        visit, since, sku, title, category, millionths, currency, quantity, action = row
        user, item, after = whole(visit, "id"), name(sku), whole(since, "time", MAX_PLAY_MS)
        ts = millis(str(millis(visit, "s") + after))
        price = number(millionths or "0", "price", most=1e15) / MILLIONTHS or None
        pieces = whole(quantity, "quantity", MAX_QUANTITY) if quantity else 1
        if action in ("4", "5"):
            raise SetAside("removed" if action == "4" else "checkout", "no event of ours")
        if action not in ("0", "1", "2", "3", "6"):
            raise BadRow("action", f"{action[:40]!r} is none of 0 to 6")
        key, request = self.row_key(row), f"gamerch-{visit}-{since}"
        known = not (category.startswith(("(", "${")) or not category.strip())  # "(not set)", and templates unfilled
        yield Item(item=item, title=title.strip(), category=name(category, "category") if known else None, price=price)
        match action:
            case "0" | "1" | "2":
                yield from shown(key, ts, user, item, request, clicked=action != "0")
            case "3":
                yield Cart(event_id=f"{key}-a", ts=ts, user=user, item=item)
            case "6":
                yield Purchase(
                    event_id=f"{key}-p", ts=ts, user=user, item=item, quantity=pieces or 1, price=price,
                    currency=currency or None,
                )  # fmt: skip
