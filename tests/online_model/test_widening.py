"""A model of another shape goes on where it was: the same scores, all that it learned, a new epoch."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store import faults
from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS, layout
from embedding_store.delta import Assembler, Version
from embedding_store.errors import UsageError
from embedding_store.kept import KeptCheckpoints
from embedding_store.reshape import reshape
from embedding_store.snapshot import read_snapshot, snapshot_of
from embedding_store.specs import RowRules
from online_model.checkpoints import describe, roll_back
from online_model.features import CATEGORY, CONTEXT, EXTRAS, ITEM, NUMBERS, USER
from online_model.feedback import strategy
from online_model.history import HISTORY
from online_model.neighbours import NEIGHBOURS
from online_model.ranker import HEADS, SCENARIO_COUNT, Contexts, Items, Ranker
from online_model.serving.errors import VersionGap
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import RankerSettings, TrainerSettings
from online_model.trainer import Trainer
from online_model.widening import widened
from tests.online_model.logs import START
from tests.online_model.serving.world import rank
from tests.online_model.test_checkpoints import ids_of
from tests.online_model.test_trainer import SMALL, catalogue
from tests.online_model.test_trainer_commits import learn, log, opened
from tests.streams.children import processes

pytestmark = pytest.mark.usefixtures("one_thread")

BEFORE = msgspec.structs.replace(SMALL, feedback="weighted")
NEAR_WEIGHTS = ("wide_near", "tower_near")
RESHAPE = [point for point in faults.POINTS if point.partition(".")[0] in ("reshape", "replace")]
LAST_BITS = 1e-6  # the products with zeros add nothing, but a longer sum is added up in another order


def other(dim: int = 8, hidden: int = 16, second: int = 8, third: int = 8, **changes: object) -> TrainerSettings:
    features = msgspec.structs.replace(BEFORE.features, dim=dim)
    return msgspec.structs.replace(
        BEFORE, features=features, **changes,
        ranker=msgspec.structs.replace(BEFORE.ranker, hidden=hidden, second=second, third=third),
    )  # fmt: skip


WIDE = other(dim=16, hidden=24, second=12, third=10)
SHAPES = {
    "dim": other(dim=12),
    "dim past a word of start_weights": other(dim=68),
    "hidden": other(hidden=20),
    "second": other(second=9),
    "third": other(third=11),
    "all": WIDE,
    "heads": other(feedback="elapsed", purchase_wait_ms=60_000),
    "all and heads": other(dim=16, hidden=17, second=9, third=12, feedback="elapsed", purchase_wait_ms=60_000),
}


def learned(path: Path, settings: TrainerSettings = BEFORE, blocks: slice = slice(6)) -> None:
    """A store that has learned blocks of the log, and items of the catalogue."""
    trainer = opened(path, settings)
    trainer.catalogue(catalogue(20))
    learn(trainer, log()[blocks])
    trainer.commit()
    trainer.store.close()


def replica_of(trainer: Trainer, folder: Path) -> Replica:
    """A replica that starts from a snapshot of the trainer's last commit, made as that says that it is to be."""
    version = read_snapshot(snapshot_of(trainer.store, folder))
    told = msgspec.convert(version.info["settings"], TrainerSettings)
    replica = Replica(ReplicaSettings(), told.features, told.ranker, lambda: START + 10**7, told.feedback)
    replica.apply(version)
    return replica


def scores(replica: Replica) -> np.ndarray:
    """Click, watch, purchase of 20 users and 40 items, some of which nobody knows: [20, 40, 3]."""
    out = []
    for user in range(20):
        ranked = sorted(rank(replica, user, "live", range(40)).items, key=lambda r: r.item)
        out.append([(r.click, r.watch, r.purchase) for r in ranked])
    return np.array(out)


def versions_of(parts: list[bytes] | None) -> list[Version]:
    assembler = Assembler()
    return [v for part in parts or () if (v := assembler.add(part)) is not None]


