"""Online Retail (UCI data set 352; also Online Retail II): the lines of a British wholesaler's invoices.

- A line is a Purchase, and 1 ms before it the Click with which the item was chosen. The ledger has no clicks, but the
  joiner makes its examples of clicks (a purchase belongs to the last click on the item), and nobody buys what they
  have not picked: without it nothing could be learned from a ledger. So every click is bought, and of a replay the
  ranking of clicks above drawn negatives says something, and the figures of the task purchase nothing.
- InvoiceNo with a C is a cancellation: a Refund of the pieces, which are negative in the file.
- A quarter of the lines have no CustomerID. Their invoice stands for the user: it is one basket of somebody.
- Set aside, by reason: `adjustment`, corrections of the stock and of the books (nobody is named and nothing was paid,
  or the price or the quantity of a sale is negative), and `service`, lines that are no goods (postage, fees).
- A line that stands in an invoice twice is most likely a slip: both get the same ids (a hash of the line), and the
  joiner counts the second as a duplicate.
- Times are full minutes, taken as UTC, ISO 8601 or as in the spreadsheet's own export (12/1/2010 8:26).
- The description is the item's title. Prices differ from customer to customer, so none is told to the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replay.readers.base import Layout, Record, TableReader
from replay.readers.values import BadRow, SetAside, iso_millis, name, number, signed, whole
from streams.events import Click, Item, Purchase, Refund

CURRENCY = "GBP"
MAX_PRICE = 1e9
SERVICES = {"POST", "DOT", "M", "m", "D", "S", "B", "C2", "BANK CHARGES", "AMAZONFEE", "CRUK"}


class OnlineRetail(TableReader):
    name = "onlineretail"
    about = "UCI Online Retail: invoice lines as purchases (each with its click), cancellations as refunds"
    has_impressions = False
    columns = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")
    layouts = (
        Layout(columns, delimiters=(",", "\t", ";"), header=True, quoted=True),
        Layout(
            ("Invoice", "StockCode", "Description", "Quantity", "InvoiceDate", "Price", "Customer ID"),
            delimiters=(",", "\t", ";"), header=True, quoted=True,
        ),
    )  # fmt: skip
    text_errors = "replace"  # common copies are Latin-1: a pound sign in a description is no reason to refuse them

    def convert(self, row: Sequence[str], number_: int) -> Iterable[Record]:
        invoice, stock, title, quantity, date, unit_price, customer = row
        item, bill, ts = name(stock), name(invoice), minute(date)
        pieces, price = signed(quantity, "quantity"), number(unit_price, "price", -MAX_PRICE, MAX_PRICE)
        user = whole(customer.removesuffix(".0"), "id") if customer else f"invoice-{bill}"
        cancelled = bill[0] in "Cc"
        if pieces == 0 or (cancelled and pieces > 0):
            raise BadRow("quantity", f"{pieces} pieces {'cancelled' if cancelled else 'sold'}")
        if price < 0 or (not customer and price == 0) or (pieces < 0 and not cancelled):
            raise SetAside("adjustment", "a correction of the stock or the books")
        if item in SERVICES:
            raise SetAside("service", f"{item} is no goods")
        key = self.row_key(row)
        if title.strip():
            yield Item(item=item, title=title.strip())
        if cancelled:
            yield Refund(event_id=f"{key}-r", ts=ts + 2, user=user, item=item, quantity=-pieces)
        else:
            yield Click(event_id=f"{key}-c", ts=ts, user=user, item=item)
            yield Purchase(
                event_id=f"{key}-p", ts=ts + 1, user=user, item=item, quantity=pieces, price=price, currency=CURRENCY
            )


def minute(text: str) -> int:
    """Ms UTC of an ISO 8601 time or of month/day/year hour:minute. Raises BadRow("time")."""
    day, slash, _ = text.partition(" ")
    if "/" in day and slash:
        month, _, rest = day.partition("/")
        of_month, _, year = rest.partition("/")
        clock = text[len(day) + 1 :]
        text = f"{year}-{month:0>2}-{of_month:0>2} {clock:0>5}"
    return iso_millis(text)
