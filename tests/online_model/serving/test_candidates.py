"""Candidates: the exact scan finds what a plain loop over all items finds, and only what can be had is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedding_store.delta import Version
from online_model.features import CARD, CATEGORY, ITEM, MATCHES
from online_model.history import EMPTY, HISTORY, as_array
from online_model.serving.candidates import ExactIndex, Neighbours, Newest, Popular, Query, union
from online_model.serving.catalogue import Card, read_cards
from online_model.serving.replica import Replica
from streams.events import decode_item
from tests.online_model.logs import make_states
from tests.online_model.plain_model import PlainModel
from tests.online_model.serving.world import (
    DIM,
    HOUR,
    NOW,
    cards,
    category_rows,
    delta,
    dense,
    ids,
    item_rows,
    recommend,
    replica,
    world,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


def query(seed: int = 0, now_ms: int = NOW + HOUR) -> Query:
    item, content = np.random.default_rng(seed).normal(size=(2, DIM)).astype(np.float32)
    return Query(item, content, np.zeros((1, HISTORY), np.int64), now_ms)


def plain_scan(made: Replica, asked: Query, limit: int) -> set[int]:
    """The ids of the best items, one at a time."""
    state, scored = made.state, []
    rows: dict = {}
    for name, table in state.tables.items():
        known = enumerate(table.ids_of(np.arange(table.end)).tolist())
        rows[name] = {i: {n: column[row] for n, column in table.columns.items()} for row, i in known if i}
        for row in rows[name].values():
            row["weights"] = torch.from_numpy(row["weights"])
    for row in range(1, state.items.end):
        item = state.items.ids_of(np.array([row]))
        if not state.cards.available[state.cards.find(item)[0]]:
            continue
        plain = PlainModel(rows, DIM, state.ranker.click_rate())
        prior = plain.numbers(int(item[0]), as_array([EMPTY])[0], asked.now_ms)[:-MATCHES]
        score = np.array(prior) @ state.ranker.tower_numbers.numpy()
        score += asked.item @ plain.weights(ITEM, int(item[0])).numpy()
        score += asked.content @ plain.content(int(item[0])).numpy()
        scored.append((float(score), int(item[0])))
    return {item for _, item in sorted(scored, reverse=True)[:limit]}


def test_the_scan_is_exact_also_after_many_versions():
    rng = np.random.default_rng(3)
    made = replica(world(200))
    index = ExactIndex(made.state, 20)
    for sequence in range(2, 25):
        some = rng.choice(260, 30, replace=False).tolist()
        fields: dict = {
            "tables": {
                ITEM: item_rows(some, rng.normal(size=(30, DIM)), rng.integers(0, 6, 30).tolist(),
                                impressions=rng.integers(0, 50, 30), clicks=rng.integers(0, 9, 30)),
                CATEGORY: category_rows([sequence % 6], rng.normal(size=(1, DIM))),
            },
            "dense": dense(sequence),
            "blobs": {CARD: cards(some[:10], stock=rng.integers(0, 2, 10).tolist())},
            "gone": {ITEM: ids(ITEM, rng.choice(260, 5).tolist()), CARD: ids(ITEM, rng.choice(260, 2).tolist())},
        }  # fmt: skip
        if sequence % 7 == 0:
            fields["gone"][CATEGORY] = ids(CATEGORY, [(sequence + 1) % 6])
        made.apply(delta(sequence, **fields))
        asked = query(sequence, NOW + HOUR)
        assert set(index.candidates(asked).tolist()) == plain_scan(made, asked, 20)


def test_priors_are_renewed_as_items_grow_older():
    first = world(50)
    first.dense["tower_numbers"][3] = 40  # the older, the better: at first that says more than the match
    made = replica(first)
    index = ExactIndex(made.state, 5)
    for hours in (1, 2, 50_000):
        asked = query(1, NOW + hours * HOUR)
        assert set(index.candidates(asked).tolist()) == plain_scan(made, asked, 5)


def test_the_newest_and_the_popular():
    made = replica(world(100))
    assert set(Newest(made.state, 3).candidates(query()).tolist()) == set(ids(ITEM, [0, 1, 2]).tolist())
    source = Popular(made.state, 2)
    source.candidates(query())
    counts = {"impressions": [999] * 3, "clicks": [500, 0, 0], "interactions": [0, 600, 0]}
    rows = item_rows([70, 80, 90], np.ones((3, DIM)), **counts)
    made.apply(delta(2, tables={ITEM: rows}))
    assert set(source.candidates(query()).tolist()) == set(ids(ITEM, [70, 80]).tolist())


def test_what_is_clicked_after_the_last_items_is_found_the_most_similar_first():
    first = world(100)
    made = replica(first)
    items = dict(zip(first.tables[ITEM].ids.tolist(), range(100), strict=True))
    known = first.tables[ITEM].columns
    rows = {ITEM: {i: {name: column[n] for name, column in known.items()} for i, n in items.items()}}
    asked, plain = query(), PlainModel(rows, DIM, made.state.ranker.click_rate())
    asked.past[0, [0, 3, 14]] = ids(ITEM, [7, 8, 7])
    named = {int(i) for item in (7, 8) for i in known["neighbours"][item]}
    history = make_states(asked.past, np.array([NOW]))[0]
    ordered = sorted(named, key=lambda i: -plain.near(i, history, asked.now_ms)[0])
    assert set(Neighbours(made.state, 5).candidates(asked).tolist()) == set(ordered[:5])
    assert set(Neighbours(made.state, 48).candidates(asked).tolist()) == named
    made.apply(delta(2, blobs={CARD: cards([items[ordered[0]]], stock=[0])}))
    assert set(Neighbours(made.state, 4).candidates(asked).tolist()) == set(ordered[1:5]), "what can be had"
    assert not len(Neighbours(made.state, 5).candidates(query())), "nothing was done yet"


def test_an_item_that_was_never_seen_is_found_among_the_newest():
    made = replica(world(100), nearest=5, neighbours=5, popular=5, newest=5)
    made.apply(delta(2, blobs={CARD: cards(["brand new"], created=NOW)}))
    assert any("brand new" in {s.item for s in recommend(made, "u1", "live", 100).items} for _ in range(3))


def test_what_is_sold_out_is_not_shown_until_it_is_back():
    made = replica(world(10))
    recommend(made, "u1", "live", 10)
    made.apply(delta(2, blobs={CARD: cards([0, 3, 5], stock=[0, 0, 7])}))
    assert {s.item for s in recommend(made, "u1", "live", 10).items} == set(range(10)) - {0, 3}
    made.apply(delta(3, blobs={CARD: cards([3], stock=1)}, gone={CARD: ids(ITEM, [5])}))
    assert {s.item for s in recommend(made, "u1", "live", 10).items} == set(range(10)) - {0, 5}


def test_items_without_a_card_are_not_shown():
    made = replica(world(10))
    best = item_rows(["secret"], np.full((1, DIM), 9), clicks=[10**6], impressions=[10**6])
    made.apply(delta(2, tables={ITEM: best}))
    assert {s.item for s in recommend(made, "u1", "live", 20).items} == set(range(10))


def test_the_ids_of_cards_keep_their_type():
    first = world(1)
    first.blobs = {CARD: cards(["007", 7, "seven", 2**63])}
    assert {s.item for s in recommend(replica(first), "u1", "live", 10).items} == {"007", 7, "seven", 2**63}


def test_a_card_that_the_catalogue_took_can_be_read_whatever_else_is_in_it():
    odd = b'{"kind": "item", "item": "deep", "more": ' + b"[" * 250 + b"]" * 250 + b', "stock": -1}'
    assert decode_item(odd)
    assert read_cards({1: odd}) == {1: Card("deep", stock=-1)}


def test_a_source_of_ones_own_joins_the_others():
    class Hand:
        def candidates(self, query: Query) -> np.ndarray:
            return ids(ITEM, [9, 9, "no such item"])

    made = replica(world(10), nearest=1, neighbours=0, newest=0, popular=0)
    made.sources.append(Hand())
    assert 9 in {s.item for s in recommend(made, "u1", "live", 10).items}
    assert len(union([Hand(), Hand()], query())) == 2


def test_sources_of_an_empty_replica_name_nothing():
    made = replica(Version(1, 1, dense=world().dense))
    assert union(made.sources, query()).size == 0
