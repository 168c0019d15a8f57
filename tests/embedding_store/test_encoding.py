"""Encoded weights are as near as the encoding says, as small as it says, and never other numbers by mistake."""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401 - its operators
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from embedding_store.columns import TableRows
from embedding_store.delta import Assembler, Version, encode
from embedding_store.encoding import BIAS, ENCODINGS, SCALE, Encoding, decode_weights, encode_weights
from embedding_store.errors import CorruptRecord
from tests.embedding_store.made import assert_same_version, version_of

TINY = 255 * 2.0**-149  # what is lost of a row whose steps are smaller than the smallest float32
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FLOATS)


def bound(weights: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The largest error float64 [n, 1 or dim] that is allowed."""
    exact = weights.astype(np.float64)
    if encoding == "fp32":
        return np.zeros(exact.shape)
    if encoding == "fp16":
        return np.where(np.abs(exact) > 65_504, np.abs(exact) - 65_504, np.maximum(np.abs(exact) * 2**-11, 2.0**-25))
    span, size = exact.max(1) - exact.min(1), np.abs(exact).max(1)
    return (span / 255 / 2 + size * 2**-21 + TINY)[:, None]  # half a step, and the rounding of float32


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=150, deadline=None)
@given(weights=MATRICES)
def test_round_trip_is_off_by_no_more_than_said(encoding: Encoding, weights: np.ndarray) -> None:
    out = decode_weights(encode_weights(weights, encoding), encoding)
    assert out.dtype == np.float32
    assert (np.abs(out.astype(np.float64) - weights) <= bound(weights, encoding)).all()


@settings(max_examples=60, deadline=None)
@given(weights=arrays(np.float32, st.tuples(st.integers(1, 20), st.just(16)), elements=st.floats(-100, 100, width=32)))
def test_int8_is_no_further_off_than_fbgemms(weights: np.ndarray) -> None:
    ops = torch.ops.fbgemm
    theirs = ops.Fused8BitRowwiseQuantizedToFloat(ops.FloatToFused8BitRowwiseQuantized(torch.from_numpy(weights)))
    ours = decode_weights(encode_weights(weights, "int8"), "int8")
    span = (weights.max(1) - weights.min(1))[:, None]
    assert (np.abs(ours - theirs.numpy()) <= span / 255 + 1e-4).all()
    assert np.abs(ours - weights).max() <= np.abs(theirs.numpy() - weights).max() * 1.01 + 2e-5  # float32's rounding


def test_a_row_that_is_not_finite_says_so_and_harms_no_other() -> None:
    weights = np.ones((4, 8), np.float32)
    weights[0, 3], weights[1, 0], weights[2, 7] = np.nan, np.inf, -np.inf
    out = decode_weights(encode_weights(weights, "int8"), "int8")
    assert not np.isfinite(out[:3]).any()
    assert (out[3] == 1).all()


def test_bytes_of_a_row_at_dim_64() -> None:
    rows = TableRows(np.arange(20_000), {"weights": np.random.default_rng(0).normal(size=(20_000, 64))})
    rows.columns["weights"] = rows.columns["weights"].astype(np.float32)
    size = {e: sum(map(len, encode(Version(1, 1, tables={"item": rows}), rows=e))) for e in ENCODINGS}
    assert size["fp16"] / size["fp32"] <= 0.52
    assert size["int8"] / size["fp32"] <= 0.32


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("max_bytes", [4_000, 100_000])
def test_a_version_comes_out_whole_with_its_weights_decoded(encoding: Encoding, max_bytes: int) -> None:
    version = version_of(7, n=300)
    parts = encode(version, max_bytes, encoding)
    assert max(map(len, parts)) <= max_bytes
    assembler = Assembler()
    (out,) = [v for v in map(assembler.add, parts) if v is not None]
    for table, rows in version.tables.items():
        weights = rows.columns["weights"]
        rows.columns["weights"] = decode_weights(encode_weights(weights, encoding), encoding)
        assert (np.abs(rows.columns["weights"] - weights) <= bound(weights, encoding)).all()
        assert out.tables[table].columns["weights"].dtype == np.float32
    assert_same_version(version, out)


def test_a_flipped_byte_of_encoded_rows_is_found() -> None:
    (part,) = encode(version_of(7), rows="int8")
    for place in range(8, len(part), 97):
        flipped = bytearray(part)
        flipped[place] ^= 1
        with pytest.raises(CorruptRecord):
            Assembler().add(bytes(flipped))


def test_what_is_said_and_what_is_there_must_agree() -> None:
    arrays_ = encode_weights(np.ones((2, 4), np.float32), "int8")
    assert set(arrays_) == {"", SCALE, BIAS}
    with pytest.raises(ValueError, match="are uint8"):
        decode_weights(arrays_, "fp32")
    with pytest.raises(LookupError):
        decode_weights({"": arrays_[""]}, "int8")
