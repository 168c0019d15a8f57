"""Test-then-train: what a step learns, measures and counts."""

import math

import msgspec
import numpy as np
import orjson
import pytest
import torch

from embedding_store.ids import feature_id
from online_model.batch import candidates_of, unique_contexts
from online_model.examples import Examples, Part, Source
from online_model.features import TITLE_WORDS, words_of
from online_model.learner import UsualLoss
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import open_trainer
from tests.online_model.logs import START, later, make_blocks, make_rows
from tests.online_model.plain_trainer import PlainTrainer

SMALL = TrainerSettings(
    batch_size=64, features=FeatureSettings(dim=8, users=100, items=200, categories=20),
    ranker=RankerSettings(hidden=16, second=8, third=8, attention=True, experts=3), window=500, recent_items=20, clip=0,
)  # fmt: skip
NOW = START + 1


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trainer(tmp_path):
    trainer = open_trainer(SMALL, tmp_path / "store", lambda: NOW)
    yield trainer
    trainer.store.close()


def learn(trainer, rows, size=64, first=0):
    for number, block in enumerate(make_blocks(rows, size, first=first)):
        trainer.offer(block, number)
        while trainer.step():
            pass


def of(trainer, table, raw, name):
    """A column of the row of `raw`."""
    rows = trainer.tables.rows(table, np.array([feature_id(table, raw)]), admit=False)
    return trainer.tables.read_rows(table, rows)[name][0]


def mixed(n=200, seed=0):
    """Rows of every part."""
    shown = make_rows(n, seed=seed)
    clicked, other = np.flatnonzero(shown.click == 1), np.flatnonzero(shown.click == 0)
    return Examples.concat([
        shown,
        later(shown, clicked[::2], Part.WATCH, play_ms=6_000, duration_ms=10_000),
        later(shown, clicked[1::2], Part.WATCH, play_ms=1_000, duration_ms=10_000),
        later(shown, other[:5], Part.WATCH, play_ms=1_000, duration_ms=0),
        later(shown, clicked[:4], Part.PURCHASE, purchase=1),
        later(shown, other[:7], Part.LATE_CLICK, click=1, purchase=0),
    ])  # fmt: skip


def catalogue(n=30, created=START):
    return [
        (feature_id("item", i), b'{"item":%d}' % i, feature_id("category", i % 5), feature_id("seller", i % 2), created,
         words_of(f"red shoes {i}" if i % 3 else "", TITLE_WORDS))
        for i in range(n)
    ]


def test_a_step_is_what_plain_torch_computes(trainer):
    items = catalogue(20, created=0)  # the others have no category, seller and title
    trainer.catalogue(items)
    about = {item: {"category": c, "seller": s, "words": words} for item, _, c, s, _, words in items}
    plain = PlainTrainer(SMALL, about)
    for item, *_ in items:
        plain._admit("item", item)
    scores = []
    add = trainer._evaluation.tasks["click"].add
    trainer._evaluation.tasks["click"].add = lambda key, p, *rest: (scores.append(p), add(key, p, *rest))
    rows = mixed(300)
    for number, block in enumerate(make_blocks(rows, 64)):
        expected = plain.step(block.examples)
        trainer.offer(block, number)
        assert trainer.step() == len(block.examples)
        shown = block.examples.part == Part.SHOWN
        assert scores[-1] == pytest.approx(expected[shown, 0], abs=1e-4)
    for table, rows_of in plain.rows.items():
        ids = np.array(sorted(rows_of))
        got = trainer.tables.read_rows(table, trainer.tables.rows(table, ids, admit=False))
        expected = np.stack([rows_of[i]["weights"].numpy() for i in ids.tolist()])
        assert got["weights"] == pytest.approx(expected, abs=5e-4)
        momentum = [rows_of[i]["momentum"] for i in ids.tolist()]
        assert got["momentum"] == pytest.approx(momentum, rel=1e-3, abs=1e-5)
        for name in {"taken", "nearness"} & got.keys():
            expected = [np.ravel(rows_of[i].get(name, 0)) for i in ids.tolist()]
            width = got[name][0].size
            padded = np.stack([np.pad(values, (0, width - values.size)) for values in expected])
            assert got[name].reshape(-1, width) == pytest.approx(padded, rel=1e-5), name
        for name in {"impressions", "clicks", "created", "heat_ms"} & got.keys():
            assert got[name].tolist() == [rows_of[i].get(name, 0) for i in ids.tolist()], name
    for name, weights in trainer._ranker.weights().items():
        assert weights == pytest.approx(plain.ranker.weights()[name], abs=5e-4), name


