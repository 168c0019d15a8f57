"""A rollback takes the model back and nothing else: the positions stay, what is taken back is booked, none is lost."""

from __future__ import annotations

import shutil
import time

import msgspec
import numpy as np
import orjson
import pytest

from embedding_store.checkpoint import CheckpointStore
from embedding_store.delta import Assembler
from embedding_store.errors import CorruptRecord, StoreError, StoreLocked
from embedding_store.kept import KeptCheckpoints
from online_model.checkpoints import about, describe, digest_of, roll_back
from online_model.examples import Part
from online_model.features import EXTRAS
from online_model.serving.errors import VersionGap
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from tests.online_model.logs import START, make_blocks, make_rows
from tests.online_model.test_trainer import SMALL
from tests.online_model.test_trainer_commits import learn, log, opened

pytestmark = pytest.mark.usefixtures("one_thread")
WRAP = 1 << 64


@pytest.fixture
def kept(tmp_path):
    return KeptCheckpoints(str(tmp_path / "kept"))


def ids_of(blocks):
    """(count, sum of the row ids) of some blocks, as an oracle has them from the log."""
    ids = [int(i) for block in blocks for i in block.examples.row_id]
    return len(ids), sum(ids) % WRAP


def model_rows(store):
    return {table: [(r.ids.tolist(), {n: c.tobytes() for n, c in r.columns.items()}) for r in store.iter_rows(table)]
            for table in store.layouts}  # fmt: skip


def trained(path, kept, blocks, keep_at, settings=SMALL):
    """Learns `blocks`, a commit each; kept after those in `keep_at`. Returns the rows of the model at each of these."""
    rows = {}
    trainer = opened(path, settings)
    for number, block in enumerate(blocks):
        learn(trainer, [block], number)
        trainer.commit()
        trainer.store.acknowledge(trainer.sequence - 1)
        if number in keep_at:
            kept.keep(trainer.store, describe, keep=9)
            rows[trainer.sequence] = model_rows(trainer.store)
    trainer.store.close()
    return rows


def test_the_model_goes_back_the_positions_stay_and_the_balance_holds(tmp_path, kept):
    blocks = log()
    rows = trained(tmp_path / "s", kept, blocks[:8], keep_at={3, 5})
    done = roll_back(tmp_path / "s", kept, (1, 4))
    assert (done["version"], done["from"], done["restored"]) == ("2.9", "1.4", False)
    assert done["set_aside_rows"] == ids_of(blocks[4:8])[0]
    trainer = opened(tmp_path / "s")
    assert model_rows(trainer.store) == rows[4]
    at = trainer.positions[0]
    assert at.next == blocks[7].to_offset
    assert (at.rows, at.sum) == ids_of(blocks[:4])
    (booked,) = at.rolled_back
    assert (booked.from_offset, booked.to_offset) == (blocks[4].from_offset, blocks[7].to_offset)
    assert (booked.rows, booked.sum) == ids_of(blocks[4:8])
    assert trainer.digest() == done["digest"]
    learn(trainer, blocks)  # what comes again is known, what is next is learned
    trainer.commit()
    assert trainer.positions[0].accounted == ids_of(blocks)
    assert (trainer.epoch, trainer.sequence) == (2, 10)
    trainer.store.close()


def test_what_it_went_back_from_is_never_younger_than_the_version_that_goes_back(tmp_path, kept):
    """A replica that starts from that version takes what is younger, and comes before it, for another trainer's."""
    trained(tmp_path / "s", kept, log()[:6], keep_at={3})
    before = time.time_ns() // 1_000_000
    roll_back(tmp_path / "s", kept, (1, 4))
    with CheckpointStore(tmp_path / "s", None) as store:
        assert before <= store.version().created_ms <= time.time_ns() // 1_000_000
        [(_, parts)] = store.outbox()
        (sent,) = filter(None, map(Assembler().add, parts))
        assert sent.created_ms == store.version().created_ms


