"""A replica goes from whole version to whole version, and scoring changes nothing."""

from __future__ import annotations

import copy
import typing

import msgspec
import numpy as np
import pytest
import torch

from embedding_store.columns import TableRows
from embedding_store.delta import Assembler, Version, encode
from embedding_store.errors import CorruptRecord
from embedding_store.ids import feature_id
from online_model.examples import QUERY_WORDS
from online_model.features import CARD, CATEGORY, ITEM, SELLER, USER, WORD, words_of
from online_model.feedback import probabilities, strategy
from online_model.history import EMPTY, as_array, history_hash
from online_model.ranker import CLICK, PURCHASE, WATCH, Ranker
from online_model.serving.api import Scenario
from online_model.serving.errors import NotReady, VersionGap
from online_model.serving.replica import Replica
from online_model.serving.scoring import SCENARIO_INDEX
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings
from streams.events import SCENARIOS
from tests.online_model.plain_model import PlainModel
from tests.online_model.serving.world import (
    DIM,
    HOUR,
    NOW,
    RANKER,
    cards,
    category_rows,
    delta,
    dense,
    ids,
    item_rows,
    rank,
    recommend,
    replica,
    user_rows,
    world,
)  # fmt: skip

LAST_BITS = 1e-6  # of a sum, which hang on where in its request a candidate stands


def contents(made: Replica) -> dict[str, bytes]:
    """All that a replica holds, to compare."""
    state = made.state
    out = {"version": made.version.encode(), "info": msgspec.json.encode(made.info()), "changes": b"%d" % state.changes}
    for name, table in state.tables.items():
        out |= {f"{name}.{column}": values.tobytes() for column, values in table.columns.items()}
        out[f"{name}.ids"] = table.ids_of(np.arange(table.end)).tobytes()
    out |= {f"dense.{name}": p.tobytes() for name, p in state.ranker.weights().items()}
    out["cards"] = repr(state.cards.raw).encode() + state.cards.available.tobytes() + state.cards.created.tobytes()
    return out


def reference_scores(version: Version, user: str, scenario: str, items: list, now_ms: int, query: str) -> np.ndarray:
    """Probabilities [n, heads] the plain way: rows from dicts, the trainer's ranker."""
    rows: dict = {
        name: {i: {c: v[k] for c, v in table.columns.items()} for k, i in enumerate(table.ids.tolist())}
        for name, table in version.tables.items()
    }
    for row in (row for table in rows.values() for row in table.values()):
        row["weights"] = torch.from_numpy(row["weights"])
    ranker = Ranker(DIM, RANKER)
    ranker.load_weights(version.dense)
    person = feature_id(USER, user)
    history = rows[USER].get(person, {"history": as_array([EMPTY])[0]})["history"]
    about = (person, history, now_ms, SCENARIOS.index(scenario), words_of(query, QUERY_WORDS))
    inputs = PlainModel(rows, DIM, ranker.click_rate()).inputs([(*about, feature_id(ITEM, item)) for item in items])
    with torch.inference_mode():
        return probabilities(ranker(*inputs), strategy("calibrated", entire=True)).numpy()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scores_are_those_of_the_trainers_ranker_fed_with_the_same_rows(scenario):
    first = world()
    made = replica(first)
    items = [*range(40), "unknown", 41]
    for user in ["u0", "u3", "nobody"]:
        query = {"u0": "red tea", "u3": "nothing of the kind"}.get(user, "")
        ranking = rank(made, user, scenario, items, query)
        expected = reference_scores(first, user, scenario, items, NOW + HOUR, query)
        got = {r.item: (r.click, r.watch, r.purchase) for r in ranking.items}
        served = expected[:, [CLICK, WATCH, PURCHASE]]
        assert np.array([got[item] for item in items]) == pytest.approx(served, abs=2e-6)
        for r in ranking.items:
            assert r.score == pytest.approx(r.click * (1 + 0.5 * r.watch + 2.0 * r.purchase), rel=1e-5)
        assert [r.score for r in ranking.items] == sorted((r.score for r in ranking.items), reverse=True)


