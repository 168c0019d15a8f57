"""How weights travel: float32 as they are, or in fewer bytes that are close to them. Free of torch.

| encoding | bytes of a row of `dim` | |
|---|---|---|
| fp32 | 4 dim | exact |
| fp16 | 2 dim | off by 2^-11 of the value (by 2^-25 where that is more); clipped at ±65,504 |
| int8 | dim + 8 | 256 steps between the row's least and largest weight: off by half a step |

int8 is fbgemm's row-wise quantisation (Fused8BitRowwise: scale and bias as float32 beside each row). A row is sent
whole whenever it was touched, so errors do not add up over versions.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Encoding = Literal["fp32", "fp16", "int8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
SCALE, BIAS = "scale", "bias"
_STEPS = np.float32(255)
_MAX_HALF = np.float32(65_504)


def encode_weights(weights: np.ndarray, encoding: Encoding) -> dict[str, np.ndarray]:
    """Weights float32 [n, dim] → arrays [n, …] by name: "" their codes; of int8 SCALE and BIAS float32 [n] too.

    A row with a weight that is not finite comes back with no finite weight.
    """
    if encoding == "fp32":
        return {"": weights}
    if encoding == "fp16":
        return {"": np.clip(weights, -_MAX_HALF, _MAX_HALF).astype(np.float16)}
    with np.errstate(invalid="ignore", over="ignore"):
        least, most = weights.min(1, initial=np.inf), weights.max(1, initial=-np.inf)
        scale = most / _STEPS - least / _STEPS  # the difference itself may be too large
        step = np.where(scale > 0, scale, np.float32(1))[:, None]
        codes = np.rint((weights - least[:, None]) / step)
    finite = np.isfinite(scale)
    codes = np.clip(np.where(finite[:, None], codes, 0), 0, _STEPS).astype(np.uint8)
    bias = np.where(finite, least, np.float32("nan"))
    return {"": codes, SCALE: np.where(finite, scale, np.float32(0)), BIAS: bias}


def decode_weights(arrays: dict[str, np.ndarray], encoding: Encoding) -> np.ndarray:
    """The inverse of `encode_weights`, as near as it comes: float32 [n, dim]. Raises LookupError, ValueError."""
    codes = arrays[""]
    expected = {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8}[encoding]
    if codes.dtype != expected:
        raise ValueError(f"weights said to be {encoding} are {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"weights are of shape {list(codes.shape)}")
    if encoding == "int8":
        # Of other shapes numpy would make rows, or columns, that were never sent.
        if not arrays[SCALE].shape == arrays[BIAS].shape == (len(codes),):
            raise ValueError("weights and their scales are not of the same rows")
        return codes * arrays[SCALE][:, None] + arrays[BIAS][:, None]
    return codes.astype(np.float32, copy=False)
