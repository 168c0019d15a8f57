"""Small made-up logs: blocks of rows as the joiner would give them."""

from __future__ import annotations

import numpy as np

from embedding_store.ids import feature_id, hash_text
from online_model.examples import QUERY_WORDS, Block, Counts, Examples, Part, Source, example_id, row_id
from online_model.features import words_of
from online_model.history import EMPTY, HISTORY, HISTORY_BYTES, HISTORY_DTYPE, PANE_S, RECENT, as_array

START = 1_700_000_000_000  # ms UTC
QUERIES = np.array([words_of(text, QUERY_WORDS) for text in ("red", "red shoes", "tea")])  # of every fourth request


def make_states(items: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """States uint8 [n, HISTORY_BYTES] of users who did something with `items` (int64 [n, HISTORY], 0: none), a minute
    apart, until a second before `ts` (int64 [n])."""
    states = as_array([EMPTY] * len(items)).copy()
    state = states.view(HISTORY_DTYPE)[:, 0]
    state["newest"] = ts // 1000 - 1
    for name, first, size, kinds in (("recent", 0, RECENT, 2), ("intent", RECENT, HISTORY - RECENT, 3)):
        own, place = items[:, first : first + size], np.arange(size)
        entries = state[name]
        entries["item"] = own
        entries["second"] = np.where(own != 0, (ts // 1000 - 1)[:, None] - 60 * place, 0)
        entries["kind"] = np.where(own != 0, (1 if name == "recent" else 3) + place % kinds, 0)
    for horizon, width in enumerate(PANE_S):
        slot = state["newest"] // width % 4
        state["counts"][np.arange(len(items)), horizon, slot] = (items[:, :4] % 7).astype(np.uint16)
    return states


def make_rows(
    n: int, seed: int = 0, users: int = 20, items: int = 30, source: int = Source.IMPRESSION, from_row: int = 0
) -> Examples:
    """n SHOWN rows, four to an impression, a second apart, about every fifth clicked; all clicked where implicit."""
    rng = np.random.default_rng([seed, from_row])
    request = (from_row + np.arange(n)) // 4
    user_of = np.random.default_rng(seed).integers(users, size=from_row + n)[request]
    item = rng.integers(items, size=n)
    ids = np.array([feature_id("item", int(i)) for i in range(items)], np.int64)
    history = np.where(rng.random((from_row + n, HISTORY)) < 0.5, rng.choice(ids, (from_row + n, HISTORY)), 0)[
        request - request[0] if n else request
    ]
    keys = [
        example_id(hash_text(f"{seed}.{r}"), hash_text(f"{i}-{j}"))
        for j, (r, i) in enumerate(zip(request, item, strict=True))
    ]
    click = np.ones(n, np.int8) if source == Source.IMPLICIT else (rng.random(n) < 0.2).astype(np.int8)
    ts = START + request * 1000
    return Examples(
        row_id=np.array([row_id(k, Part.SHOWN) for k in keys], np.int64),
        example_id=np.array(keys, np.int64),
        part=np.full(n, Part.SHOWN, np.uint8), source=np.full(n, source, np.uint8),
        ts=ts.astype(np.int64), closed=(ts + 500).astype(np.int64),
        user=np.array([feature_id("user", int(u)) for u in user_of], np.int64), item=ids[item],
        scenario=(request % 4).astype(np.uint8), position=(np.arange(n) % 4).astype(np.int16),
        propensity=np.full(n, np.nan, np.float32), rate=np.ones(n, np.float32), click=click,
        purchase=np.where(click == 1, 0, -1).astype(np.int8),
        play_ms=np.full(n, -1, np.int64), duration_ms=np.full(n, -1, np.int64), delay_ms=np.full(n, -1, np.int64),
        query=np.where(request[:, None] % 4 == 2, QUERIES[request % len(QUERIES)], 0),
        history=make_states(history.astype(np.int64), ts), item_raw=np.array([str(i) for i in item], object),
    )  # fmt: skip


def later(rows: Examples, index: np.ndarray, part: Part, **columns: int) -> Examples:
    """Rows of another part of the examples at `index`: what came of them later."""
    out = rows.take(np.asarray(index))
    names = {"click": -1, "purchase": -1, "play_ms": -1, "duration_ms": -1} | columns
    for name, value in names.items():
        setattr(out, name, np.full(len(out), value, getattr(out, name).dtype))
    out.part = np.full(len(out), part, np.uint8)
    out.row_id = out.row_id ^ (int(part) << 20)
    out.closed = out.closed + 10_000
    return out


def make_blocks(rows: Examples, size: int, partition: int = 0, first: int = 0, users: bool = True) -> list[Block]:
    """The rows cut into blocks of `size`, each of ten offsets; each brings the histories of its users."""
    blocks = []
    for number, start in enumerate(range(0, len(rows), size)):
        part = rows.take(slice(start, start + size))
        who, index = np.unique(part.user, return_index=True)
        after = rows.closed[start + size] if start + size < len(rows) else rows.closed[-1] + 1
        blocks.append(
            Block(
                partition=partition, from_offset=first + 10 * number, to_offset=first + 10 * number + 10,
                handled=first + 10 * number + 9, watermark=int(after), counts=Counts(rows=start + len(part)),
                examples=part, users=who if users else np.empty(0, np.int64),
                histories=part.history[index] if users else np.empty((0, HISTORY_BYTES), np.uint8),
            )
        )  # fmt: skip
    return blocks