def test_statistics_are_as_before_the_batch(trainer):
    rows = make_rows(64).take(np.zeros(64, int))
    rows.click[:] = 1
    learn(trainer, rows)
    first = trainer._evaluation.tasks["click"].state()["p"]
    assert len(np.unique(first)) == 1, "64 times the same row in one batch: nothing of it may be known to its scores"


def test_item_statistics_count_impressions_and_clicks_only(trainer):
    learn(trainer, mixed())
    columns = {n: int(trainer.tables.column("item", n).sum()) for n in ("impressions", "clicks", "interactions")}
    assert columns == {"impressions": 200, "clicks": int((mixed().click == 1).sum()), "interactions": 0}


def test_logs_without_impressions_claim_no_click_rate(trainer):
    learn(trainer, make_rows(256, source=Source.IMPLICIT))
    columns = {n: int(trainer.tables.column("item", n).sum()) for n in ("impressions", "clicks", "interactions")}
    assert columns == {"impressions": 0, "clicks": 0, "interactions": 256}
    metrics = trainer.info()["metrics"]
    assert metrics["click"]["count"] == 0
    # The first batch has no negatives yet: 192 rows with 4 each.
    assert (metrics["click_sampled"]["count"], metrics["click_sampled"]["positives"]) == (192 * 5, 192)
    assert metrics["click_sampled"]["ne"] is None
    assert trainer.info()["trained_rows"] == 256
    assert trainer.positions[0].rows == 256, "negatives are no rows"


def test_each_impression_is_scored_once(trainer):
    rows = mixed()
    learn(trainer, rows)
    metrics = trainer.info()["metrics"]
    shown = rows.part == Part.SHOWN
    assert metrics["click"]["count"] == int(shown.sum())
    assert metrics["click"]["positives"] == int((rows.click[shown] == 1).sum()) + 7
    assert metrics["watch"]["count"] == int((rows.duration_ms > 0).sum())
    assert metrics["purchase"]["count"] == int((rows.purchase == 0).sum())
    assert metrics["purchase"]["positives"] == 4


def test_every_part_teaches_its_own_heads_only(trainer):
    rows = make_rows(64)
    rows.click[:], rows.purchase[:] = 0, -1
    learn(trainer, rows)
    bias = trainer._ranker.weights()["bias"]
    watch = later(rows, np.arange(64), Part.WATCH, play_ms=10, duration_ms=10)
    block = make_blocks(watch, 64, first=10)[0]
    trainer._learner._adam.state.clear()  # its moments would move the others on
    trainer.offer(block, 1)
    trainer.step()
    assert ((trainer._ranker.weights()["bias"] != bias) == [False, True, True, False]).all()


def test_contexts_of_one_impression_are_shared():
    rows = make_rows(40)
    rows = Examples.concat([rows, later(rows, np.arange(0, 40, 3), Part.LATE_CLICK, click=1), rows.take(np.arange(40))])
    rows.ts[-40:] += 1  # as of another moment: other contexts, in the same states
    first, ctx = unique_contexts(rows.history, rows.user, rows.ts)
    assert len(first) == 2 * len({*zip(rows.user[:40].tolist(), rows.ts[:40].tolist(), strict=True)}) == 20
    for column in (rows.user, rows.history, rows.ts):
        assert (column[first][ctx] == column).all()


def test_hostile_histories_are_not_mixed_up(monkeypatch):
    monkeypatch.setattr("online_model.batch.mix", lambda x: np.zeros(x.shape, np.uint64))  # all hashes collide
    rows = make_rows(40)
    first, ctx = unique_contexts(rows.history, rows.user, rows.ts)
    assert (rows.history[first][ctx] == rows.history).all()


def test_histories_come_with_the_block_and_not_before(trainer):
    rows = make_rows(80)
    block = make_blocks(rows, 80)[0]
    trainer.offer(block, 0)
    trainer.step()
    at = trainer.tables.rows("user", block.users, admit=False)
    assert not trainer.tables.column("user", "history")[at].any(), "16 rows of the block are not learned"
    trainer.step()
    at = trainer.tables.rows("user", block.users, admit=False)
    assert (trainer.tables.column("user", "history")[at] == block.histories).all()