def test_a_snapshot_and_deltas_end_where_one_snapshot_of_all_does():
    whole = world(60, 12)
    made = replica(Version(1, 1, dense=whole.dense))
    rng = np.random.default_rng(4)
    for sequence in range(2, 30):  # rows come in any order, several times, wrong at first
        tables = {}
        for name, rows in whole.tables.items():
            some = rows.take(rng.permutation(len(rows))[: rng.integers(0, len(rows) + 1)])
            if sequence < 15:
                some.columns["weights"] += 1
            tables[name] = some
        some_cards = {i: c for i, c in whole.blobs[CARD].items() if rng.random() < 0.3}
        made.apply(delta(sequence, tables=tables, blobs={CARD: some_cards}, dense=dense(sequence)))
    made.apply(delta(30, tables=whole.tables, blobs=whole.blobs, dense=whole.dense))
    fresh = replica(whole)
    for user in ["u1", "u11", "nobody"]:
        once, again = (rank(r, user, "video", list(range(60))) for r in (made, fresh))
        assert once.items == again.items
        assert once.feature_hash == again.feature_hash
        shown, also = (recommend(r, user, "video", 5) for r in (replica(whole, epsilon=0), fresh))
        assert {s.item for s in shown.items} <= set(range(60))
        assert shown.candidates == also.candidates


def test_a_version_can_come_over_the_wire():
    parts = encode(world(), max_bytes=20_000)
    assembler, made = Assembler(), replica()
    whole = [v for part in parts if (v := assembler.add(part)) is not None]
    assert made.apply(whole[0])
    assert rank(made, "u1", "live", [1, 2]).items == rank(replica(world()), "u1", "live", [1, 2]).items


def test_versions_must_follow_one_another():
    made = replica(world())
    assert made.apply(delta(2))
    assert made.version == "1.2"
    before = contents(made)
    with pytest.raises(VersionGap, match=r"1\.5 goes on from 1\.4, this replica holds 1\.2: load the newest snap"):
        made.apply(delta(5))
    with pytest.raises(VersionGap, match="goes on from all"):
        made.apply(Version(1, 9, dense=world().dense))  # a snapshot goes into a fresh replica
    with pytest.raises(VersionGap, match="holds none"):
        replica().apply(delta(2))
    assert contents(made) == before


def test_repeats_are_skipped_silently():
    made = replica(world())
    later = delta(2, tables={ITEM: item_rows([1], np.ones((1, DIM)))})
    assert made.apply(later)
    before = contents(made)
    assert not made.apply(later)
    assert not made.apply(world())
    assert not made.apply(Version(0, 99, base=(0, 98)))  # of an epoch that is over
    assert contents(made) == before


def test_a_new_epoch_goes_on_from_the_version_it_names():
    made = replica(world())
    made.apply(delta(2))
    rolled_back = Version(2, 2, base=(1, 1))
    with pytest.raises(VersionGap):
        made.apply(rolled_back)
    other = replica(world())
    assert other.apply(rolled_back)
    assert (other.epoch, other.sequence, other.version) == (2, 2, "2.2")


def spoiled_versions():
    """Versions that must be refused as a whole. Each also holds much that is right."""
    def right() -> dict:
        return {
            "tables": {
                USER: user_rows(["u0", "new"], np.ones((2, DIM)), [[1], [2]]),
                CATEGORY: category_rows([0], np.ones((1, DIM))),
                ITEM: item_rows([1, 99], np.ones((2, DIM)), [0, 1]),
            },
            "dense": dense(9), "blobs": {CARD: cards([1, 99], stock=3)}, "gone": {ITEM: ids(ITEM, [3])},
        }  # fmt: skip

    def table(name: str, column: str, values: np.ndarray) -> dict:
        fields = right()
        rows = fields["tables"][name]
        fields["tables"][name] = TableRows(rows.ids, rows.columns | {column: values})
        return fields

    infinite = np.ones((2, DIM), np.float32)
    infinite[1, 3] = np.inf
    yield "nan in weights", table(ITEM, "weights", infinite)
    yield "another dim", table(ITEM, "weights", np.ones((2, DIM + 1), np.float32))
    yield "another dtype", table(USER, "weights", np.ones((2, DIM)))
    yield "short history", table(USER, "history", np.ones((2, 3), np.int64))
    for name, spoil in {
        "lacks a column": lambda f: f["tables"].update({ITEM: f["tables"][ITEM].without("clicks")}),
        "an id twice": lambda f: f["tables"].update({CATEGORY: category_rows([0, 0], np.ones((2, DIM)))}),
        "id 0": lambda f: f["tables"].update(
            {CATEGORY: TableRows(np.zeros(1, np.int64), {"weights": np.ones((1, DIM), np.float32)})}
        ),
        "unknown table": lambda f: f["tables"].update({"brand": category_rows([0], np.ones((1, DIM)))}),
        "dense name": lambda f: f["dense"].pop("bias"),
        "dense shape": lambda f: f["dense"].update(bias=np.ones(5, np.float32)),
        "dense nan": lambda f: f["dense"].update(bias=np.full(4, np.nan, np.float32)),
        "card no json": lambda f: f["blobs"][CARD].update({7: b"{"}),
        "card no item": lambda f: f["blobs"][CARD].update({7: b'{"title": "x"}'}),
        "card bytes": lambda f: f["blobs"][CARD].update({7: b'{"item": "\xff"}'}),
        "gone no ids": lambda f: f["gone"].update({USER: np.ones(2, np.float32)}),
    }.items():
        fields = right()
        spoil(fields)
        yield name, fields


