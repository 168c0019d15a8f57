"""What a trainer commits scores on a replica as it does on the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedding_store.delta import Assembler
from embedding_store.ids import feature_id
from online_model.examples import Block, Examples, Part, Source, example_id, request_name, row_id
from online_model.features import CATEGORY, ITEM, USER, item_features, user_features
from online_model.feedback import probabilities
from online_model.history import HISTORY
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, Feedback, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.online_model.logs import make_states

T0 = 1_700_000_000_000
FEATURES, RANKER = FeatureSettings(dim=8, users=64, items=64, categories=8), RankerSettings(hidden=16, second=8)


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
        delay_ms=np.full(n, -1),
        history=make_states(history, np.full(n, T0 + number)),
        item_raw=np.array([str(int(i)) for i in item], object),
    )  # fmt: skip
    latest = np.zeros((20, HISTORY), np.int64)
    latest[:, :7] = item_ids[rng.integers(0, 40, (20, 7))]
    at = number * n
    return Block(0, at, at + n, at + n, T0 + number, examples=rows, users=user_ids,
                 histories=make_states(latest, np.full(20, T0)))  # fmt: skip


def on_the_trainer(trainer: Trainer, user: int, items: np.ndarray, now_ms: int) -> np.ndarray:
    """Probabilities [n, 3] from the trainer's own tables and ranker."""
    tables = trainer.tables

    def weights(table: str, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tables.read_rows(table, tables.rows(table, ids, admit=False))["weights"])

    def vectors(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = tables.rows(ITEM, ids, admit=False)
        return weights(ITEM, ids), weights(CATEGORY, tables.column(ITEM, "category")[rows])

    person = np.array([user])
    past = user_features(tables.read_rows(USER, tables.rows(USER, person, admit=False))["history"], now_ms)
    item, category = vectors(past.items[0])
    of = tables.read_rows(ITEM, tables.rows(ITEM, items, admit=False))
    dense = item_features(of["impressions"], of["clicks"], of["interactions"], of["created"], now_ms)
    zero = torch.zeros(len(items), dtype=torch.int64)
    with torch.inference_mode():
        ranker = trainer._ranker
        mean = ranker.history_weights(torch.from_numpy(past.kinds), torch.from_numpy(past.recency)) @ (item + category)
        context = torch.from_numpy(past.context)
        about = torch.from_numpy(dense)
        logits = ranker(weights(USER, person), mean, context, *vectors(items), about, zero, None, zero)
        return probabilities(logits, trainer._feedback)[:, :3].numpy()


@pytest.mark.parametrize(("feedback", "wait"), [("calibrated", 0), ("weighted", 0), ("elapsed", 60_000)])
def test_a_replica_scores_as_the_trainer_that_feeds_it(tmp_path: Path, feedback: Feedback, wait: int) -> None:
    settings = TrainerSettings(
        features=FEATURES, ranker=RANKER, batch_size=128, feedback=feedback, purchase_wait_ms=wait
    )
    trainer = open_trainer(settings, tmp_path, lambda: T0)
    category = feature_id(CATEGORY, "shoes")
    trainer.catalogue([(feature_id(ITEM, i), b'{"item":%d}' % i, category, 0, T0 - i) for i in range(10)])
    assembler = Assembler()
    replica = Replica(ReplicaSettings(seed=1), FEATURES, RANKER, clock=lambda: T0 + 9_000, feedback=feedback)
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
                expected = on_the_trainer(trainer, feature_id(USER, user), ids, T0 + 9_000)
                got = {r.item: (r.click, r.watch, r.purchase) for r in replica.rank(user, "live", items).items}
                assert np.array([got[i] for i in items]) == pytest.approx(expected, abs=2e-6)
        assert {s.item for s in replica.recommend(3, "shelf", 40).items} == set(range(40))
    finally:
        trainer.store.close()