def test_a_batch_that_is_not_finite_leaves_the_model_alone(trainer, caplog):
    learn(trainer, make_rows(128))
    before = trainer._ranker.weights()
    digest = [rows.columns["weights"].tobytes() for _, rows in trainer.tables.digest_rows()]
    forward = trainer._ranker.forward
    trainer._ranker.forward = lambda *inputs: forward(*inputs) * torch.tensor(float("nan"))
    learn(trainer, make_rows(64, from_row=128), first=1000 - 980)
    trainer._ranker.forward = forward
    assert trainer.info()["left_out"] == 64
    assert trainer.positions[0].rows == 192, "its rows are handled: they are not lost, and not trained again"
    assert "not finite" in caplog.text
    assert all((trainer._ranker.weights()[n] == w).all() for n, w in before.items())
    after = {name: rows.columns["weights"] for name, rows in trainer.tables.digest_rows()}
    assert all(np.isfinite(w).all() for w in after.values())
    assert len(digest) == len(after)
    learn(trainer, make_rows(64, from_row=192), first=30)
    assert trainer.info()["metrics"]["click"]["count"] == 192, "what was not finite is not measured"


def test_gradients_that_are_not_finite_leave_the_model_alone(trainer):
    learn(trainer, make_rows(64))
    before = [rows.columns["weights"].tobytes() for _, rows in trainer.tables.digest_rows()]
    ranker = trainer._ranker.weights()
    handle = trainer._ranker.from_item.weight.register_hook(lambda g: g * float("inf"))
    learn(trainer, make_rows(64).take(np.arange(64)), first=10)
    handle.remove()
    assert trainer.info()["left_out"] == 64
    assert [rows.columns["weights"].tobytes() for _, rows in trainer.tables.digest_rows()] == before
    assert all((trainer._ranker.weights()[n] == w).all() for n, w in ranker.items())


def test_a_step_that_fails_is_never_committed(trainer, monkeypatch):
    learn(trainer, make_rows(64))
    monkeypatch.setattr(trainer._recent, "push", lambda items: 1 / 0)
    trainer.offer(make_blocks(make_rows(64), 64, first=10)[0], 1)
    with pytest.raises(ZeroDivisionError):
        trainer.step()
    for call in (trainer.commit, trainer.step):
        with pytest.raises(Exception, match="restart the trainer"):
            call()


def test_items_without_a_catalogue_get_a_card_once(trainer):
    rows = make_rows(64)
    rows.item_raw[:] = '"näme"'
    learn(trainer, rows)
    cards = dict(trainer._cards)
    assert set(cards) == set(rows.item.tolist())
    assert orjson.loads(next(iter(cards.values()))) == {"item": "näme"}
    trainer.commit()
    learn(trainer, make_rows(64), first=10)
    assert trainer._cards == {}


def test_the_catalogue_admits_items_and_replaces_their_cards(trainer):
    learn(trainer, make_rows(64))
    seen = of(trainer, "item", 3, "created")
    trainer.catalogue([*catalogue(), *catalogue(1)])
    assert of(trainer, "item", 7, "category") == feature_id("category", 2)
    assert of(trainer, "item", 7, "seller") == feature_id("seller", 1)
    assert of(trainer, "item", 7, "words").tolist() == words_of("red shoes 7", TITLE_WORDS).tolist()
    assert of(trainer, "item", 29, "created") == START
    assert np.abs(of(trainer, "item", 29, "weights")).max() > 0, "a new item starts from its own weights"
    assert seen > 0
    assert len(trainer._cards) == 30
    trainer.commit()
    trainer.catalogue(catalogue())
    assert trainer.commit() is None, "the same catalogue again changes nothing"
    changed = [(item, b'{"item":0,"stock":1}', *rest) for item, _, *rest in catalogue(1)]
    trainer.catalogue(changed)
    assert trainer._cards == {feature_id("item", 0): b'{"item":0,"stock":1}'}
    trainer.catalogue([])


def test_an_item_without_a_creation_time_takes_its_first_example_s(trainer):
    trainer.catalogue(catalogue(created=0))
    assert of(trainer, "item", 3, "created") == 0
    learn(trainer, make_rows(256))
    created = trainer.tables.column("item", "created")
    assert created[created > 0].min() == START


