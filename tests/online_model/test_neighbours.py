"""Co-clicks: what lists keep does not hang on the order of a batch, and the smallest go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.ids import feature_id
from online_model.batch import candidates_of
from online_model.examples import Part
from online_model.features import ITEM
from online_model.history import HISTORY, RECENT
from online_model.neighbours import HALF_LIFE_S, KEPT, added, left, near
from online_model.ranker import CLICK, WAYS
from tests.online_model.logs import START, make_blocks, make_rows, make_states
from tests.online_model.test_trainer import trainer  # noqa: F401

NO_LISTS = np.zeros((3, KEPT), np.int64), np.zeros((3, KEPT))
CO_CLICKS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.sampled_from([1.0, 0.8, 0.1, 0.3])))


def put(lists, co_clicks):
    owner, other, amount = zip(*co_clicks, strict=True) if co_clicks else ((), (), ())
    return added(*lists, np.array(owner, np.int64), np.array(other, np.int64), np.array(amount, np.float64))


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(CO_CLICKS, min_size=1, max_size=4), seed=st.integers(0, 9))
def test_lists_are_those_of_dictionaries_whatever_the_order_of_a_batch(batches, seed):
    lists, plain = NO_LISTS, [{}, {}, {}]
    for batch in batches:
        mixed = [batch[i] for i in np.random.default_rng(seed).permutation(len(batch))]
        again, lists = put(lists, mixed), put(lists, batch)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(again, lists, strict=True))
        for owner, own in enumerate(plain):
            for of, other, amount in batch:
                if of == owner:
                    own[other] = own.get(other, 0.0) + amount
        plain = [dict(sorted(own.items(), key=lambda pair: (-round(pair[1], 9), pair[0]))[:KEPT]) for own in plain]
    for items, weights, own in zip(*lists, plain, strict=True):
        assert weights[weights > 0] == pytest.approx(sorted(own.values(), reverse=True))
        assert (np.diff(weights) <= 0).all(), "the heaviest first"
        assert len(set(items[items != 0].tolist())) == len(own)


def test_of_those_alike_the_ones_with_the_larger_ids_go():
    items, weights = put(NO_LISTS, [(1, i, 1.0) for i in range(KEPT + 5, 0, -1)])
    assert items[1].tolist() == list(range(1, KEPT + 1))
    items, _ = put((items, weights), [(1, 99, 0.5), (1, 98, 2.0)])
    assert items[1].tolist() == [98, *range(1, KEPT)]
    assert not items[[0, 2]].any()


def test_an_entry_weighs_by_its_place_in_its_list_and_once():
    past = np.zeros((1, HISTORY), np.int64)
    past[0, [0, 1, 2, RECENT, RECENT + 1]] = 7, 8, 7, 8, 9
    assert near(past)[0, [0, 1, 2, RECENT, RECENT + 1, 5]].tolist() == pytest.approx([1, 0.8, 0, 0, 0.8, 0])


def test_what_was_counted_halves_with_the_half_life_and_never_grows_by_itself():
    since = np.array([START, START])
    assert left(np.array([[4.0], [2.0]]), since, START + HALF_LIFE_S * 1000).tolist() == [[2.0], [1.0]]
    assert left(np.array([4.0, 2.0]), since, START - 1).tolist() == [4.0, 2.0], "an example of before"


def test_an_item_is_near_those_it_was_clicked_after_from_the_next_batch_on(trainer):  # noqa: F811
    """And not in the very batch: a score is made of what came before."""
    rows = make_rows(64, items=8)
    one, other, never = (feature_id(ITEM, i) for i in (0, 1, 999))
    rows.item[:], rows.click[:] = one, 1
    past = np.zeros((64, HISTORY), np.int64)
    past[:, 0] = other
    rows.history[:] = make_states(past, rows.ts)
    seen = []
    forward = trainer._ranker.forward
    trainer._ranker.forward = lambda contexts, items, mean=None: (
        seen.append(items.near.numpy().copy()),
        forward(contexts, items, mean),
    )[1]
    for number, block in enumerate(make_blocks(rows, 32)):
        trainer.offer(block, number)
        while trainer.step(drain=True):
            pass
    assert not seen[0].any()
    assert (seen[1] > 0).all()
    first = rows.take(slice(0, 1))
    assert first.part[0] == Part.SHOWN
    candidates, _, _ = candidates_of(first, np.zeros(1, np.int64), np.array([[other, never]]))
    del seen[:]
    p, ways = trainer.score(candidates)
    assert seen[0][0, 0] > 0
    assert not seen[0][2].any(), "nobody has clicked it"
    assert ways[:, WAYS.index("click")].tolist() == p[:, CLICK].tolist()
    farther = ways[:, WAYS.index("affinity")] - ways[:, WAYS.index("near")]
    assert farther == pytest.approx(-np.log(seen[0][:, 0] + 0.001), abs=1e-5)