@pytest.mark.parametrize("wanted", SHAPES.values(), ids=SHAPES.keys())
def test_a_wider_model_scores_as_before_and_goes_on_learning(wanted: TrainerSettings, tmp_path: Path) -> None:
    learned(tmp_path / "s")
    narrow = opened(tmp_path / "s", BEFORE)
    before, known = scores(replica_of(narrow, tmp_path / "snapshots")), narrow.positions
    narrow.store.close()
    trainer = opened(tmp_path / "s", wanted)
    assert trainer.positions == known
    assert (trainer.epoch, trainer.sequence, trainer.begun) == (2, 2, True)
    replica = replica_of(trainer, tmp_path / "snapshots")
    assert replica.version == "2.2"
    np.testing.assert_allclose(scores(replica), before, atol=LAST_BITS, rtol=0)
    start = trainer._ranker.weights()
    learn(trainer, log()[6:], 6)
    for version in versions_of(trainer.commit()):
        assert version.base == (2, 2)
        assert replica.apply(version)
    trainer.store.close()
    assert (trainer.positions[0].rows, trainer.positions[0].sum) == ids_of(log())
    assert trainer.info()["left_out"] == 0
    for name, weights in trainer._ranker.weights().items():
        moved = weights != start[name]
        sparse = ("place", "wide", "from_scenario", "scenario", "plays")
        if weights.ndim == 2 and name.removesuffix(".weight") not in sparse:
            assert moved.any(1).mean() >= 0.8, f"units of {name} do not learn"
            # Of products: new weights of rows start from zero, so what multiplies them moves by little at first.
            least = 0.2 if name in ("from_match.weight", "from_attended.weight") else 0.8
            assert moved.any(0).mean() >= least, f"inputs of {name} do not learn"
    ids = np.array([item for item, *_ in catalogue(20)])
    rows = trainer.tables.read_rows(ITEM, trainer.tables.rows(ITEM, ids, admit=False))
    assert (rows[WEIGHTS] != 0).all(), "new weights of items that were known learn too"


def test_one_line_says_what_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learned(tmp_path / "s")
    with caplog.at_level("INFO", "headrace"):
        opened(tmp_path / "s", SHAPES["all and heads"]).store.close()
    tables = "".join(f"table {table} widened from dim 8 to 16; " for table in sorted(EXTRAS))
    line = (
        f"{tables}hidden from 16 to 17; second from 8 to 9; third from 8 to 12; heads from 4 to 6; "
        "going on in epoch 2"
    )
    assert caplog.messages == [f"another shape of the model: {line}"]


def test_all_that_was_known_is_there_and_what_is_new_is_as_said(tmp_path: Path) -> None:
    learned(tmp_path / "s")
    with CheckpointStore(tmp_path / "s", None) as store:
        head, rows = store.head(), {t: next(store.iter_rows(t)) for t in store.layouts}
    trainer = opened(tmp_path / "s", WIDE)
    fresh = Ranker(16, WIDE.ranker).weights()
    new = trainer.store.head()
    assert new.place == (2, 2)
    for table, old in rows.items():
        got = next(trainer.store.iter_rows(table))
        assert got.ids.tolist() == old.ids.tolist()
        assert got.columns[WEIGHTS][:, :8].tobytes() == old.columns[WEIGHTS].tobytes()
        assert not got.columns[WEIGHTS][:, 8:].any()
        assert {n: c.tobytes() for n, c in got.without(WEIGHTS).columns.items()} == {
            n: c.tobytes() for n, c in old.without(WEIGHTS).columns.items()
        }
    old, dense = head.dense, new.dense
    assert dense.keys() == old.keys()
    for name in (n for n in old if n.partition(".")[0] in ("recent", "scores") or n.endswith(".step")):
        assert dense[name].tobytes() == old[name].tobytes(), name
    columns = [*range(8), *range(16, 24)]  # of item, content
    for name in ("from_item.weight", "adam.from_item.weight.exp_avg", "adam.from_item.weight.exp_avg_sq"):
        assert dense[name][:16, columns].tobytes() == old[name].tobytes()
    assert not dense["adam.from_item.weight.exp_avg"][16:].any()
    np.testing.assert_array_equal(dense["from_item.weight"][16:], fresh["from_item.weight"][16:])
    np.testing.assert_array_equal(dense["from_history.weight"][8:, 8:], np.eye(8))
    assert not dense["from_history.weight"][8:, :8].any()
    assert not dense["second.weight"][:8, 16:].any()
    np.testing.assert_array_equal(dense["second.weight"][8:], fresh["second.weight"][8:])
    assert not dense["heads"][:, 8:].any()
    experts = dense["experts.weight"].reshape(3, 10, 12)
    np.testing.assert_array_equal(experts[:, :8, :8], old["experts.weight"].reshape(3, 8, 8))
    assert not experts[:, :8, 8:].any()
    trainer.store.close()