def test_the_model_learns_what_users_like(trainer):
    """Two kinds of users, two kinds of items, nothing else: a click is a match."""
    rows = make_rows(6000, users=20, items=30)
    kind = {feature_id("user", u): u % 2 for u in range(20)} | {feature_id("item", i): i % 2 for i in range(30)}
    match = np.array([kind[u] == kind[i] for u, i in zip(rows.user.tolist(), rows.item.tolist(), strict=True)])
    rows.click = (np.random.default_rng(1).random(6000) < np.where(match, 0.4, 0.1)).astype(np.int8)
    rows.purchase = np.where(rows.click == 1, 0, -1).astype(np.int8)
    learn(trainer, rows)
    recent = trainer.info()["metrics"]["click"]["recent"]
    assert recent["auc"] > 0.65
    assert recent["calibration"] == pytest.approx(1, abs=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_cuda_is_close_to_one_on_the_cpu(tmp_path):
    digests = []
    for device in ("cpu", "cuda"):
        trainer = open_trainer(SMALL, tmp_path / device, lambda: NOW, device=device)
        learn(trainer, mixed())
        digests.append({name: rows.columns["weights"] for name, rows in trainer.tables.digest_rows()})
        trainer.store.close()
    for name, weights in digests[0].items():
        assert digests[1][name] == pytest.approx(weights, abs=1e-4)


def test_scoring_is_what_the_step_says_and_changes_nothing(trainer):
    learn(trainer, make_rows(128))
    rows, told = make_rows(40, from_row=128), []
    digest = [rows.columns["weights"].tobytes() for _, rows in trainer.tables.digest_rows()]
    sizes = [trainer.tables.size(table) for table in trainer.tables.specs]
    candidates, *_ = candidates_of(rows, np.empty(0, np.int64), np.empty((0, 4), np.int64))
    known = trainer.tables.rows("item", rows.item, admit=False) > 0
    p, _ = trainer.score(candidates)
    assert [trainer.tables.size(table) for table in trainer.tables.specs] == sizes, "nothing is admitted"
    assert digest == [rows.columns["weights"].tobytes() for _, rows in trainer.tables.digest_rows()]
    trainer.observer = told.append
    trainer.offer(make_blocks(rows, 40, first=20)[0], 2)
    trainer.step(drain=True)
    assert told
    assert known.any()
    np.testing.assert_allclose(told[0].p[known], p[known], rtol=1e-6)  # a new item starts with weights of its own


def test_a_batch_whose_loss_explodes_is_left_out_with_its_place_also_after_a_restart(trainer, tmp_path, caplog):
    learn(trainer, make_rows(64 * 101))
    trainer.commit()
    trainer.store.close()
    again = open_trainer(SMALL, tmp_path / "store", lambda: NOW)
    before, usual = again._ranker.weights(), again._usual.mean
    rows = make_rows(64, from_row=64 * 101)
    forward = again._ranker.forward
    again._ranker.forward = lambda *x: forward(*x) + 1_000 * (1 - 2 * torch.tensor(rows.click[:, None] == 1))
    again.offer(make_blocks(rows, 64, first=1010)[0], 101)
    assert again.step() == 64
    assert all((weights == before[name]).all() for name, weights in again._ranker.weights().items())
    assert again._usual.mean == pytest.approx(1.19 * usual), "it counts as 20 times what is usual"
    told = again.info()
    assert told["left_out"] == 64
    assert told["left_out_batches"][0]["rows"] == 64
    assert "far above" in caplog.text
    again._ranker.forward = forward
    learn(again, make_rows(64, from_row=64 * 102), first=1020)
    assert again.info()["left_out"] == 64, "and it goes on"
    again.store.close()


def test_what_explodes_batch_after_batch_is_usual_in_the_end(trainer):
    """As clicks do that come again after hours without any, in which no click at all was the usual."""
    learn(trainer, make_rows(64 * 101))
    trainer._usual.mean = 1e-4
    learn(trainer, make_rows(64 * 60, from_row=64 * 101), first=1010)
    left_out = trainer.info()["left_out"] // 64
    assert 10 < left_out < 50
    learn(trainer, make_rows(64 * 20, from_row=64 * 161), first=1610)
    assert trainer.info()["left_out"] // 64 == left_out


def test_a_few_unlucky_rows_are_no_explosion():
    usual = UsualLoss()
    for _ in range(200):
        usual.add(0.5)
    assert usual.limit(20, 64) == pytest.approx(10)
    assert usual.limit(20, 1) == pytest.approx(640)
    assert usual.limit(20, 4096) == pytest.approx(10)
    assert usual.limit(0, 64) == math.inf
    assert UsualLoss(0.5, 99).limit(20, 64) == math.inf, "there is no usual loss yet"


def test_where_the_ranker_s_gradient_is_clipped_the_tables_shrink_with_it(tmp_path, monkeypatch):
    given: dict[float, list] = {0.0: [], 1e-3: []}
    norms: dict[float, list] = {clip: [] for clip in given}
    backward = torch.autograd.backward
    for clip, own in given.items():

        def noted(out, *rest, own=own, **named):
            own.extend(rest[0] if isinstance(rest[0], list) else ())
            backward(out, *rest, **named)

        monkeypatch.setattr(torch.autograd, "backward", noted)
        trainer = open_trainer(msgspec.structs.replace(SMALL, clip=clip), tmp_path / str(clip), lambda: NOW)
        weights, adam = list(trainer._ranker.parameters()), trainer._learner._adam
        step = adam.step

        def seen(*_, weights=weights, step=step, clip=clip):
            grads = [w.grad for w in weights if w.grad is not None]
            norms[clip].append(float(torch.nn.utils.get_total_norm(grads)))
            step()

        monkeypatch.setattr(adam, "step", seen)
        learn(trainer, make_rows(64))
        trainer.store.close()
    ((whole,), (clipped,)) = norms.values()
    assert clipped == pytest.approx(1e-3, rel=1e-4)
    assert clipped < whole
    for table, shrunk in zip(given[0.0], given[1e-3], strict=True):
        assert torch.allclose(shrunk, table * (clipped / whole), rtol=1e-4)


def test_dense_layers_in_bfloat16_score_nearly_the_same_and_keep_float32(tmp_path):
    scores = []
    for bf16 in (False, True):
        trainer = open_trainer(msgspec.structs.replace(SMALL, bf16=bf16), tmp_path / str(bf16), lambda: NOW)
        trainer.observer = lambda scored: scores[-1].append(scored.p)
        scores.append([])
        learn(trainer, make_rows(640))
        assert {w.dtype for w in trainer._ranker.weights().values()} == {np.dtype(np.float32)}
        assert trainer.info()["left_out"] == 0
        trainer.store.close()
    plain, rough = (np.concatenate(s) for s in scores)
    assert np.abs(plain - rough).max() < 0.02
    assert (plain != rough).any()


@pytest.mark.parametrize("source", [Source.IMPRESSION, Source.IMPLICIT])
def test_positives_are_ranked_among_active_items_before_they_are_learned(tmp_path, source):
    s = msgspec.structs.replace(SMALL, ranked_of=1, ranked_among=7)
    trainer = open_trainer(s, tmp_path / "s", lambda: NOW)
    learn(trainer, make_rows(128, source=source))
    rows = make_rows(64, from_row=128, source=source)
    before = trainer.info()["metrics"]["click"]["next_item"]
    others, way = trainer._recent.draw(rows.row_id, rows.item, 7, s.seed + 1), trainer.next_way
    expected = []
    for i in np.flatnonzero(rows.click == 1).tolist():
        candidates, *_ = candidates_of(rows.take(np.array([i])), np.array([0]), others[i : i + 1])
        candidates.position[:] = -1
        order = trainer.score(candidates)[1][:, way]
        expected.append(1 + (order[1:] > order[0]).sum() + (order[1:] == order[0]).sum() / 2)
    learn(trainer, rows, first=20)
    after = trainer.info()["metrics"]["click"]["next_item"]
    assert (after["among"], after["sampled"]) == (8, True)
    assert after["count"] - before["count"] == len(expected) > 0
    gained = after["mrr"] * after["count"] - before["mrr"] * before["count"]
    assert gained == pytest.approx((1 / np.array(expected)).sum())
    trainer.store.close()


def test_a_row_counts_as_much_in_a_small_step_as_in_a_large_one(tmp_path):
    """A click comes at once and alone, what was not clicked with its page: that must not make clicks count for more."""
    trainer = open_trainer(msgspec.structs.replace(SMALL, window=2_000), tmp_path / "store", lambda: NOW)
    rows = make_rows(6_000, items=200)
    of_forty = np.arange(6_000) // 40
    rows = rows.take(np.argsort(2 * of_forty + (rows.click == 0), kind="stable"))  # the clicks first
    for number, block in enumerate(make_blocks(rows, 40)):
        trainer.offer(block, number)
        clicks = int((block.examples.click == 1).sum())
        for size in (*[2] * (clicks // 2), 40):
            trainer.step(drain=True, rows=size)
    assert trainer.pending == 0
    recent = trainer._evaluation.metrics()["click"]["recent"]
    trainer.store.close()
    assert recent["calibration"] == pytest.approx(1, abs=0.1)
