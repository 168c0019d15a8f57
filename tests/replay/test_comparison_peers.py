"""What is read out of river's models by other code is what river itself would say; the features are what they say."""

from __future__ import annotations

import copy

import numpy as np
from river import facto, optim

from online_model.features import TITLE_WORDS
from online_model.history import unpack
from replay.comparison.peers import RiverBiasedMf, RiverFm
from replay.comparison.sparse import Fields, hashed
from tests.replay.comparison_logs import stream


def test_the_factorization_machine_is_rivers() -> None:
    batches, fields, system = stream(impressions=True).batches[:6], Fields(), RiverFm(seed=5)
    plain = facto.FMClassifier(
        n_factors=RiverFm.FACTORS, weight_optimizer=optim.AdaGrad(0.1), latent_optimizer=optim.SGD(RiverFm.RATE),
        intercept_lr=0.02, latent_initializer=optim.initializers.Normal(sigma=RiverFm.SIGMA, seed=5), seed=5,
    )  # fmt: skip
    for batch in batches:
        system.catalogue(batch.catalogue)
        system.learn(batch)
        fields.catalogue(batch.catalogue)
        rows = hashed(fields.of(batch.lessons.candidates), crossed=False)
        for row, label in zip(rows, batch.lessons.label.tolist(), strict=True):
            plain.learn_one(dict.fromkeys(row, 1.0), label == 1)
        fields.learn(batch)
    c = batches[-1].scored.candidates
    rows = hashed(fields.of(c), crossed=False)
    known = [n for n, row in enumerate(rows) if all(j in plain.latents for j in row)]
    wanted = [plain.predict_proba_one(dict.fromkeys(rows[n], 1.0))[True] for n in known]
    assert len(known) > 20
    np.testing.assert_allclose(system.score(c)[known], wanted, rtol=1e-6)


def test_the_biased_factorization_is_rivers() -> None:
    batches, system = stream(impressions=True).batches[:6], RiverBiasedMf(seed=5)
    for batch in batches:
        system.learn(batch)
    c = batches[0].lessons.candidates  # all of it was learned
    wanted = [system._model.predict_one(u, i) for u, i in zip(c.user[c.ctx].tolist(), c.item.tolist(), strict=True)]
    np.testing.assert_allclose(system.score(c), wanted, rtol=1e-9)


def test_the_fields_of_a_candidate() -> None:
    batches, fields = stream(impressions=False).batches[:8], Fields()
    clicks: dict[int, int] = {}
    category: dict[int, int] = {}
    some = 0
    for batch in batches:
        fields.catalogue(batch.catalogue)
        category.update({item[0]: item[2] for item in batch.catalogue})
        c = batch.scored.candidates
        found = fields.of(c)
        for n in range(0, len(c.item), 7):
            item, state = int(c.item[n]), unpack(c.history[c.ctx[n]][None])[0]
            past = [int(i) for name in ("recent", "intent") for i in state[name]["item"] if i]
            some += item in past
            assert found["user"][n] == c.user[c.ctx[n]]
            assert found["category"][n] == category[item]
            assert found["clicks"][n] == int(np.log2(1 + clicks.get(item, 0))) + 1
            assert found["repeats"][n] == (item in past)
            assert found["last0"][n] == (past[0] if past else 0)
        for item in batch.rows.item[batch.rows.click == 1].tolist():
            clicks[item] = clicks.get(item, 0) + 1
        fields.learn(batch)
    assert some > 10


def test_a_category_changes_with_the_catalogue() -> None:
    fields, c = Fields(), copy.deepcopy(stream(impressions=False).batches[2].scored.candidates)
    item = int(c.item[0])
    for category in (5, 6):
        words = np.zeros(TITLE_WORDS, np.int64)
        fields.catalogue([(item, b"", 4, 7, 0, words), (item, b"", category, 2 * category, 0, words)])
        assert fields.of(c)["category"][0] == category
        assert fields.of(c)["seller"][0] == 2 * category


def test_features_that_are_not_there_are_left_out() -> None:
    c = stream(impressions=True).batches[3].scored.candidates
    fields = Fields().of(c)
    rows = hashed(fields, crossed=True)
    empty = np.flatnonzero(fields["last0"] == 0)
    full = np.flatnonzero(fields["last2"] != 0)
    assert len(empty)
    assert len(full)
    assert max(len(rows[n]) for n in empty) < min(len(rows[n]) for n in full)
    assert all(0 <= j < 1 << 22 for row in rows for j in row)
