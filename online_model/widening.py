"""A model that goes on in another shape: wider rows and layers, other heads, other tables. What it has learned stays.

Scores right after are those of before, but for the last bits (a longer sum of floats is added up in another order):

- Rows have zeros as their new weights (`embedding_store.reshape`), so the layers' new columns for them may be as in a
  fresh model: zero times anything is zero. They must be: were rows and columns zero both, neither had a gradient.
- New units of a hidden layer have the incoming weights of a fresh model, and outgoing ones of zero, which learn first
  (Net2WiderNet, Chen et al., ICLR 2016, arXiv 1511.05641, copies units instead, which then have to be told apart).
- New heads are as in a fresh model; heads that nobody needs any more go.

Adam's averages of new weights are zero and its count of steps stays, so their first step may be three learning rates
long, (1 − β1) / √(1 − β2), instead of one. Rows that are new after it begin with all their weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import orjson

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.copies import settle_directory
from embedding_store.errors import OtherLayouts, UsageError
from embedding_store.reshape import discard_half, reshape
from online_model.checkpoints import settings_digest, state_of
from online_model.features import CONTEXT, NUMBERS
from online_model.ranker import GATE_WIDTH, SCENARIO_COUNT, SCENARIO_DIM, Ranker
from online_model.settings import TrainerSettings

log = logging.getLogger("headrace")

# What each axis of a weight is made of: parts that grow, by name, and numbers that are what they are.
_DIM, _HIDDEN, _SECOND, _THIRD, _HEADS = "dim", "hidden", "second", "third", "heads"
_AXES: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "from_history.weight": ((_DIM,), (_DIM,)),
    "from_query.weight": ((_DIM,), (_DIM,)),
    "from_context.weight": ((_HIDDEN,), (_DIM, _DIM, _DIM)),
    "from_context.bias": ((_HIDDEN,),),
    "from_moment.weight": ((_HIDDEN,), (CONTEXT,)),
    "from_item.weight": ((_HIDDEN,), (_DIM, _DIM)),
    "from_numbers.weight": ((_HIDDEN,), (NUMBERS,)),
    "from_match.weight": ((_HIDDEN,), (_DIM,)),
    "from_scenario.weight": ((SCENARIO_COUNT,), (_HIDDEN,)),
    "attend.weight": ((_DIM,), (_DIM,)),
    "from_attended.weight": ((_HIDDEN,), (_DIM, _DIM)),
    "gate_in.weight": ((GATE_WIDTH,), (SCENARIO_DIM, CONTEXT, _DIM)),
    "gate_out.weight": ((_HIDDEN,), (GATE_WIDTH,)),
    "gate_out.bias": ((_HIDDEN,),),
    "second.weight": ((_SECOND,), (_HIDDEN,)),
    "second.bias": ((_SECOND,),),
    "heads": ((_HEADS,), (_THIRD,)),
    "tower.weight": ((_DIM, _DIM), (_DIM, _DIM, _DIM, CONTEXT)),
    "bias": ((_HEADS,),),
    "match": ((_HEADS,),),
}
_EXPERTS: dict[str, tuple[tuple[str | int, ...], ...]] = {  # the first axis is so for each of the experts
    "experts.weight": ((_THIRD,), (_SECOND,)),
    "experts.bias": ((_THIRD,),),
    "mixture.weight": ((_HEADS,), (_SECOND,)),
    "mixture.bias": ((_HEADS,),),
}
_ADDED = ("wide_near", "tower_near")  # that an older release does not have: as in a fresh model they change nothing
_OUTGOING = ("second.weight", "experts.weight", "mixture.weight", "heads")  # whose new columns come from new units
_SIZES = {
    _DIM: "from_history.weight", _HIDDEN: "from_context.bias", _SECOND: "second.bias", _HEADS: "bias",
}  # fmt: skip


def open_widened(
    settings: TrainerSettings,
    layouts: Mapping[str, np.dtype],
    ranker: Ranker,
    path: Path,
    clock: Callable[[], int],
    sync: bool = False,
) -> CheckpointStore:
    """The store at `path` (made if there is none), with the tables of `layouts` and dense weights as `ranker` has them.

    Where it was written with others it is reshaped first: tables, dense weights, optimizer, settings, all at once, as a
    commit of its own in a new epoch. No version goes out with it, so no replica can go on from there: they load the
    snapshot that is made of it. `ranker`: fresh, on the CPU; its weights are what is new. `clock`: ms UTC.

    Raises UsageError where something would become narrower, StoreLocked, StoreError.
    """
    settle_directory(path)  # after a rollback or a reshaping that was cut short
    fresh = ranker.weights()
    try:
        store = CheckpointStore(path, layouts, sync=sync)
        head = store.head()
        if head is None or all(name in head.dense and head.dense[name].shape == w.shape for name, w in fresh.items()):
            discard_half(path)
            return store
        store.close()
    except OtherLayouts:
        pass  # and nothing is open
    grown: list[str] = []

    def commit(reshaped: CheckpointStore) -> None:
        grown.extend(_commit(reshaped, settings, fresh, clock()))

    said = reshape(path, layouts, commit)
    store = CheckpointStore(path, layouts, sync=sync)
    if (head := store.head()) is not None:
        log.info("another shape of the model: %s; going on in epoch %s", "; ".join(said + grown), head.epoch)
    return store


def widened(stored: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The dense arrays of a commit, for a ranker of another shape.

    stored: weights by name, Adam's state of each as `adam.<weight>.<key>`, and others, which stay as they are.
    fresh: all weights of a new ranker of the wanted shape. Returns all of `stored` in that shape.

    Raises UsageError where a layer is wider in `stored`, or where the weights are those of another release.
    """
    before, after = _sizes(stored), _sizes(fresh)
    axes = _axes(before, after)
    for name in (_DIM, _HIDDEN, _SECOND, _THIRD):
        if after[name] < before[name]:
            raise UsageError(
                f"the stored model has {name} = {before[name]} and the settings {after[name]}: it cannot be made "
                f"narrower, set {name} back to {before[name]} or more, or choose an empty data directory"
            )
    out = dict(stored)
    for name, weights in fresh.items():
        if name in _ADDED and name not in stored:
            out[name] = weights
            continue
        if name not in axes:
            _expect(name, stored, weights.shape)
            continue
        _expect(name, stored, tuple(_length(axis, before) for axis in axes[name]))
        places = [_places(axis, before, after) for axis in axes[name]]
        source, target = np.ix_(*(a for a, _ in places)), np.ix_(*(b for _, b in places))
        new = weights.copy()
        if name in _OUTGOING:
            new[places[0][1]] = 0
        new[target] = stored[name][source]
        out[name] = new
        for key in ("exp_avg", "exp_avg_sq"):
            if (state := f"adam.{name}.{key}") in stored:
                out[state] = np.zeros_like(weights)
                out[state][target] = stored[state][source]
    return out


