"""What can be set about a log: the section [log]. Free of everything slow: a command reads its settings at once."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from streams.events import Scenario

Kind: TypeAlias = Literal["click", "watch", "purchase", "cart", "favourite", "refund", "impression", "ignore"]
Column: TypeAlias = Annotated[str, Meta(max_length=256)]


class ColumnMapping(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which columns of a table tell what: the section [log.columns], for the format generic.

    Columns are named as in the header, in the keys of JSON lines or in the Parquet schema; in text without a header
    they are called 1, 2, 3 and so on. A column that is not named here is not read.
    """

    user: Annotated[Column, Meta(description="required; the column of the user's id (or the session's)")] = ""
    item: Annotated[Column, Meta(description="required; the column of the item's id")] = ""
    time: Annotated[Column, Meta(description="required; the column of the time, in time_unit")] = ""
    time_unit: Annotated[
        Literal["s", "ms", "us", "ns", "iso"],
        Meta(description="numbers are s, ms, us or ns since 1970; iso: ISO 8601 texts only, UTC unless they say else"),
    ] = "s"
    kind: Annotated[Column, Meta(description="a column whose values `kinds` translates")] = ""
    kinds: Annotated[
        dict[str, Kind],
        Meta(description='value of the column `kind` = kind of event, as {view = "click"}; ignore: no event'),
    ] = {}
    default_kind: Annotated[Kind, Meta(description="the kind of every row, where no column tells it")] = "click"
    clicked: Annotated[
        Column, Meta(description="a column of 0 and 1: each row is an impression, and a click where it is 1")
    ] = ""
    rating: Annotated[
        Column, Meta(description="a column of ratings: each row is an impression, and a click from like_from on")
    ] = ""
    like_from: Annotated[float, Meta(description="the least rating that is a click")] = 4.0
    request: Annotated[Column, Meta(description="the id of the page; rows of one are shown together")] = ""
    event_id: Annotated[Column, Meta(description="the row's own id; else one follows from its values and place")] = ""
    category: Annotated[Column, Meta(description="the item's category, for the catalogue")] = ""
    price: Annotated[Column, Meta(description="the price of one piece, of purchases and for the catalogue")] = ""
    quantity: Annotated[Column, Meta(description="pieces, of purchases and refunds; 1 where it is empty")] = ""
    currency: Annotated[str, Meta(max_length=16, description="of all prices, as EUR")] = ""
    play: Annotated[Column, Meta(description="how long it was played; impressions with it are watches, too")] = ""
    duration: Annotated[Column, Meta(description="how long the item is; 0 or empty: not known")] = ""
    play_unit: Annotated[Literal["s", "ms"], Meta(description="of play and duration")] = "ms"
    position: Annotated[Column, Meta(description="the item's place on the page")] = ""
    position_from: Annotated[Literal[0, 1], Meta(description="the number of the first place")] = 0
    propensity: Annotated[Column, Meta(description="the probability with which the item was shown, 0 to 1")] = ""
    scenario: Annotated[Scenario, Meta(description="where the items were shown")] = "shelf"
    delimiter: Annotated[
        str, Meta(max_length=4, description="of text; empty: a tab, comma, semicolon or bar, as the first line has it")
    ] = ""
    has_header: Annotated[bool, Meta(description="text begins with a line of names")] = True


class LogSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A historical log and how to read it: the section [log]."""

    format: Annotated[str, Meta(description="name of the format, as taobao; `headrace log inspect` tells it")] = ""
    path: Annotated[str, Meta(description="the file, or its URL, as s3://bucket/clicks.parquet")] = ""
    max_rejected_share: Annotated[
        float, Meta(ge=0, le=1, description="more wrong rows than this share of them: the file is refused")
    ] = 0.01
    columns: ColumnMapping = ColumnMapping()
