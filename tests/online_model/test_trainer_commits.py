"""Effectively once: what a commit holds, what a restart goes on from, and what a kill -9 leaves."""


import msgspec
import numpy as np
import orjson
import pytest

from embedding_store.columns import TOUCHED
from embedding_store.delta import Assembler
from embedding_store.errors import DiskFull, PositionError, StoreLocked, UsageError
from embedding_store.expiry import GRAIN_MS
from embedding_store.snapshot import read_snapshot, snapshot_of
from embedding_store.specs import RowRules
from online_model.examples import Examples, Part, Source
from online_model.features import EXTRAS
from online_model.settings import FeatureSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.online_model.killing import learn_and_be_killed
from tests.online_model.logs import START, later, make_blocks, make_rows
from tests.online_model.test_trainer import SMALL, catalogue

BLOCKS, BLOCK = 10, 100


pytestmark = pytest.mark.usefixtures("one_thread")


def log():
    """Ten blocks of rows of every part and source."""
    shown, implicit = make_rows(600), make_rows(250, seed=3, source=Source.IMPLICIT, from_row=10_000)
    clicked = np.flatnonzero(shown.click == 1)
    rows = Examples.concat([
        shown, implicit, later(shown, clicked[:60], Part.WATCH, play_ms=5, duration_ms=9),
        later(shown, clicked[:30], Part.PURCHASE, purchase=1),
        later(shown, np.flatnonzero(shown.click == 0)[:60], Part.LATE_CLICK, click=1, purchase=0),
    ])  # fmt: skip
    rows = rows.take(np.random.default_rng(5).permutation(len(rows)))
    rows.closed = START + np.arange(len(rows))
    return make_blocks(rows, BLOCK)


def opened(path, settings=SMALL, partitions=0):
    return open_trainer(settings, path, lambda: START, partitions)


def learn(trainer, blocks, first=0, drain=False):
    for number, block in enumerate(blocks, first):
        trainer.offer(block, number)
        while trainer.step():
            pass
    while drain and trainer.step(drain=True):
        pass


def everything(trainer):
    """All that must be alike, by name; floats as bytes."""
    out = {f"{t} {n}": c.tobytes() for t, rows in trainer.tables.digest_rows() for n, c in rows.columns.items()}
    out |= {f"ids {t}": rows.ids.tobytes() for t, rows in trainer.tables.digest_rows()}
    out |= {n: a.tobytes() for n, a in {**trainer._ranker.weights(), **trainer._dense_state()}.items()}
    out["state"] = trainer._state()
    out["cards"] = dict(trainer.store.iter_blobs("card"))
    return out


def test_restored_it_goes_on_bit_for_bit(tmp_path):
    blocks = log()
    whole, first = opened(tmp_path / "whole"), opened(tmp_path / "parts")
    for trainer in (whole, first):
        trainer.catalogue(catalogue(20))
    learn(whole, blocks)
    whole.commit()
    learn(first, blocks[:5])
    first.commit()
    first.store.close()
    second = opened(tmp_path / "parts")
    assert second.positions[0].next == 50
    assert (second.epoch, second.sequence) == (1, 1)
    second.catalogue(catalogue(20))
    learn(second, blocks)  # what was learned is offered again
    second.commit()
    assert everything(second) == everything(whole)
    assert second.digest() == whole.digest()
    assert second.info()["metrics"] == whole.info()["metrics"]
    for trainer in (whole, second):
        trainer.store.close()


def test_a_restart_in_the_middle_of_a_block_goes_on_bit_for_bit(tmp_path):
    blocks = log()
    whole, first = opened(tmp_path / "whole"), opened(tmp_path / "parts")
    for number, block in enumerate(blocks):
        whole.offer(block, number)
        first.offer(block, number)
    while whole.step():
        pass
    for _ in range(7):
        first.step()
    first.commit()
    assert first.positions[0].taken == 7 * 64 - 4 * BLOCK
    first.store.close()
    second = opened(tmp_path / "parts")
    for number, block in enumerate(blocks):
        second.offer(block, number)
    while second.step():
        pass
    for trainer in (whole, second):
        trainer.commit()
    assert everything(second) == everything(whole)
    for trainer in (whole, second):
        trainer.store.close()