@pytest.mark.parametrize(("name", "fields"), spoiled_versions())
def test_a_version_that_cannot_be_applied_changes_nothing(name, fields):
    made = replica(world())
    before = contents(made)
    with pytest.raises(CorruptRecord):
        made.apply(delta(2, **fields))
    assert contents(made) == before
    assert made.apply(delta(2))


def test_an_empty_replica_needs_all_dense_weights():
    with pytest.raises(CorruptRecord, match="dense"):
        replica().apply(Version(1, 1, tables=world().tables))


def test_what_only_the_trainer_needs_is_passed_over():
    first = world()
    first.dense["bias.exp_avg"] = np.ones(3, np.float32)
    for name, rows in first.tables.items():
        first.tables[name] = TableRows(rows.ids, rows.columns | {"momentum": np.ones(len(rows), np.float32)})
    assert rank(replica(first), "u1", "live", [1, 2]).items == rank(replica(world()), "u1", "live", [1, 2]).items


def test_a_version_is_not_changed_by_being_applied_and_later_changes_to_it_do_not_matter():
    first = world()
    kept = copy.deepcopy(first)
    made = replica(first)
    for name, rows in kept.tables.items():
        for column, values in rows.columns.items():
            assert np.array_equal(values, first.tables[name].columns[column])
    before = rank(made, "u1", "live", [1, 2]).items
    for rows in first.tables.values():
        rows.columns["weights"][:] = 7
    for weights in first.dense.values():
        weights[:] = 7
    assert rank(made, "u1", "live", [1, 2]).items == before


def test_reads_do_not_write():
    roomy = FeatureSettings(dim=DIM, users=1000, items=1000, categories=1000)  # there would be room to write
    made = Replica(ReplicaSettings(), roomy, RANKER, clock=lambda: NOW + HOUR)
    made.apply(world())
    rank(made, "u1", "live", [1])
    recommend(made, "u1", "live", 3)
    before, size = contents(made), {name: table.nbytes for name, table in made.state.tables.items()}
    for i in range(200):
        rank(made, f"stranger {i}", "live", [f"thing {i}", i, -i - 1])
        recommend(made, f"stranger {i}", "video", 5)
    assert contents(made) == before
    assert {name: table.nbytes for name, table in made.state.tables.items()} == size
    for table in made.state.tables.values():
        assert not any(column[0].any() for column in table.columns.values())


def test_unknown_ids_are_scored_as_the_default_row():
    made = replica(world())
    a, b = rank(made, "nobody", "live", ["no", "nothing"]).items
    assert (a.score, a.click, a.watch, a.purchase) == (b.score, b.click, b.watch, b.purchase)
    known, _ = rank(made, "u0", "live", [3, "no"]).items
    assert known.score != a.score
    assert rank(made, "nobody", "live", ["no"]).feature_hash == history_hash(EMPTY)


def test_an_item_keeps_the_type_and_the_order_it_was_given_in():
    made = replica(world())
    ranking = rank(made, "u0", "live", ["7", 7, "7"])
    assert [r.item for r in ranking.items] == ["7", 7, "7"]
    assert [r.score for r in ranking.items] == pytest.approx([ranking.items[0].score] * 3, rel=LAST_BITS)


def test_feature_hash_is_of_the_state_that_was_scored_with():
    first = world()
    made = replica(first)
    history = first.tables[USER].columns["history"][2]
    assert rank(made, "u2", "live", [1]).feature_hash == history_hash(history)
    assert recommend(made, "u2", "live", 1).feature_hash == history_hash(history)
    made.apply(delta(2, tables={USER: user_rows(["u2"], np.ones((1, DIM)), [[5, 6]])}))
    changed = user_rows(["u2"], np.ones((1, DIM)), [[5, 6]]).columns["history"][0]
    assert recommend(made, "u2", "live", 1).feature_hash == history_hash(changed) != history_hash(history)


