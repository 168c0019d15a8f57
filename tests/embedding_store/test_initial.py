"""What a new row starts from follows from its id and the table's settings alone, and it starts only once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import WEIGHTS
from embedding_store.initial import first_weights
from embedding_store.specs import Initialiser, Optimizer, RowRules, TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables

INITIALISERS: tuple[Initialiser, ...] = get_args(Initialiser)
DRAWN = [i for i in INITIALISERS if i != "zero"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
MASK = (1 << 64) - 1


def _settings(initialiser: Initialiser, scale: float = 1.0, dim: int = 32, **rest: int) -> TableSettings:
    return TableSettings(dim=dim, initialiser=initialiser, init_scale=scale, init_seed=rest.get("seed", 0))


def _splitmix(x: int) -> int:
    """What splitmix64 gives first from the state x (Vigna, splitmix64.c)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("dim", [4, 32, 100])
def test_signs_are_the_bits_of_the_ids_hash(dim: int) -> None:
    ids = [1, 2, -(1 << 63), -1, 77]
    expected = [[0.1 if _splitmix((i + 1 + j // 64) & MASK) >> (j % 64) & 1 else -0.1 for j in range(dim)] for i in ids]
    got = first_weights(_settings("signs", 0.1, dim), np.array(ids))
    np.testing.assert_array_equal(got, np.array(expected, np.float32), strict=True)


def test_uniform_and_normal_are_splitmix64_from_the_ids_hash() -> None:
    ids, dim = [5, -9], 8
    uniform, normal = [], []
    for i in ids:
        key = _splitmix(i & MASK)
        words = [_splitmix((key + j * 0x9E3779B97F4A7C15) & MASK) for j in range(3 * dim)]
        uniform.append([((word >> 40) + 0.5) / 2**23 - 1 for word in words[:dim]])
        parts = [(word >> shift & 0xFFFF) for word in words for shift in (0, 16, 32, 48)]
        r = [(sum((part + 0.5) / 65536 for part in parts[12 * j : 12 * j + 12]) - 6) / 4 for j in range(dim)]
        powers = ((1, 3.949846138), (3, 0.252408784), (5, 0.076542912), (7, 0.008355968), (9, 0.029899776))
        normal.append([sum(factor * x**power for power, factor in powers) for x in r])
    np.testing.assert_allclose(first_weights(_settings("uniform", dim=dim), np.array(ids)), uniform, atol=1e-6)
    np.testing.assert_allclose(first_weights(_settings("normal", dim=dim), np.array(ids)), normal, atol=1e-6)


@pytest.mark.parametrize("initialiser", INITIALISERS)
@given(ids=arrays.arrays(np.int64, st.integers(0, 20), elements=st.integers(-(1 << 63), (1 << 63) - 1)), data=st.data())
def test_a_row_depends_on_its_id_alone(initialiser: Initialiser, ids: np.ndarray, data: st.DataObject) -> None:
    settings = _settings(initialiser, 0.3, 12)
    every = first_weights(settings, ids)
    assert (every.shape, every.dtype) == ((len(ids), 12), np.float32)
    order = np.array(data.draw(st.permutations(range(len(ids)))), np.int64)
    np.testing.assert_array_equal(first_weights(settings, ids[order]), every[order])
    for i, row in zip(ids, every, strict=True):
        np.testing.assert_array_equal(first_weights(settings, np.array([i]))[0], row)
    assert not every[ids == 0].any(), "id 0 is the default row"


@pytest.mark.parametrize("initialiser", DRAWN)
def test_another_seed_is_another_start(initialiser: Initialiser) -> None:
    ids = np.arange(1, 2001)
    a, b = (first_weights(_settings(initialiser, seed=seed), ids) for seed in (0, 1))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def _kolmogorov(drawn: np.ndarray, cdf: np.ndarray) -> float:
    """√n times the distance of `drawn` [n] ascending from the distribution `cdf`: over 1.95 once in a thousand."""
    n = len(drawn)
    return float(np.abs(cdf - (np.arange(n) + 0.5) / n).max() * math.sqrt(n))


@pytest.mark.parametrize("ids", [np.arange(1, 10_001), np.arange(1, 10_001) << 40], ids=["low", "high"])
@pytest.mark.parametrize("initialiser", DRAWN)
def test_numbers_are_of_the_distribution_and_independent(initialiser: Initialiser, ids: np.ndarray) -> None:
    """Over rows and over elements, for ids that are not hashes as well."""
    weights = first_weights(_settings(initialiser, 2.0), ids)
    drawn = np.sort(weights.ravel()[::7].astype(np.float64)) / 2
    if initialiser == "signs":
        assert set(np.unique(drawn)) == {-1.0, 1.0}
    elif initialiser == "uniform":
        assert np.abs(drawn).max() < 1
        assert _kolmogorov(drawn, (drawn + 1) / 2) < 1.95
    else:
        assert _kolmogorov(drawn, np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in drawn])) < 1.95
    variance = {"signs": 4.0, "uniform": 4 / 3, "normal": 4.0}[initialiser]
    assert weights.mean() == pytest.approx(0, abs=4 * math.sqrt(variance / weights.size))
    assert weights.var() == pytest.approx(variance, rel=0.02)
    apart = np.corrcoef(weights.T) - np.eye(32)
    assert np.abs(apart).max() < 5 / math.sqrt(len(ids)), "no two elements go together"
    assert np.abs(weights.mean(0)).max() < 5 * math.sqrt(variance / len(ids)), "there is no common direction"
    neighbours = (weights[1:] * weights[:-1]).mean() / variance
    assert abs(neighbours) < 5 / math.sqrt(weights.size), "nor do two ids"


@pytest.mark.parametrize("initialiser", DRAWN)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_row_begins_when_it_is_admitted_and_never_again(
    tmp_path: Path, initialiser: Initialiser, optimizer: Optimizer
) -> None:
    """Evicted, restored or learned down to zero it comes back as it was; forgotten it begins anew, in whatever row."""
    settings = TableSettings(
        dim=8, capacity=4, optimizer=optimizer, initialiser=initialiser, init_scale=0.5, rules=RowRules(admit_after=2)
    )
    spec, ids = TableSpec("t", ("t",), settings), np.array([1, 2, 3, 4])
    first = first_weights(settings, ids)
    with CheckpointStore(tmp_path / "s", {"t": spec.layout}) as store:
        tables = EmbeddingTables([spec], store=store)

        def weights(of: np.ndarray) -> np.ndarray:
            return tables.read_rows("t", tables.rows("t", of, admit=False))[WEIGHTS]

        def commit() -> None:
            head = store.head()
            sequence = head.sequence + 1 if head else 1
            store.commit(Commit(1, sequence, b"", {}, tables.touched(), tables.sketches(), gone=tables.gone()))
            tables.clear_touched()

        tables.rows("t", ids, admit=True)
        assert not weights(ids).any(), "seen once: it has no row"
        tables.rows("t", ids[::-1], admit=True)
        np.testing.assert_array_equal(weights(ids), first)
        tables.rows("t", ids, admit=True)
        np.testing.assert_array_equal(weights(ids), first, "one that has a row keeps it")
        assert not weights(np.array([0, 99])).any()

        rows = tables.rows("t", ids[:2], admit=True)
        tables.write_rows("t", rows, {WEIGHTS: np.stack((np.zeros(8), np.full(8, 7.0)))})
        commit()
        tables.rows("t", np.array([5, 6, 7, 8]), admit=True, at_once=True)
        commit()
        tables.rows("t", ids, admit=True)
        expected = np.concatenate((np.zeros((1, 8)), np.full((1, 8), 7.0), first[2:]))
        np.testing.assert_array_equal(weights(ids), expected)
        commit()

        tables = EmbeddingTables([spec], store=store)
        tables.restore()
        tables.rows("t", ids, admit=True)
        np.testing.assert_array_equal(weights(ids), expected)

        tables.forget("t", ids[1:3])
        tables.rows("t", ids[2:0:-1], admit=True, at_once=True)
        np.testing.assert_array_equal(weights(ids), np.concatenate((expected[:1], first[1:])))


def test_where_there_is_no_room_the_default_row_stays_zero() -> None:
    settings = TableSettings(dim=4, capacity=2, initialiser="normal")
    tables = EmbeddingTables([TableSpec("t", ("t",), settings)])
    rows = tables.rows("t", np.array([3, 2, 1]), admit=True)
    assert rows.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(
        tables.read_rows("t", rows)[WEIGHTS], first_weights(settings, np.array([0, 2, 1]))
    )
