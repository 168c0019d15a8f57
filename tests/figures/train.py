"""Figures of the trainer: a step beside TorchRec and torch, and ranks."""

from __future__ import annotations

from tests.figures.common import Bench, Line, Row, at_least, at_most, headrace
from tests.figures.streams import passed


def bench(bench: Bench) -> list[Row]:
    """A step with id map, tracking and commits, beside bare TorchRec and torch by hand, on one core"""
    found = headrace(bench.empty("train"), "bench", "train", "--runs", 3)
    per_s = [name for name in found if name.endswith("per_s")]
    return [
        *(Row(name, f"{found[name]:,.0f} examples/s", "for the ratios", True) for name in per_s),
        at_least("to bare TorchRec with fbgemm's kernel", found["ratio"], 1.3, " ×"),
        at_least("to the same model by hand in torch", found["ratio_to_limit"], 0.5, " ×"),
        Row("to bare TorchRec by processor time", f"{found['ratio_cpu']:.2f} ×", "", True),
        Row("to torch by processor time", f"{found['ratio_to_limit_cpu']:.2f} ×", "", True),
        *(Row(f"share of {stage}", f"{share:.1%}", "", True) for stage, share in found["share"].items()),
    ]


def scale(bench: Bench) -> list[Row]:
    """Two ranks on the same global batches, 200 steps, float32"""
    found = headrace(bench.empty("scale"), "bench", "scale", "--steps", 200, "--runs", 3)
    return [
        at_most("mean loss, two ranks to one", found["loss_difference"], 1e-5),
        Row("the same of a single step, at most", f"{found['largest_difference']:.2g}", "", True),
        *(Row(f"{size} rank(s)", f"{per_s:,.0f} examples/s", "", True) for size, per_s in found["ranks"].items()),
    ]


def ranks(bench: Bench) -> list[Row]:
    """Ranks against a dict, against one rank, under torchrun, and killed"""
    return [passed("tests/embedding_store/test_ranks.py", "tests/online_model/test_ranks.py")]


LINES: dict[str, Line] = {"bench": bench, "scale": scale, "ranks": ranks}