def test_a_deterministic_run_is_the_same_however_it_is_cut_and_committed(tmp_path):
    rows = [make_rows(300, seed=p) for p in (0, 1)]
    digests = []
    for name, sizes, commits in (("a", (40, 40), 1000), ("b", (7, 90), 3)):
        trainer = opened(tmp_path / name, partitions=2)
        queues = [list(enumerate(make_blocks(rows[p], sizes[p], p, users=False))) for p in (0, 1)]
        while any(queues):
            for queue in queues:
                if queue:
                    number, block = queue.pop(0)
                    block.to_offset = 10_000 if not queue else block.to_offset
                    block.handled, block.counts.rows = 0, 0
                    trainer.offer(block, number)
                while trainer.step():
                    if trainer.info()["trained_rows"] // 64 % commits == 0:
                        trainer.commit()
        while trainer.step(drain=True):
            pass
        trainer.commit()
        digests.append(trainer.digest())
        assert trainer.info()["trained_rows"] == 600
        trainer.store.close()
    assert digests[0] == digests[1]


@pytest.mark.timeout(400)
def test_kill_9_at_any_moment_trains_every_row_once(tmp_path):
    whole = opened(tmp_path / "whole")
    learn(whole, log())
    whole.commit()
    kills = (1, 2, 1, 2, 1, 1)  # after so many commits
    learn_and_be_killed(__name__, tmp_path / "killed", kills, 0.002)  # somewhere in a step or a commit
    again = opened(tmp_path / "killed")
    assert again.info()["trained_rows"] == BLOCKS * BLOCK
    assert everything(again) | {"state": b""} == everything(whole) | {"state": b""}
    assert again.digest() == whole.digest()
    outbox = again.store.outbox()
    assert [s for s, _ in outbox] == list(range(1, again.sequence + 1)), "nothing was acknowledged: all is kept"
    for trainer in (whole, again):
        trainer.store.close()


def test_a_version_holds_what_was_touched_and_where_it_is(tmp_path):
    trainer = opened(tmp_path)
    blocks = log()
    learn(trainer, blocks[:2])
    parts = trainer.commit()
    version = assembled(parts)
    assert (version.epoch, version.sequence, version.base, version.created_ms) == (1, 1, None, START)
    assert version.positions == {0: 19}
    assert set(version.dense) == set(trainer._ranker.weights())
    rows = version.tables["item"]
    assert set(rows.columns) == {
        "weights", "impressions", "clicks", "interactions", "heat", "heat_ms", "neighbours", "nearness", "taken",
        "category", "seller", "words", "created", "duration", "card"
    }  # fmt: skip
    at = trainer.tables.rows("item", rows.ids, admit=False)
    assert (trainer.tables.read_rows("item", at)["weights"] == rows.columns["weights"]).all()
    assert set(version.blobs["card"]) == set(np.concatenate([b.examples.item for b in blocks[:2]]).tolist())
    orjson.dumps(version.info)
    partition = version.info["partitions"]["0"]
    assert {"next", "handled", "rows", "sum", "counts", "watermark"} <= set(partition)
    assert (partition["rows"], partition["next"]) == (200, 20)
    assert partition["sum"] == sum(int(i) for b in blocks[:2] for i in b.examples.row_id) % (1 << 64)
    assert version.info["trained_rows"] == 200
    assert trainer.store.outbox() == [(1, parts)]
    assert trainer.commit() is None, "nothing has changed"
    learn(trainer, blocks[2:3], first=2)
    version = assembled(trainer.commit())
    assert (version.sequence, version.base) == (2, (1, 1))
    users = set(blocks[2].examples.user.tolist())
    assert set(version.tables["user"].ids.tolist()) == users, "only what was touched since"
    trainer.store.close()


def test_a_block_without_rows_makes_a_version_too(tmp_path):
    trainer = opened(tmp_path)
    blocks = log()
    learn(trainer, blocks[:1])
    trainer.commit()
    empty = blocks[1]
    empty.examples, empty.users = Examples.empty(), empty.users[:0]
    assert trainer.offer(empty, 1)
    version = assembled(trainer.commit())
    assert version.positions == {0: 19}, "freshness: replicas must see that the offset is handled"
    assert version.tables == {}
    trainer.store.close()


def assembled(parts):
    assembler = Assembler()
    versions = [v for v in map(assembler.add, parts) if v]
    assert len(versions) == 1
    return versions[0]


