"""Run by `headrace doctor` in a process of its own: imports what is named, finds the device, looks up a row.

Prints one JSON object a line: {"probe": name, "detail": …} or {"probe": name, "error": …}.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable


def tell(probe: str, check: Callable[[], str]) -> None:
    """Run one check and print what came of it."""
    try:
        answer = {"probe": probe, "detail": check()}
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything at all, and it is all to be told
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answer = {"probe": probe, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def device() -> str:
    """cuda with its name, or cpu."""
    import torch

    return f"cuda: {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "cpu"


def look_up() -> str:
    """Two rows through an EmbeddingCollection and back: forward, backward, and fbgemm's own operators are there."""
    import fbgemm_gpu  # noqa: F401 - registers the operators
    import torch
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=10, feature_names=["f"])
    tables = EmbeddingCollection(tables=[config], device=place)
    ids = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([3, 7]), torch.tensor([1, 1], dtype=torch.int32))
    rows = tables(ids.to(place))["f"].values()
    rows.sum().backward()
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 1], device=place))
    if tuple(rows.shape) != (2, 4) or offsets.tolist() != [0, 1, 2]:
        raise RuntimeError(f"wrong result: rows {tuple(rows.shape)}, offsets {offsets.tolist()}")
    return f"2 rows of 4 on {place}, forward and backward"


if __name__ == "__main__":
    for module in sys.argv[1:]:
        tell(module, lambda module=module: str(importlib.import_module(module).__name__))  # type: ignore[misc]
    if "torch" in sys.argv:
        tell("device", device)
        tell("look-up", look_up)