def test_a_second_rollback_and_one_forward_again_keep_the_balance(tmp_path, kept):
    blocks = log()
    trained(tmp_path / "s", kept, blocks[:6], keep_at={1, 3, 5})
    roll_back(tmp_path / "s", kept, (1, 2))
    trainer = opened(tmp_path / "s")
    learn(trainer, blocks[:8])
    trainer.commit()
    kept.keep(trainer.store, describe, keep=9)
    learn(trainer, blocks[8:9], 8)
    trainer.commit()
    place = (trainer.epoch, trainer.sequence - 1)
    trainer.store.close()
    for where, model in ((place, blocks[:2] + blocks[6:8]), ((1, 6), blocks[:6]), ((1, 4), blocks[:4])):
        roll_back(tmp_path / "s", kept, where)
        with CheckpointStore(tmp_path / "s", None) as store:
            positions = describe(store) and orjson.loads(store.head().state)["intake"]["positions"]["0"]
        assert (positions["rows"], positions["sum"]) == ids_of(model)
        back = [(r["rows"], r["sum"]) for r in positions["rolled_back"]]
        total = positions["rows"] + sum(r for r, _ in back), (positions["sum"] + sum(s for _, s in back)) % WRAP
        assert total == ids_of(blocks[:9])
    trainer = opened(tmp_path / "s")
    assert trainer.positions[0].accounted == ids_of(blocks[:9])
    trainer.store.close()


def test_in_the_middle_of_a_block_too(tmp_path, kept):
    blocks, trainer = log(), opened(tmp_path / "s")
    for number, block in enumerate(blocks):
        trainer.offer(block, number)
    for steps in (3, 4):
        for _ in range(steps):
            trainer.step()
        trainer.commit()
        if steps == 3:
            kept.keep(trainer.store, describe, keep=1)
    before = trainer.positions[0].accounted
    trainer.store.close()
    roll_back(tmp_path / "s", kept, None)
    trainer = opened(tmp_path / "s")
    (booked,) = trainer.positions[0].rolled_back
    assert (booked.from_taken, booked.to_taken, booked.rows) == (3 * 64 - 100, 7 * 64 - 400, 4 * 64)
    assert trainer.positions[0].accounted == before
    learn(trainer, blocks)
    trainer.commit()
    assert trainer.positions[0].accounted == ids_of(blocks)
    trainer.store.close()


def test_a_replica_past_it_asks_for_a_snapshot_and_one_at_it_goes_on(tmp_path, kept):
    trainer, assembler, versions = opened(tmp_path / "s"), Assembler(), []
    for number, block in enumerate(log()[:3]):
        learn(trainer, [block], number)
        versions += [v for v in map(assembler.add, trainer.commit()) if v]
        if number == 1:
            kept.keep(trainer.store, describe, keep=1)
    trainer.store.close()
    roll_back(tmp_path / "s", kept, None)
    trainer = opened(tmp_path / "s")
    ((sequence, parts),) = trainer.store.outbox()
    (back,) = [v for v in map(assembler.add, parts) if v]
    assert (back.epoch, back.sequence, back.base) == (2, sequence, (1, 2))
    assert trainer.begun, "a snapshot of this epoch can be made at once"
    for count, goes_on in ((2, True), (3, False)):
        replica = Replica(ReplicaSettings(), SMALL.features, SMALL.ranker, clock=lambda: START)
        for version in versions[:count]:
            replica.apply(version)
        if goes_on:
            assert replica.apply(back)
            assert replica.version == "2.4"
        else:
            with pytest.raises(VersionGap):
                replica.apply(back)
    trainer.store.close()


