"""Features and first weights: one code for trainer and replicas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.ids import feature_id
from online_model.features import (
    CLICK_PRIOR,
    CONTEXT,
    FEATURES,
    RATES,
    SELLER,
    WORD,
    age,
    heat,
    matches,
    mix,
    rates,
    table_specs,
    user_features,
    words_of,
)
from online_model.history import EMPTY, HISTORY, Kind, UserHistory, as_array
from online_model.settings import FeatureSettings
from tests.online_model.plain_history import COUNTERS, KINDS, PANES_S

MONDAY = 1_767_571_200_000  # 2026-01-05 00:00 UTC
HOUR, DAY = 3_600_000, 86_400_000


def counted(impressions=0, clicks=0, interactions=0):
    return rates(*(np.array([n], np.int64) for n in (impressions, clicks, interactions)), CLICK_PRIOR)


def test_what_is_unknown_has_no_numbers():
    assert counted().tolist() == [[0.0] * (RATES - 1) + [1.0]], "but for that it was never seen"
    assert age(np.array([0]), 1_700_000_000_000).tolist() == [[0.0]]


def test_the_click_rate_goes_from_the_prior_to_what_was_seen():
    shown = np.array([0, 20, 2_000_000])
    for usual in (0.1, 0.7):
        z = rates(shown, shown // 2, np.zeros(3, int), usual)[:, 0]
        rate, strength = 1 / (1 + np.exp(-(z + np.log(usual / (1 - usual))))), 1 / (usual * (1 - usual))
        assert rate == pytest.approx([usual, (10 + usual * strength) / (20 + strength), 0.5], abs=1e-4)


def test_interactions_claim_no_click_rate():
    features = counted(interactions=1000)
    assert features[0, 0] == 0
    assert features[0, 2] > 0


def test_counts_are_logarithms_of_what_was_shown():
    assert counted(impressions=99, clicks=3)[0, 1] == pytest.approx(np.log(100) / 3)


def test_late_clicks_never_make_a_rate_above_one():
    assert np.isfinite(counted(impressions=1, clicks=10_000)).all()


def test_heat_halves_with_each_half_life_and_never_grows_by_itself():
    start = np.array([[8.0, 8.0]], np.float32)
    assert heat(start, np.array([MONDAY]), MONDAY + HOUR)[0].tolist() == pytest.approx([4.0, 8 * 0.5 ** (1 / 72)])
    assert heat(start, np.array([MONDAY]), MONDAY + 3 * DAY)[0, 1] == pytest.approx(4.0)
    assert heat(start, np.array([MONDAY]), MONDAY - DAY).tolist() == start.tolist(), "an example of before"


def test_words_are_of_any_script_each_once_without_case():
    assert words_of("Grün, GRÜN 42 鞋", 4).tolist() == [feature_id(WORD, w) for w in ("grün", "42", "鞋")] + [0]
    assert words_of("a b c", 2).tolist() == words_of("a b", 2).tolist(), "the first so many"
    assert not words_of(" -- ", 3).any()


def test_matches_are_of_the_same_item_category_and_seller_and_of_nothing_unknown():
    history = UserHistory()
    for second, item in enumerate((11, 12, 13)):
        history.push(item, MONDAY + 1000 * second, Kind.CLICK)
    past = user_features(as_array([history.latest()]), MONDAY + 3_000)
    entries = [past.items, np.where(past.items == 0, 0, past.items % 2 + 5), np.zeros_like(past.items)]
    items = [np.array([13, 99, 0]), np.array([6, 5, 0]), np.zeros(3, int)]
    got = matches(past, entries, items, np.zeros(3, int))
    newest, all_ = past.recency[0, 0], past.recency.sum() + 1e-6
    assert got[0].tolist() == pytest.approx([newest, newest / all_, newest, (newest + past.recency[0, 2]) / all_, 0, 0])
    assert got[1].tolist() == pytest.approx([0, 0, past.recency[0, 1], past.recency[0, 1] / all_, 0, 0])
    assert not got[2].any(), "0 is like no other, not even like what is not there"


def test_tables_are_those_that_features_name():
    specs = {spec.name: spec for spec in table_specs(FeatureSettings(dim=8, sellers=3, words=5))}
    assert specs.keys() == {feature.table for feature in FEATURES if feature.table}
    assert (specs[SELLER].settings.capacity, specs[WORD].settings.capacity) == (3, 5)


def test_age_is_never_negative_and_takes_one_time_or_many():
    created = np.array([1_000, 7_201_000])
    one = age(created, 3_601_000)
    many = age(created, np.array([3_601_000, 3_601_000]))
    assert one.tolist() == many.tolist()
    assert one[:, 0] == pytest.approx([np.log(2) / 3, 0])


def test_mix_is_splitmix64():
    # The first outputs of splitmix64 from the seed 0 (Vigna's reference code, splitmix64.c).
    assert mix(np.array([0], np.int64))[0] == 0xE220A8397B1DCDAF


def test_tables_share_one_dimension():
    specs = table_specs(FeatureSettings(dim=16))
    assert {s.settings.dim for s in specs} == {16}


AGES = st.sampled_from([1_000, 60_000, 16 * 60_000, HOUR - 1_000, HOUR, 5 * HOUR, DAY, 2 * DAY, 6 * DAY, 40 * DAY])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), AGES, st.sampled_from(list(KINDS))), max_size=30), st.integers(0, 50))
def test_counts_are_of_the_panes_that_are_inside_at_the_moment(actions, hours):
    now = MONDAY + hours * HOUR + 123_456
    actions = sorted(((item, now - age, kind) for item, age, kind in actions), key=lambda a: a[1])
    history = UserHistory()
    for item, ts, kind in actions:
        history.push(item, ts, KINDS[kind])
    got = user_features(as_array([history.as_of(now)]), now).context[0, :12].reshape(3, 4)
    expected = np.zeros((3, 4))
    for horizon, width in enumerate(PANES_S):
        for _, ts, kind in actions:
            expected[horizon, COUNTERS[kind]] += now // 1000 // width - ts // 1000 // width < 4
    assert got == pytest.approx(np.log1p(expected) / 4)


def test_a_user_is_seen_with_the_age_of_what_was_done():
    history = UserHistory()
    history.push(7, MONDAY, KINDS["click"])
    history.push(8, MONDAY + 60_000, KINDS["watch"])
    history.push(9, MONDAY + 60_000, KINDS["cart"])
    seen = user_features(as_array([history.latest(), EMPTY]), MONDAY + HOUR)
    assert seen.items.shape == seen.kinds.shape == seen.recency.shape == (2, HISTORY)
    assert seen.items[0, [0, 1, 14]].tolist() == [8, 7, 9]
    assert seen.kinds[0, [0, 1, 14]].tolist() == [2, 1, 3]
    recency = [1 - math.log1p(s) / math.log1p(30 * 86_400) for s in (3_540, 3_600)]
    assert seen.recency[0, [0, 1, 14]].tolist() == pytest.approx([*recency, recency[0]])
    assert seen.context[0, 12:14].tolist() == pytest.approx([recency[0]] * 2)
    assert np.count_nonzero(seen.items, axis=1).tolist() == np.count_nonzero(seen.recency, axis=1).tolist() == [3, 0]
    assert not seen.context[1, :14].any()
    late = user_features(as_array([history.latest()]), MONDAY + 400 * DAY)
    assert not late.recency.any()
    assert not late.context[0, :12].any(), "every pane is over"


def test_time_is_two_angles():
    states = as_array([EMPTY] * 3)
    seen = user_features(states, np.array([MONDAY, MONDAY + 6 * HOUR, MONDAY + 7 * DAY])).context[:, 14:]
    assert seen.shape == (3, CONTEXT - 14)
    assert seen[0] == pytest.approx(seen[2], abs=1e-6)
    assert seen[0, [0, 2]].tolist() == pytest.approx([0, 1], abs=1e-6)  # sine and cosine of midnight
    assert seen[1, [0, 2]].tolist() == pytest.approx([1, 0], abs=1e-6)  # of six in the morning
    assert np.arctan2(seen[1, 1], seen[1, 3]) - np.arctan2(seen[0, 1], seen[0, 3]) == pytest.approx(2 * np.pi / 28)


def test_a_clock_that_is_behind_sees_what_has_happened_as_just_now():
    history = UserHistory()
    history.push(7, MONDAY, KINDS["click"])
    seen = user_features(as_array([history.latest()]), MONDAY - 10 * DAY)
    assert seen.recency[0, 0] == 1
    assert seen.context[0, [0, 4, 8]].tolist() == pytest.approx([math.log1p(1) / 4] * 3)


def test_one_time_for_all_or_one_for_each():
    history = UserHistory()
    history.push(7, MONDAY, KINDS["click"])
    states = as_array([history.latest()] * 3)
    one, many = user_features(states, MONDAY + HOUR), user_features(states, np.full(3, MONDAY + HOUR))
    for name in ("items", "kinds", "recency", "context"):
        assert (getattr(one, name) == getattr(many, name)).all()
    assert one.context.dtype == one.recency.dtype == np.float32
    assert len(user_features(states[:0], MONDAY).context) == 0