def test_gone_rows_are_as_if_they_had_never_been():
    made = replica(world())
    unknown = rank(made, "nobody", "live", ["no"]).items[0]
    gone = {ITEM: ids(ITEM, [3, 4, "never"]), USER: ids(USER, ["u1"]), CATEGORY: ids(CATEGORY, [1])}
    assert made.apply(delta(2, gone=gone))
    assert made.rows() == {USER: 5, ITEM: 38, CATEGORY: 3, SELLER: 2, WORD: 3, CARD: 40}
    for r in rank(made, "u1", "live", [3, 4]).items:
        assert (r.score, r.click) == pytest.approx((unknown.score, unknown.click), rel=LAST_BITS)
    first = world()
    for name, there in gone.items():
        first.tables[name] = first.tables[name].take(~np.isin(first.tables[name].ids, there))
    fresh = replica(first)
    for user in ["u1", "u2", "u5"]:  # histories with items that are gone, items whose category is
        assert rank(made, user, "live", list(range(40))).items == rank(fresh, user, "live", list(range(40))).items
    assert made.apply(delta(3, tables={CATEGORY: world().tables[CATEGORY], ITEM: world().tables[ITEM]}))
    assert rank(made, "u2", "live", [1, 3]).items != rank(fresh, "u2", "live", [1, 3]).items


def test_recommendations_are_the_best_of_the_candidates_with_exact_propensities():
    made = replica(world(), epsilon=0.0)
    answer = recommend(made, "u1", "video", 10)
    best = rank(made, "u1", "video", list(range(40))).items[:10]
    assert [s.item for s in answer.items] == [r.item for r in best]
    assert [s.score for s in answer.items] == pytest.approx([r.score for r in best])
    assert [s.position for s in answer.items] == list(range(10))
    assert {s.propensity for s in answer.items} == {1.0}
    assert answer.candidates == 40
    assert answer.model_version == "1.1"


def test_exploration_reports_what_it_did():
    made = replica(world(), epsilon=0.5)
    order = [r.item for r in rank(made, "u1", "video", list(range(40))).items]
    surprises = 0
    for _ in range(50):
        left = list(order)
        for s in recommend(made, "u1", "video", 6).items:
            best = s.item == left[0]
            assert s.propensity == pytest.approx(0.5 / len(left) + (0.5 if best else 0))
            surprises += not best
            left.remove(s.item)
    assert 100 < surprises < 200  # 300 places, about half of them explore
    assert len({recommend(made, "u1", "video", 1).request_id for _ in range(100)}) == 100


def test_the_same_seed_recommends_the_same():
    once, again = (replica(world(), epsilon=0.7) for _ in range(2))
    for _ in range(20):
        assert recommend(once, "u1", "video", 6).items == recommend(again, "u1", "video", 6).items


def test_without_a_model_or_an_item_it_says_so():
    empty = replica()
    assert empty.info().version == ""
    with pytest.raises(NotReady, match="no model yet"):
        rank(empty, "u", "live", [1])
    with pytest.raises(NotReady, match="no model yet"):
        recommend(empty, "u", "live", 1)
    first = world()
    first.blobs = {}
    bare = replica(first)
    with pytest.raises(NotReady, match="catalogue"):
        recommend(bare, "u", "live", 1)
    assert rank(bare, "u", "live", [1]).items


def test_info_tells_the_version():
    made = replica(world())
    made.apply(Version(1, 2, base=(1, 1), created_ms=77, positions={0: 15, 3: 1}, info={"rows": 9}))
    info = made.info()
    assert (info.version, info.epoch, info.sequence, info.created_ms, info.applied_ms) == ("1.2", 1, 2, 77, NOW + HOUR)
    assert (info.positions, info.info) == ({"0": 15, "3": 1}, {"rows": 9})
    assert info.rows == {USER: 6, ITEM: 40, CATEGORY: 4, SELLER: 2, WORD: 3, CARD: 40}


def test_scenarios_are_those_of_the_events():
    assert typing.get_args(Scenario) == SCENARIOS == tuple(SCENARIO_INDEX)


def test_a_replica_grows_with_what_comes():
    made = replica(world(3, 1))
    for n in (5, 60, 700):  # it starts with room for 4
        made.apply(delta(made.sequence + 1, tables=world(n, 40).tables, blobs=world(n, 40).blobs))
        assert made.rows() == {USER: 40, ITEM: n, CATEGORY: 4, SELLER: 2, WORD: 3, CARD: n}
    fresh = replica(world(700, 40))
    for user in ("u0", "u39"):
        assert rank(made, user, "live", list(range(700))).items == rank(fresh, user, "live", list(range(700))).items