def test_a_store_from_before_items_had_neighbours_goes_on_with_the_same_scores(tmp_path: Path) -> None:
    learned(tmp_path / "s")
    new = {"neighbours", "nearness", "taken"}
    with CheckpointStore(tmp_path / "s", None) as store:
        layouts, head, version = store.layouts, store.head(), store.version()
        plain = read_snapshot(snapshot_of(store, tmp_path / "plain"))
    for array in (*(plain.tables[ITEM].columns[name] for name in new), *(plain.dense[n] for n in NEAR_WEIGHTS)):
        assert array.any()
        array[:] = 0
    without = Replica(ReplicaSettings(), BEFORE.features, BEFORE.ranker, lambda: START + 10**7, BEFORE.feedback)
    without.apply(plain)
    kept = [name for name in layouts[ITEM].names if name not in new]
    older = layouts | {ITEM: np.dtype([(name, layouts[ITEM][name]) for name in kept])}
    dense = {n: w for n, w in head.dense.items() if not any(name in n for name in NEAR_WEIGHTS)}

    def commit(store: CheckpointStore) -> None:
        weights = {name: w for name, w in dense.items() if name in version.dense}
        told = replace(version, sequence=head.sequence + 1, dense=weights)
        store.commit(Commit(head.epoch, head.sequence + 1, head.state, dense, version=told))

    reshape(tmp_path / "s", older, commit)
    trainer = opened(tmp_path / "s", BEFORE)
    assert trainer.store.head().place == (2, head.sequence + 2)
    assert not trainer._ranker.weights()["tower_near"].any()
    np.testing.assert_allclose(scores(replica_of(trainer, tmp_path / "snapshots")), scores(without), atol=LAST_BITS)
    learn(trainer, log()[6:8])
    assert trainer.commit()
    assert any(rows.columns["taken"].any() for rows in trainer.store.iter_rows(ITEM)), "it counts from then on"
    trainer.store.close()


SIZES = st.tuples(
    st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(4, 9), st.sampled_from(["none", "elapsed"])
)


