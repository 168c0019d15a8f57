"""Rows that a budget holds back: which go first, what they cost, and that a refresh leaves none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, WEIGHTS, TableRows, concat
from embedding_store.delta import Assembler, Version, encode, row_bytes
from embedding_store.encoding import ENCODINGS
from embedding_store.errors import UsageError
from embedding_store.owed import Owed, Plan
from embedding_store.specs import TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from tests.embedding_store.made import LAYOUTS

FIRST = {"user": ("history",)}
ITEM, USER = (row_bytes(LAYOUTS[table], "fp32") for table in ("item", "user"))
REFRESH_MS = 10_000


class Owner:
    """A store and what is owed, with rows given by hand."""

    def __init__(self, path: Path, rate: int) -> None:
        self.store = CheckpointStore(path, LAYOUTS)
        self.owed, self.rate = Owed(self.store, rate, REFRESH_MS, FIRST), rate
        self.owed.restore()

    def commit(self, now_ms: int, gone: dict[str, list[int]] | None = None, **rows: dict[int, float]) -> Plan:
        """Rows by table: id → the value of each weight; a history has ten times that."""
        touched = {table: _rows(table, values) for table, values in rows.items()}
        away = {table: np.array(ids, np.int64) for table, ids in (gone or {}).items()}
        plan = self.owed.plan(touched, away, now_ms)
        sequence = (head.sequence if (head := self.store.head()) else 0) + 1
        version = Version(1, sequence, created_ms=now_ms)
        self.store.commit(Commit(1, sequence, b"", rows=touched, gone=away, version=version, records=plan.records))
        self.owed.accept(plan, now_ms)
        return plan

    def again(self) -> Owner:
        self.store.close()
        return Owner(self.store.path, self.rate)


def _rows(table: str, values: dict[int, float], clicks: float = 0.0) -> TableRows:
    layout, ids = LAYOUTS[table], np.array(sorted(values), np.int64)
    rows = TableRows(ids, {n: np.zeros((len(ids), *layout[n].shape), layout[n].base) for n in layout.names or ()})
    given = np.array([values[i] for i in ids.tolist()])
    rows.columns[WEIGHTS][:] = given[:, None]
    if table == "user":
        rows.columns["history"][:] = 10 * given[:, None]
    else:
        rows.columns["clicks"][:] = clicks
    return rows


def _sent(plan: Plan) -> dict[str, list[int]]:
    return {table: rows.ids.tolist() for table, rows in plan.tables.items()}


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """With a budget of two items a second."""
    made = Owner(tmp_path / "s", 2 * ITEM)
    made.commit(0)
    yield made
    made.store.close()


def test_without_a_budget_all_goes_and_nothing_is_noted(tmp_path: Path) -> None:
    owner = Owner(tmp_path / "s", 0)
    plan = owner.commit(0, item={1: 1.0, 2: 2.0}, user={5: 1.0})
    assert _sent(plan) == {"item": [1, 2], "user": [5]}
    assert all(MOMENTUM not in rows.columns for rows in plan.tables.values())
    assert plan.records == {}
    assert plan.info(99) == {"rows": 0, "oldest_ms": 0}
    owner.store.close()


def test_what_moved_most_goes_first_and_moves_add_up(owner: Owner) -> None:
    assert _sent(owner.commit(1_000, item={1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5})) == {"item": [2, 4]}
    # 1 has moved by 1 and then by 2, there and back; 5 by 1.5.
    assert _sent(owner.commit(1_500, item={1: -1.0, 5: 1.5})) == {"item": [1]}
    assert owner.owed.info(1_700) == {"rows": 2, "oldest_ms": 700}
    plan = owner.commit(2_500)
    assert _sent(plan) == {"item": [3, 5]}
    assert plan.tables["item"].columns[WEIGHTS][:, 0].tolist() == [2.0, 1.5]
    assert owner.owed.rows == 0
    assert list(owner.store.records()) == []


def test_a_count_moves_a_row_by_its_log(owner: Owner) -> None:
    owner.commit(2_000, item={1: 0.0, 2: 0.0, 3: 0.0})
    owner.commit(4_000)
    few, many = _rows("item", {1: 0.0}, clicks=1), _rows("item", {2: 0.0}, clicks=1)
    owner.store.commit(Commit(1, 9, b"", rows={"item": _rows("item", {2: 0.0}, clicks=1_000)}))
    many.columns["clicks"][:] = 1_001
    touched = TableRows(np.array([1, 2]), {n: np.concatenate((few.columns[n], many.columns[n])) for n in few.columns})
    assert _sent(owner.owed.plan({"item": touched}, {}, 4_500)) == {"item": [1]}


def test_a_changed_history_goes_before_all_that_moved_the_longest_waiting_before_others(tmp_path: Path) -> None:
    owner = Owner(tmp_path / "s", USER)
    owner.commit(0)
    assert _sent(owner.commit(1_000, user={7: 0.1, 3: 0.2}, item={1: 99.0})) == {"user": [3]}
    assert _sent(owner.commit(2_000, user={3: 0.3, 9: 50.0})) == {"user": [7]}, "7 has waited longer than 3 and 9"
    again = owner.again()
    assert _sent(again.commit(3_000)) == {"user": [3]}, "of those of one time the smaller id"
    assert _sent(again.commit(4_000)) == {"user": [9]}
    assert _sent(again.commit(5_000)) == {"item": [1]}
    again.store.close()


def test_changed_histories_take_half_while_others_wait_and_either_takes_what_the_other_leaves(tmp_path: Path) -> None:
    owner = Owner(tmp_path / "s", 4 * USER)
    owner.commit(0)
    users, items = {i: 0.1 for i in range(1, 9)}, {i: 1.0 + i for i in range(1, 9)}
    assert 2 * USER // ITEM == 2
    assert _sent(owner.commit(1_000, user=users, item=items)) == {"item": [7, 8], "user": [1, 2]}
    assert _sent(owner.commit(2_000)) == {"item": [5, 6], "user": [3, 4]}
    assert _sent(owner.commit(2_000, user={9: 0.1}, item={1: -50.0})) == {}
    assert _sent(owner.commit(3_400)) == {"item": [1, 3, 4], "user": [5, 6, 7]}, "of moves the largest"
    assert _sent(owner.commit(4_400)) == {"item": [2], "user": [8, 9]}
    owner.store.close()


def test_carried_rows_go_in_their_value_of_then_after_a_restart_too(owner: Owner) -> None:
    owner.commit(500, item={1: 5.0, 2: 1.0})
    owner.commit(500, item={2: 7.0})
    again = owner.again()
    assert again.owed.info(800) == {"rows": 1, "oldest_ms": 300}
    plan = again.commit(1_000)
    assert _sent(plan) == {"item": [2]}
    assert plan.tables["item"].columns[WEIGHTS][0].tolist() == [7.0] * 4
    again.store.close()


def test_what_is_gone_is_not_owed_and_begins_anew(owner: Owner) -> None:
    owner.commit(0, item={1: 5.0, 2: 1.0, 3: 1.0})
    assert owner.owed.rows == 3
    owner.commit(0, gone={"item": [1, 2]}, item={2: 4.0})
    assert owner.owed.rows == 2
    assert _sent(owner.commit(500)) == {"item": [2]}, "2 has moved by 4 from nothing"
    assert _sent(owner.commit(1_000)) == {"item": [3]}


def test_after_the_interval_all_that_is_owed_goes_whatever_the_budget_says(tmp_path: Path) -> None:
    owner = Owner(tmp_path / "s", 1)
    owner.commit(0, item={i: float(i) for i in range(1, 50)})
    assert _sent(owner.commit(REFRESH_MS - 1, user={1: 1.0})) == {}
    again = owner.again()
    plan = again.commit(REFRESH_MS)
    assert _sent(plan) == {"item": list(range(1, 50)), "user": [1]}
    assert again.owed.info(REFRESH_MS) == {"rows": 0, "oldest_ms": 0}
    assert _sent(again.commit(REFRESH_MS, item={1: 9.0})) == {}, "and then the budget holds again"
    again.store.close()


def test_a_clock_that_is_set_back_does_not_put_the_refresh_off(owner: Owner) -> None:
    owner.commit(1_000_000, item={})
    owner.commit(1_000_000, item={1: 1.0, 2: 1.0})
    assert _sent(owner.commit(0)) == {}
    owner.commit(100, item={3: 1.0})
    assert owner.owed.info(100) == {"rows": 3, "oldest_ms": 100}
    assert _sent(owner.commit(REFRESH_MS))["item"] == [1, 2, 3]


def test_a_budget_that_is_taken_away_pays_what_is_owed(tmp_path: Path) -> None:
    owner = Owner(tmp_path / "s", 1)
    owner.commit(0, item={1: 1.0})
    owner.store.close()
    free = Owner(tmp_path / "s", 0)
    assert _sent(free.commit(0, item={2: 1.0})) == {"item": [1, 2]}
    assert list(free.store.records()) == []
    free.store.close()


def test_a_row_that_a_rollback_took_away_is_dropped(owner: Owner) -> None:
    owner.commit(0, item={1: 1.0, 2: 2.0})
    owner.store.commit(Commit(1, 50, b"", gone={"item": np.array([1])}))  # as a rollback's commit has it
    again = owner.again()
    assert _sent(again.commit(10_000)) == {"item": [2]}
    assert list(again.store.records()) == []
    again.store.close()


def test_a_weight_that_is_not_finite_goes_first_and_harms_no_order(owner: Owner) -> None:
    assert _sent(owner.commit(500, item={1: 1.0, 2: float("nan"), 3: 5.0})) == {"item": [2]}
    assert _sent(owner.commit(1_000)) == {"item": [3]}


def test_ids_in_a_row_are_no_distance(tmp_path: Path) -> None:
    """Half of them are negative, and have no logarithm: their rows would go before all others."""
    owner = Owner(tmp_path, 2 * ITEM)
    for unmeasured, first in ((("clicks",), 2), ((), 1)):
        owned = Owed(owner.store, 2 * ITEM, REFRESH_MS, FIRST, unmeasured=unmeasured)
        touched = {"item": concat([_rows("item", {1: 1.0}, clicks=-7), _rows("item", {2: 5.0})])}
        assert _sent(owned.plan(touched, {}, 500)) == {"item": [first]}
    owner.store.close()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_of_a_row_are_those_of_the_wire(encoding: str) -> None:
    def size(n: int) -> int:
        rows = _rows("item", dict.fromkeys(range(n), 1.0)).without(MOMENTUM)
        return sum(map(len, encode(Version(1, 1, tables={"item": rows}), rows=encoding)))

    assert size(2_000) - size(1_000) == pytest.approx(1_000 * row_bytes(LAYOUTS["item"], encoding), abs=64)


def test_tables_with_features_of_the_same_name_learn_and_travel_each_by_itself() -> None:
    settings = TableSettings(dim=4, capacity=10, learning_rate=0.1)
    specs = [TableSpec("a", ("id", "only"), settings), TableSpec("b", ("id",), settings)]
    tables = EmbeddingTables(specs)
    rows = {"a.id": (tables.rows("a", np.array([7]), admit=True), None),
            "b.id": (tables.rows("b", np.array([7, 8]), admit=True), None)}  # fmt: skip
    tables.clear_touched()
    out = tables.embed(rows)
    assert [tuple(e.shape) for e in out.values()] == [(1, 4), (2, 4)]
    (out["a.id"].sum() - 2 * out["b.id"].sum()).backward()
    touched = tables.touched()
    assert {table: rows.ids.tolist() for table, rows in touched.items()} == {"a": [7], "b": [7, 8]}
    (version,) = filter(None, map(Assembler().add, encode(Version(1, 1, tables=touched))))
    assert (version.tables["a"].columns[WEIGHTS] < 0).all()
    assert (version.tables["b"].columns[WEIGHTS] > 0).all()
    with torch.no_grad():
        tables.embed({"only": (np.array([1]), None)})
    with pytest.raises(ValueError, match=r"no table has the feature 'id'"):
        tables.embed({"id": (np.array([1]), None)})
    with pytest.raises(UsageError, match="twice"):
        EmbeddingTables([TableSpec("a", ("id", "id"), settings)])
