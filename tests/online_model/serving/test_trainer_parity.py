"""What a trainer commits scores on a replica as it does on the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedding_store.delta import Assembler
from embedding_store.ids import feature_id
from online_model.batch import Candidates
from online_model.examples import QUERY_WORDS, Block, Examples, Part, Source, example_id, request_name, row_id
from online_model.features import CATEGORY, ITEM, SELLER, TITLE_WORDS, USER, words_of
from online_model.history import HISTORY
from online_model.ranker import CLICK, PURCHASE, WATCH
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, Feedback, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.online_model.logs import make_states
from tests.online_model.serving.world import rank, recommend

T0 = 1_700_000_000_000
FEATURES = FeatureSettings(dim=8, users=64, items=64, categories=8)
RANKER = RankerSettings(hidden=16, second=8, third=8)


def block(number: int, n: int = 300) -> Block:
    """n rows of impressions, half of them clicked, of 20 users and 40 items; histories at the end."""
    rng = np.random.default_rng(number)
    user, item = rng.integers(0, 20, n), rng.integers(0, 40, n)
    item_ids = np.array([feature_id(ITEM, int(i)) for i in range(40)], np.int64)
    user_ids = np.array([feature_id(USER, int(i)) for i in range(20)], np.int64)
    keys = [example_id(request_name(f"{number}-{i}"), feature_id("item", int(item[i]))) for i in range(n)]
    history = np.where(rng.random((n, HISTORY)) < 0.5, item_ids[rng.integers(0, 40, (n, HISTORY))], 0)
    rows = Examples(
        row_id=np.array([row_id(key, Part.SHOWN) for key in keys], np.int64),
        example_id=np.array(keys, np.int64),
        part=np.full(n, Part.SHOWN, np.uint8), source=np.full(n, Source.IMPRESSION, np.uint8),
        ts=np.full(n, T0 + number), closed=np.full(n, T0 + number), user=user_ids[user], item=item_ids[item],
        scenario=rng.integers(0, 4, n).astype(np.uint8), position=rng.integers(0, 9, n).astype(np.int16),
        propensity=np.full(n, np.nan, np.float32), rate=np.ones(n, np.float32),
        click=((user + item) % 2).astype(np.int8),
        purchase=np.full(n, -1, np.int8), play_ms=np.full(n, -1), duration_ms=np.full(n, -1),
        delay_ms=np.full(n, -1), query=np.tile(words_of("red tea", QUERY_WORDS), (n, 1)),
        history=make_states(history, np.full(n, T0 + number)),
        item_raw=np.array([str(int(i)) for i in item], object),
    )  # fmt: skip
    latest = np.zeros((20, HISTORY), np.int64)
    latest[:, :7] = item_ids[rng.integers(0, 40, (20, 7))]
    at = number * n
    return Block(0, at, at + n, at + n, T0 + number, examples=rows, users=user_ids,
                 histories=make_states(latest, np.full(20, T0)))  # fmt: skip


def on_the_trainer(trainer: Trainer, user: int, items: np.ndarray, now_ms: int, query: str) -> np.ndarray:
    """Probabilities [n, heads] as the trainer scores them."""
    row = trainer.tables.rows(USER, np.array([user]), admit=False)
    history = trainer.tables.read_rows(USER, row)["history"]
    words = words_of(query, QUERY_WORDS)[None]
    p, _ = trainer.score(Candidates(
        np.array([user]), history, np.array([now_ms]), np.zeros(1, np.int64), words, items,
        np.zeros(len(items), np.int64), np.full(len(items), -1),
    ))  # fmt: skip
    return p[:, [CLICK, WATCH, PURCHASE]]


@pytest.mark.parametrize(("feedback", "wait"), [("calibrated", 0), ("weighted", 0), ("elapsed", 60_000)])
def test_a_replica_scores_as_the_trainer_that_feeds_it(tmp_path: Path, feedback: Feedback, wait: int) -> None:
    settings = TrainerSettings(
        features=FEATURES, ranker=RANKER, batch_size=128, feedback=feedback, purchase_wait_ms=wait
    )
    trainer = open_trainer(settings, tmp_path, lambda: T0)
    category = feature_id(CATEGORY, "shoes")
    seller, words = feature_id(SELLER, "s"), words_of("red shoes", TITLE_WORDS)
    trainer.catalogue(
        [(feature_id(ITEM, i), b'{"item":%d}' % i, category, seller, T0 - i, words) for i in range(10)]
    )
    assembler = Assembler()
    replica = Replica(ReplicaSettings(), FEATURES, RANKER, clock=lambda: T0 + 9_000, feedback=feedback)
    try:
        for number in range(5):
            assert trainer.offer(block(number), number)
            while trainer.step(drain=True):
                pass
            for part in trainer.commit() or []:
                if (version := assembler.add(part)) is not None:
                    assert replica.apply(version)
            assert replica.sequence == trainer.sequence
            assert replica.info().positions == {"0": (number + 1) * 300}
            for user in (0, 7, 19):
                items = list(range(40))
                ids = np.array([feature_id(ITEM, i) for i in items], np.int64)
                query = "" if user else "red"
                expected = on_the_trainer(trainer, feature_id(USER, user), ids, T0 + 9_000, query)
                ranked = rank(replica, user, "live", items, query).items
                got = {r.item: (r.click, r.watch, r.purchase) for r in ranked}
                assert np.array([got[i] for i in items]) == pytest.approx(expected, abs=2e-6)
        assert {s.item for s in recommend(replica, 3, "shelf", 40).items} == set(range(40))
    finally:
        trainer.store.close()
