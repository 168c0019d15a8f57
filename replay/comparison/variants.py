"""The same log under several settings: what each learns is its own, what all are measured on is one.

Settings of the model alone: one stream, and all are shown its bytes. Settings that change the stream (those of [join],
and of STREAM): each has a stream of its own, and alignment.py says what is measured then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from online_model.settings import TrainerSettings
from replay.comparison.harness import COMPARED, LESS_IS_BETTER
from streams.joiner import JoinSettings

STREAM = ("batch_size", "negatives", "recent_items")  # of the model: what the stream hangs on
# Nothing is published here, nothing is downsampled, and no broker stamps a time: these change no figure.
WITHOUT_EFFECT = (
    "join.unclicked_of", "join.future_ms", "model.encoding", "model.row_bytes_per_s", "model.refresh_s", "model.guard",
)  # fmt: skip
SEEDS = ("model.seed", "model.ranker.seed")  # one comparison has one


@dataclass(frozen=True)
class Variant:
    """One settings file."""

    name: str
    join: JoinSettings
    model: TrainerSettings

    @property
    def key(self) -> bytes:
        """Equal where the streams are."""
        return msgspec.json.encode([self.join, [getattr(self.model, name) for name in STREAM]])


def said_of(variants: Sequence[Variant], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON-ready: `settings` of each variant, `differences` between them, `verdicts` in words."""
    return {
        "settings": {v.name: _sections(v) for v in variants},
        "differences": differing(variants),
        "verdicts": verdicts(runs, [v.name for v in variants]),
    }


def _sections(variant: Variant) -> dict[str, Any]:
    return {"join": msgspec.to_builtins(variant.join), "model": msgspec.to_builtins(variant.model)}


def differing(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """{setting: {name: value}} of what is not the same in all and can make a difference; sections are flattened."""
    flat = {v.name: flattened(_sections(v)) for v in variants}
    first = next(iter(flat.values()))
    return {
        name: {variant: values[name] for variant, values in flat.items()}
        for name in first
        if any(values[name] != first[name] for values in flat.values()) and not is_void(name)
    }


def is_void(name: str) -> bool:
    """Whether no figure of a comparison can hang on a setting of [join] or [model]."""
    of_join = name == "model.purchase_wait_ms"  # is said once, in [join]
    return of_join or name in SEEDS or any(f"{name}.".startswith(f"{void}.") for void in WITHOUT_EFFECT)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= flattened(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def verdicts(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A line for each figure of each two settings: which is better, by how much, and from where to where that may be.

    Over several seeds: the mean difference, and the interval that holds those of all.
    """
    lines = []
    for number, pair in enumerate(runs[0]["pairs"]):
        one, other = pair["of"], pair["less"]
        if other not in names:
            continue
        for figure in COMPARED:
            found = [run["pairs"][number]["figures"][figure] for run in runs]
            if any(f is None for f in found):
                continue
            mean = float(np.mean([f["difference"] for f in found]))
            low, high = min(f["interval"][0] for f in found), max(f["interval"][1] for f in found)
            lines.append(f"{COMPARED[figure]}: " + _verdict(one, other, (mean, low, high), figure in LESS_IS_BETTER))
    return lines


def _verdict(one: str, other: str, found: tuple[float, float, float], less_is_better: bool) -> str:
    mean, low, high = found
    if low <= 0 <= high:
        if low == mean == high:
            return f"{other} and {one} are equal"
        return f"no difference that can be seen ({one} − {other}: {mean:+.4f}, interval {low:+.4f} to {high:+.4f})"
    better, worse = (one, other) if (mean > 0) != less_is_better else (other, one)
    least, most = sorted((abs(low), abs(high)))
    return f"{better} better than {worse} by {abs(mean):.4f}, interval {least:.4f} to {most:.4f}"