def _commit(store: CheckpointStore, settings: TrainerSettings, fresh: dict[str, np.ndarray], now_ms: int) -> list[str]:
    """What goes with the new tables, as the commit that begins the new epoch. Returns what has grown, in words."""
    head, version = store.head(), store.version()
    if head is None or version is None:
        return []
    state, dense, told = state_of(head, store.path), widened(head.dense, fresh), msgspec.to_builtins(settings)
    epoch, sequence = head.epoch + 1, head.sequence + 1
    version = replace(
        version, epoch=epoch, sequence=sequence, base=head.place, created_ms=max(now_ms, version.created_ms),
        dense={name: dense[name] for name in fresh}, info={**version.info, "settings": told},
    )  # fmt: skip
    store.commit(
        Commit(
            epoch, sequence, orjson.dumps({**state, "settings": told}, option=orjson.OPT_SORT_KEYS), dense,
            version=version, settings=settings_digest(told), event_time_ms=head.event_time_ms,
        )
    )  # fmt: skip
    before, after = _sizes(head.dense), _sizes(fresh)
    said = (_HIDDEN, _SECOND, _THIRD, _HEADS)  # the tables speak of the dim
    return [f"{name} from {before[name]} to {after[name]}" for name in said if before[name] != after[name]]


def _sizes(weights: Mapping[str, np.ndarray]) -> dict[str, int]:
    for name in (*_SIZES.values(), "heads", "experts.bias"):
        if name not in weights:
            raise _other_release(name)
    sizes = {name: len(weights[weight]) for name, weight in _SIZES.items()} | {_THIRD: weights["heads"].shape[1]}
    return sizes | {"experts": len(weights["experts.bias"]) // sizes[_THIRD]}


def _axes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[tuple[str | int, ...], ...]]:
    """Of all weights that may grow. Raises UsageError where the number of experts differs."""
    count = after["experts"]
    if before["experts"] != count:
        raise UsageError(
            f"the stored model has {before['experts']} experts and the settings {count}: set them back, or choose an "
            "empty data directory"
        )
    return _AXES | {name: (first * count, *rest) for name, (first, *rest) in _EXPERTS.items()}


def _length(axis: tuple[str | int, ...], sizes: Mapping[str, int]) -> int:
    return sum(sizes[part] if isinstance(part, str) else part for part in axis)


def _places(
    axis: tuple[str | int, ...], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where along an axis what is kept was, and where it is to be: int64 [n] each."""
    source, target = [], []
    old = new = 0
    for part in axis:
        had, has = (before[part], after[part]) if isinstance(part, str) else (part, part)
        kept = np.arange(min(had, has))  # fewer only of heads
        source.append(old + kept)
        target.append(new + kept)
        old, new = old + had, new + has
    return np.concatenate(source), np.concatenate(target)


def _expect(name: str, stored: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
    if name not in stored or stored[name].shape != shape:
        raise _other_release(name)


def _other_release(name: str) -> UsageError:
    return UsageError(
        f"the stored model's weights {name!r} are of other parts of the ranker ([model.ranker] attention, gates …), or "
        "of another release: use those, or choose an empty data directory"
    )
