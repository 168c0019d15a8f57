"""Dense features and first weights: one code for trainer and replicas."""

import numpy as np
import pytest

from online_model.features import CLICK_PRIOR, DENSE, item_features, mix, start_weights, table_specs
from online_model.settings import FeatureSettings


def columns(**values):
    defaults = {"impressions": [0], "clicks": [0], "interactions": [0], "created": [0]}
    return [np.array(v, np.int64) for v in {**defaults, **values}.values()]


def test_an_unknown_item_has_no_features():
    assert item_features(*columns(), 1_700_000_000_000).tolist() == [[0.0] * DENSE]


def test_the_click_rate_goes_from_the_prior_to_what_was_seen():
    shown = np.array([0, 20, 2_000_000])
    z = item_features(shown, shown // 2, np.zeros(3, int), np.zeros(3, int), 0)[:, 0]
    rate = 1 / (1 + np.exp(-(z + np.log(CLICK_PRIOR / (1 - CLICK_PRIOR)))))
    assert rate == pytest.approx([CLICK_PRIOR, (10 + 1) / 40, 0.5], abs=1e-4)


def test_interactions_claim_no_click_rate():
    features = item_features(*columns(interactions=[1000]), 0)
    assert features[0, 0] == 0
    assert features[0, 2] > 0


def test_counts_are_logarithms_of_what_was_shown():
    features = item_features(*columns(impressions=[99], clicks=[3]), 0)
    assert features[0, 1] == pytest.approx(np.log(100) / 10)


def test_late_clicks_never_make_a_rate_above_one():
    assert np.isfinite(item_features(*columns(impressions=[1], clicks=[10_000]), 0)).all()


def test_age_is_never_negative_and_takes_one_time_or_many():
    created = np.array([1_000, 7_201_000])
    zeros = np.zeros(2, int)
    one = item_features(zeros, zeros, zeros, created, 3_601_000)
    many = item_features(zeros, zeros, zeros, created, np.array([3_601_000, 3_601_000]))
    assert one.tolist() == many.tolist()
    assert one[:, 3] == pytest.approx([np.log(2) / 10, 0])


def test_first_weights_are_a_function_of_the_id_and_differ_between_ids():
    ids = np.array([0, 1, 2, -(1 << 63), 1])
    for dim in (4, 32, 100):
        weights = start_weights(ids, dim, 0.1)
        assert weights.shape == (5, dim)
        assert weights.dtype == np.float32
        assert not weights[0].any()
        assert set(np.unique(weights[1:])) == {np.float32(-0.1), np.float32(0.1)}
        assert (weights[1] == weights[4]).all()
        assert (weights[1] != weights[2]).any()


def test_first_weights_have_no_common_direction():
    weights = start_weights(np.arange(1, 20_001), 64, 1.0)
    assert np.abs(weights.mean(0)).max() < 0.05


def test_mix_is_splitmix64():
    # The first outputs of splitmix64 from the seed 0 (Vigna's reference code, splitmix64.c).
    assert mix(np.array([0], np.int64))[0] == 0xE220A8397B1DCDAF


def test_tables_share_one_dimension():
    specs = table_specs(FeatureSettings(dim=16))
    assert [s.name for s in specs] == ["user", "item", "category"]
    assert {s.settings.dim for s in specs} == {16}