def test_a_commit_that_fails_forgets_nothing(tmp_path, monkeypatch):
    trainer = opened(tmp_path / "a")
    learn(trainer, log()[:2])
    commit = trainer.store.commit

    def full(_):
        raise DiskFull("no space left: make room")

    monkeypatch.setattr(trainer.store, "commit", full)
    for _ in range(2):
        with pytest.raises(DiskFull):
            trainer.commit()
    assert trainer.sequence == 0
    monkeypatch.setattr(trainer.store, "commit", commit)
    version = assembled(trainer.commit())
    whole = opened(tmp_path / "b")
    learn(whole, log()[:2])
    expected = assembled(whole.commit())
    assert version.sequence == 1
    assert version.blobs == expected.blobs
    for table, rows in expected.tables.items():
        assert version.tables[table].ids.tolist() == rows.ids.tolist()
    assert trainer.digest() == whole.digest()
    for t in (trainer, whole):
        t.store.close()


def test_a_fresh_start_is_epoch_one_and_changed_settings_raise_it(tmp_path):
    trainer = opened(tmp_path)
    assert (trainer.epoch, trainer.sequence) == (1, 0)
    learn(trainer, log()[:1])
    trainer.commit()
    trainer.store.close()
    changed = msgspec.structs.replace(SMALL, learning_rate=1e-3)
    for _ in range(2):  # a crash before the first commit of the epoch changes nothing
        trainer = opened(tmp_path, changed)
        assert (trainer.epoch, trainer.sequence) == (2, 1)
        trainer.store.close()
    trainer = opened(tmp_path, changed)
    learn(trainer, log()[:2])
    version = assembled(trainer.commit())
    assert (version.epoch, version.sequence, version.base) == (2, 2, (1, 1))
    trainer.store.close()
    trainer = opened(tmp_path, changed)
    assert (trainer.epoch, trainer.sequence) == (2, 2)
    trainer.store.close()


def test_what_cannot_go_on_is_refused_with_a_remedy(tmp_path):
    trainer = opened(tmp_path)
    learn(trainer, log()[:1])
    trainer.commit()
    with pytest.raises(PositionError, match="offset 10 is next"):
        trainer.offer(log()[2], 2)
    assert trainer.offer(log()[1], 1), "a refused block spoils nothing"
    with pytest.raises(StoreLocked):
        opened(tmp_path)
    trainer.store.close()
    with pytest.raises(UsageError, match="set hidden back to 16"):
        opened(tmp_path, msgspec.structs.replace(SMALL, ranker=msgspec.structs.replace(SMALL.ranker, hidden=8)))
    with pytest.raises(UsageError, match="set dim back to 8"):
        opened(tmp_path, TrainerSettings(features=FeatureSettings(dim=4)))
    opened(tmp_path).store.close()


@pytest.mark.parametrize("optimizer", ["row_wise_adagrad", "adagrad", "sgd"])
def test_a_model_larger_than_memory_is_the_same_model(tmp_path, optimizer):
    blocks = make_blocks(make_rows(600, users=150, items=400), 40)
    digests, fits = [], FeatureSettings(dim=8, optimizer=optimizer)
    small = msgspec.structs.replace(fits, users=60, items=330)
    for name, features in (("fits", fits), ("small", small)):
        trainer = opened(tmp_path / name, msgspec.structs.replace(SMALL, batch_size=10, features=features))
        for number, block in enumerate(blocks):
            trainer.offer(block, number)
            while trainer.step():
                if trainer.commit_due():
                    trainer.commit()
        trainer.commit()
        assert trainer.info()["no_room"] == dict.fromkeys(EXTRAS, 0)
        digests.append(trainer.digest())
        trainer.store.close()
    assert digests[0] == digests[1]


def test_no_clock_but_the_injected_one(tmp_path, monkeypatch):
    for name in ("time", "time_ns", "monotonic"):
        monkeypatch.setattr(f"online_model.trainer.{name}", None, raising=False)
    trainer = open_trainer(SMALL, tmp_path, lambda: 42)
    learn(trainer, log()[:1])
    assert assembled(trainer.commit()).created_ms == 42
    assert isinstance(trainer, Trainer)
    trainer.store.close()


RULES = FeatureSettings(
    dim=8,
    user_rules=RowRules(admit_after=2, admit_cells=1 << 12, expire_after_ms=3 * GRAIN_MS, evict="lfu"),
    item_rules=RowRules(admit_share=0.5, evict="score"),
)