def test_who_was_forgotten_since_is_not_brought_back(tmp_path, kept):
    rows = make_rows(200)
    blocks = make_blocks(rows, 100)
    trainer = opened(tmp_path / "s")
    learn(trainer, blocks[:1])
    trainer.commit()
    trainer.store.remember_gone(kept.oldest() or (0, 0))
    kept.keep(trainer.store, describe, keep=1)
    user = int(rows.user[0])
    goes = rows.take(slice(0, 1))
    goes.part = np.full(1, Part.FORGET, np.uint8)
    (forget,) = make_blocks(goes, 1, first=10, users=False)
    again = make_blocks(rows.take(np.flatnonzero(rows.user == user)), 1000, first=20)
    learn(trainer, [forget], 1)
    trainer.commit()
    learn(trainer, again, 2)  # comes again, as a new user: what is known of them from before must not come with them
    trainer.commit()
    assert trainer.store.read_rows("user", np.array([user]))[0][0]
    trainer.store.close()
    roll_back(tmp_path / "s", kept, None)
    trainer = opened(tmp_path / "s")
    assert not trainer.store.read_rows("user", np.array([user]))[0][0]
    assert trainer.erasures > trainer.purged, "the next snapshot is made of files without them"
    ((_, parts),) = trainer.store.outbox()
    (version,) = [v for v in map(Assembler().add, parts) if v]
    assert version.gone["user"].tolist() == [user], "replicas at the kept version hear of it"
    trainer.store.close()
    roll_back(tmp_path / "s", kept, None)  # a second time: the store that saw them go is not there any more
    trainer = opened(tmp_path / "s")
    assert not trainer.store.read_rows("user", np.array([user]))[0][0]
    trainer.store.close()


def test_a_lost_or_damaged_store_is_brought_back_and_learns_again_what_came_after(tmp_path, kept):
    blocks = log()
    for name in ("lost", "damaged", "rows damaged"):
        trained(tmp_path / "whole", kept, blocks[:6], keep_at={3})
        path = tmp_path / name
        (tmp_path / "whole").rename(path)
        if name == "lost":
            shutil.rmtree(path)
        elif name == "rows damaged":
            _damage_rows(path)
        else:
            (path / "CURRENT").write_text("MANIFEST-000099\n")
        done = roll_back(path, kept, None)
        assert done["restored"]
        assert done["set_aside"] == {}
        trainer = opened(path)
        learn(trainer, blocks)
        trainer.commit()
        assert (trainer.positions[0].rows, trainer.positions[0].sum) == ids_of(blocks)
        trainer.store.close()
        shutil.rmtree(tmp_path / "kept")


def _damage_rows(path):
    """In a table of rows: the last commit itself can still be read."""
    table = next(file for file in path.glob("*.sst") if b"rows.user" in file.read_bytes())
    raw = bytearray(table.read_bytes())
    raw[len(raw) // 3] ^= 1
    table.unlink()  # not in place: it is the kept checkpoint's own file too
    table.write_bytes(raw)


def test_it_is_refused_in_one_line_while_a_worker_has_the_store_or_the_kept_one_is_damaged(tmp_path, kept):
    trained(tmp_path / "s", kept, log()[:4], keep_at={1})
    trainer = opened(tmp_path / "s")
    digest = trainer.digest()
    with pytest.raises(StoreLocked, match="stop that worker"):
        roll_back(tmp_path / "s", kept, None)
    trainer.store.close()
    with pytest.raises(StoreError, match=r"checkpoint 7\.7 is not kept"):
        roll_back(tmp_path / "s", kept, (7, 7))
    table = next((tmp_path / "kept").glob("*/*.sst"))
    raw = table.read_bytes()
    table.unlink()  # not in place: it is the store's own file too
    table.write_bytes(raw[:-1])
    with pytest.raises(CorruptRecord, match=table.name):
        roll_back(tmp_path / "s", kept, None)
    trainer = opened(tmp_path / "s")
    assert trainer.digest() == digest, "the store is as it was"
    trainer.store.close()


def test_a_commit_says_what_it_is(tmp_path):
    trainer = opened(tmp_path / "s")
    learn(trainer, log()[:2])
    trainer.commit()
    told = describe(trainer.store)
    assert told["event_time_ms"] == max(int(b.examples.closed.max()) for b in log()[:2])
    assert told["rows"] == {t: sum(len(r) for r in trainer.store.iter_rows(t)) for t in EXTRAS}
    assert told["digest"] == digest_of(trainer.store) == trainer.digest()
    first = told["settings"]
    trainer.store.close()
    for blocks, seed in ((4, SMALL.seed), (6, SMALL.seed + 1)):
        trainer = opened(tmp_path / "s", msgspec.structs.replace(SMALL, seed=seed))
        learn(trainer, log()[:blocks])
        trainer.commit()
        assert (about(trainer.store.head())["settings"] == first) is (seed == SMALL.seed)
        trainer.store.close()