@settings(max_examples=30, deadline=None)
@given(before=SIZES, more=SIZES, experts=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_any_wider_network_is_the_same_function(before: tuple, more: tuple, experts: int, seed: int) -> None:
    (dims, *widths, feedback), torch_seed = before, torch.manual_seed(seed)

    def ranker_of(dims: int, widths: list[int], feedback: str) -> Ranker:
        hidden, second, third = widths
        sizes = RankerSettings(hidden=hidden, second=second, third=third, experts=experts)
        return Ranker(4 * dims, sizes, len(strategy(feedback, 1).extra))

    narrow = ranker_of(dims, widths, feedback)
    wide = ranker_of(dims + more[0], [a + b for a, b in zip(widths, more[1:4], strict=True)], more[4])
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_seed))
    stored = narrow.weights() | {f"adam.{n}.exp_avg": w for n, w in narrow.weights().items()}
    out = widened(stored, wide.weights())
    wide.load_weights({name: out[name] for name in wide.weights()})
    assert all(out[f"adam.{name}.exp_avg"].shape == w.shape for name, w in wide.weights().items() if name != "plays")
    n, contexts = 6, 3
    user, query = torch.randn(2, contexts, narrow.dim, generator=torch_seed)
    entries = torch.randn(contexts, HISTORY, narrow.dim, generator=torch_seed)
    item, content = torch.randn(2, n, narrow.dim, generator=torch_seed)
    kinds = torch.randint(1, 6, (contexts, HISTORY), generator=torch_seed)
    rest = torch.rand(contexts, HISTORY), torch.randn(contexts, CONTEXT), torch.arange(contexts) % SCENARIO_COUNT
    numbers, ctx = torch.randn(n, NUMBERS, generator=torch_seed), torch.arange(n) % contexts
    near = torch.randn(n, NEIGHBOURS, generator=torch_seed)

    def answers(ranker: Ranker) -> tuple[torch.Tensor, torch.Tensor]:
        pad = (0, ranker.dim - narrow.dim)
        u, e, q, i, c = (torch.nn.functional.pad(v, pad) for v in (user, entries, query, item, content))
        recency, moment, scenario = rest
        about = Contexts(u, e, kinds, recency, q, moment, scenario)
        items = Items(i, c, numbers, near, torch.arange(n), ctx)
        with torch.inference_mode():
            a, b = ranker.towers(about)
            return ranker(about, items)[:, : len(HEADS)], (a[ctx] * i + b[ctx] * c).sum(1)

    for got, expected in zip(answers(wide), answers(narrow), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_replicas_of_the_old_shape_see_a_gap_and_load_the_snapshot(tmp_path: Path) -> None:
    learned(tmp_path / "s")
    trainer = opened(tmp_path / "s", BEFORE)
    old = replica_of(trainer, tmp_path / "snapshots")
    held = old.version
    trainer.store.close()
    trainer = opened(tmp_path / "s", WIDE)
    assert [s for s, _ in trainer.store.outbox()] == [1], "what the broker may not have is sent, and nothing of its own"
    new = replica_of(trainer, tmp_path / "snapshots")
    learn(trainer, log()[6:8], 6)
    (version,) = versions_of(trainer.commit())
    with pytest.raises(VersionGap):
        old.apply(version)
    assert old.version == held
    assert new.apply(version)
    trainer.store.close()


def test_settings_of_the_same_shape_leave_the_store_where_it_is(tmp_path: Path) -> None:
    learned(tmp_path / "s")
    made = (tmp_path / "s").stat().st_ino
    trainer = opened(tmp_path / "s", msgspec.structs.replace(BEFORE, learning_rate=0.5))
    assert (trainer.epoch, trainer.sequence) == (2, 1)
    trainer.store.close()
    assert (tmp_path / "s").stat().st_ino == made
    trainer = opened(tmp_path / "s", WIDE)
    trainer.commit()
    trainer.store.close()
    trainer = opened(tmp_path / "s", WIDE)
    assert (trainer.epoch, trainer.sequence) == (2, 2), "once"
    trainer.store.close()


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (other(dim=4), "dim back to 8 or more, or choose an empty data directory"),
        (other(hidden=15), "set hidden back to 16 or more, or choose an empty data directory"),
        (other(dim=16, third=7), "set third back to 8 or more, or choose an empty data directory"),
        (other(dim=16, second=7), "set second back to 8 or more, or choose an empty data directory"),
    ],
)
def test_a_narrower_model_is_refused_and_the_store_is_as_it_was(
    wanted: TrainerSettings, line: str, tmp_path: Path
) -> None:
    learned(tmp_path / "s")
    with pytest.raises(UsageError, match=line) as refused:
        opened(tmp_path / "s", wanted)
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "something was left over"
    trainer = opened(tmp_path / "s", BEFORE)
    assert (trainer.epoch, trainer.sequence) == (1, 1)
    trainer.store.close()


def test_heads_that_only_learning_needed_go_again(tmp_path: Path) -> None:
    learned(tmp_path / "s", SHAPES["heads"])
    trainer = opened(tmp_path / "s", BEFORE)
    assert trainer._ranker.bias.shape == (4,)
    learn(trainer, log()[6:], 6)
    assert trainer.info()["left_out"] == 0
    trainer.store.close()


def test_expiry_is_switched_on_and_off_without_a_row_lost(tmp_path: Path) -> None:
    learned(tmp_path / "s")
    features = msgspec.structs.replace(BEFORE.features, user_rules=RowRules(expire_after_ms=10**9))
    trainer = opened(tmp_path / "s", msgspec.structs.replace(BEFORE, features=features))
    rows = next(trainer.store.iter_rows(USER))
    assert set(rows.columns[TOUCHED].tolist()) == {trainer.store.head().event_time_ms}
    learn(trainer, log()[6:], 6)
    trainer.commit()
    trainer.store.close()
    trainer = opened(tmp_path / "s", BEFORE)
    assert TOUCHED not in next(trainer.store.iter_rows(USER)).columns
    assert trainer.epoch == 3
    assert (trainer.positions[0].rows, trainer.positions[0].sum) == ids_of(log())
    trainer.store.close()