def test_which_rows_there_are_hangs_on_the_log_alone(tmp_path):
    """Admission by count and by chance, expiry: the same model from one commit, many, a small memory and a restart."""
    rows = make_rows(600, users=150, items=400)
    rows.closed = START + np.arange(600) * (GRAIN_MS // 40)
    blocks, digests = make_blocks(rows, 40), []
    small = msgspec.structs.replace(RULES, users=60, items=330)
    runs = (("one", RULES, 100, ()), ("many", small, 1, ()), ("again", small, 2, (4, 9)))
    for name, features, every, restarts in runs:
        settings = msgspec.structs.replace(SMALL, batch_size=10, features=features)
        trainer, gone, parts = opened(tmp_path / name, settings), set(), []
        for number, block in enumerate(blocks):
            trainer.offer(block, number)
            while trainer.step():
                if trainer.commit_due():
                    parts.append(trainer.commit())
            if number % every == every - 1 or number in restarts:
                parts.append(trainer.commit())
            if number in restarts:
                trainer.store.close()
                trainer = opened(tmp_path / name, settings)
        parts.append(trainer.commit())
        for version in (assembled(p) for p in parts if p):
            gone |= set(version.gone.get("user", []))
            assert all(TOUCHED not in rows.columns for rows in version.tables.values())
            assert set(version.blobs) <= {"card"}
        users = sum(len(rows) for table, rows in trainer.tables.digest_rows() if table == "user")
        items = sum(len(rows) for table, rows in trainer.tables.digest_rows() if table == "item")
        assert gone
        assert 0 < users < len(np.unique(rows.user))
        assert 0 < items < len(np.unique(rows.item))
        assert trainer.erasures == 0, "to expire is not to be erased: nothing need be purged"
        digests.append(trainer.digest())
        path = snapshot_of(trainer.store, tmp_path / f"snapshots-{name}")
        assert set(read_snapshot(path).blobs) <= {"card"}
        trainer.store.close()
    assert digests[0] == digests[1] == digests[2]


def test_items_do_not_expire():
    with pytest.raises(ValueError, match="catalogue"):
        FeatureSettings(item_rules=RowRules(expire_after_ms=1))


def test_dense_weights_that_wait_go_later_and_a_restart_knows_that_they_do(tmp_path):
    blocks, trainer, versions = log(), opened(tmp_path), []

    def commit(dense):
        assembler, parts = Assembler(), trainer.commit(dense=dense)
        if parts is not None:
            versions.extend(filter(None, map(assembler.add, parts)))
        return parts

    learn(trainer, blocks[:2])
    commit(False)
    assert versions[0].dense.keys() == trainer._ranker.weights().keys(), "a first version holds everything"
    assert not trainer.owes_dense
    learn(trainer, blocks[2:4], 2)
    commit(False)
    assert versions[1].tables, "rows go at once"
    assert not versions[1].dense
    assert trainer.owes_dense
    assert commit(False) is None, "nothing new, and they may not go yet"
    stored, live = trainer.store.head().dense, trainer._ranker.weights()
    assert all(np.array_equal(stored[name], w) for name, w in live.items()), "the store has them all the same"
    trainer.store.close()

    trainer = opened(tmp_path)
    assert trainer.owes_dense
    commit(True)
    assert all(np.array_equal(versions[2].dense[name], w) for name, w in live.items())
    assert not versions[2].tables
    assert not trainer.owes_dense
    assert commit(True) is None
    trainer.store.close()


def test_a_snapshot_says_the_dense_weights_that_replicas_have_while_newer_ones_are_owed(tmp_path):
    blocks, trainer = log(), opened(tmp_path / "s")

    def dense_of(parts):
        (version,) = filter(None, map(Assembler().add, parts))
        return version.dense

    def snapshot():
        return read_snapshot(snapshot_of(trainer.store, tmp_path / "snapshots")).dense

    def same(one, other):
        return one.keys() == other.keys() and all(np.array_equal(one[name], w) for name, w in other.items())

    learn(trainer, blocks[:2])
    sent = dense_of(trainer.commit(dense=True))
    for first in (2, 4):  # owed, and owed still
        learn(trainer, blocks[first : first + 2], first)
        assert dense_of(trainer.commit(dense=False)) == {}
        assert same(snapshot(), sent)
    assert not same(trainer._ranker.weights(), sent)
    trainer.store.close()

    trainer = opened(tmp_path / "s")
    learn(trainer, blocks[6:8], 6)
    assert dense_of(trainer.commit(dense=False)) == {}
    assert same(snapshot(), sent), "after a restart too"
    newer = dense_of(trainer.commit(dense=True))
    assert same(snapshot(), newer)
    assert not same(newer, sent)
    learn(trainer, blocks[8:], 8)
    assert dense_of(trainer.commit(dense=False)) == {}
    assert same(snapshot(), newer)
    trainer.store.close()
