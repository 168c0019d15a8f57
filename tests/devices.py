"""Where tests of the device path run: on the host, and on CUDA where there is a device (docs/gpu.md)."""

import pytest
import torch

ON = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ]),
]  # fmt: skip