def test_back_to_a_checkpoint_from_before_the_widening(tmp_path: Path) -> None:
    kept = KeptCheckpoints(str(tmp_path / "kept"))
    learned(tmp_path / "s")
    trainer = opened(tmp_path / "s", BEFORE)
    kept.keep(trainer.store, describe, keep=9)
    place = trainer.store.head().place
    rows = {t: next(trainer.store.iter_rows(t)) for t in (USER, ITEM, CATEGORY)}
    trainer.store.close()
    trainer = opened(tmp_path / "s", WIDE)
    trainer.store.remember_gone(place)
    learn(trainer, log()[6:8], 6)
    trainer.commit()
    kept.keep(trainer.store, describe, keep=9)
    after = trainer.store.head().place
    trainer.store.close()
    done = roll_back(tmp_path / "s", kept, place)
    trainer = opened(tmp_path / "s", WIDE)
    assert trainer.epoch == int(done["version"].partition(".")[0]) + 1, "reshaped again, in an epoch of its own"
    for table, old in rows.items():
        got = next(trainer.store.iter_rows(table)).columns
        assert got[WEIGHTS][:, :8].tobytes() == old.columns[WEIGHTS].tobytes()
        assert got[MOMENTUM].tobytes() == old.columns[MOMENTUM].tobytes()
    assert trainer.positions[0].accounted == ids_of(log()[:8])
    learn(trainer, log()[8:], 8)
    trainer.commit()
    assert trainer.positions[0].accounted == ids_of(log())
    trainer.store.close()
    roll_back(tmp_path / "s", kept, after)  # forward, to one of the new shape
    trainer = opened(tmp_path / "s", WIDE)
    assert trainer.positions[0].accounted == ids_of(log())
    trainer.store.close()


def _run(path: str, fault: str) -> None:
    torch.set_num_threads(1)
    faults.arm_from(fault)
    trainer = opened(Path(path), WIDE)
    learn(trainer, log()[6:], 6)
    trainer.commit()
    (Path(path).parent / "digest").write_text(trainer.digest())
    trainer.store.close()


def _end_of(path: Path, fault: str = "") -> int | None:
    process = processes.Process(target=_run, args=(str(path), fault))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow") / "s"
    learned(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = Path(shutil.copytree(narrow, tmp_path_factory.mktemp("undisturbed") / "s"))
    assert _end_of(path) == 0
    return (path.parent / "digest").read_text()


@pytest.mark.parametrize("point", RESHAPE)
def test_killed_while_it_is_reshaped_a_trainer_ends_as_one_that_was_not(
    point: str, narrow: Path, undisturbed: str, tmp_path: Path
) -> None:
    shutil.copytree(narrow, tmp_path / "s")
    assert _end_of(tmp_path / "s", point) == -signal.SIGKILL, f"{point} was never reached"
    assert _end_of(tmp_path / "s") == 0
    assert (tmp_path / "digest").read_text() == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digest", "s"], "something was left over"


def test_back_to_a_checkpoint_from_before_a_table_was_added(tmp_path: Path) -> None:
    """What has gone of that table since is nothing to a store that does not have it."""
    kept = KeptCheckpoints(str(tmp_path / "kept"))
    learned(tmp_path / "s")
    with CheckpointStore(tmp_path / "s", None) as store:
        kept.keep(store, describe, keep=1)
        layouts, head = store.layouts, store.head()
    more = layouts | {"extra": layout(4, {})}

    def commit(store: CheckpointStore) -> None:
        store.remember_gone(head.place)
        gone = {"extra": np.array([7]), USER: np.array([8])}
        store.commit(Commit(head.epoch, head.sequence + 1, head.state, head.dense, gone=gone))

    reshape(tmp_path / "s", more, commit)
    roll_back(tmp_path / "s", kept, None)
    with CheckpointStore(tmp_path / "s", layouts) as store:
        assert store.head().place == (head.epoch + 1, head.sequence + 2)
