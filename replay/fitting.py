"""Settings that fit a log: sizes of the tables, batches and windows, each with the reason. Free of torch."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from online_model.history import HISTORY
from online_model.settings import TrainerSettings
from replay.inspection import Inspection
from replay.readers.settings import ColumnMapping, LogSettings
from streams.joiner import JoinSettings
from streams.settings import LARGEST_BATCHES
from streams.topics import TopicSettings

Entry: TypeAlias = tuple[str, Any, str]  # name, value, why

STEPS = 500  # a short log should still give the model so many steps to learn in
LEAST_BATCH = 64
MOST_ROWS = 1 << 22  # of a table in memory: 0.5 GB of weights at dim 32
MIN_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000


def fitting_settings(log: LogSettings, found: Inspection) -> dict[str, list[Entry]]:
    """{section: entries} for a settings file with which `log`, in which `found` was found, can be learned from.

    Every value is inside the bounds of its field; what is not named fits as it is by default.
    """
    model = _model(found)
    sections = {"log": _log(log), "topics": _topics(found), "join": _join(found), "model": model}
    if log.columns != ColumnMapping():
        sections = {"log": sections["log"], "log.columns": _columns(log.columns), **sections}
    sections["model.features"] = _features(found, batch=dict((name, value) for name, value, _ in model)["batch_size"])
    return sections


def _log(log: LogSettings) -> list[Entry]:
    entries: list[Entry] = [
        ("format", log.format, "`headrace log inspect` says what is in it"),
        ("path", log.path, ""),
    ]
    if log.max_rejected_share != LogSettings().max_rejected_share:
        entries.append(("max_rejected_share", log.max_rejected_share, "as it was when this file was written"))
    return entries


def _columns(columns: ColumnMapping) -> list[Entry]:
    default = ColumnMapping()
    return [
        (name, value, "")
        for name, value in msgspec.structs.asdict(columns).items()
        if value != getattr(default, name) or name in ("user", "item", "time", "time_unit")
    ]


def _topics(found: Inspection) -> list[Entry]:
    default = TopicSettings().partitions
    users = found.users.different
    why = "a user's events stay in one of them; so many join workers can share the work"
    return [("partitions", max(1, min(default, users)), f"{users:,} users: {why}")]


def _join(found: Inspection) -> list[Entry]:
    default, kinds, span = JoinSettings(), found.kinds, said_duration((found.to_ms or 0) - (found.from_ms or 0))
    entries: list[Entry] = []
    if kinds["impression"]:
        entries += [
            ("implicit", False, f"{found.shown:,} items shown: those not clicked are the negatives"),
            ("wait_ms", default.wait_ms, "an impression that was not clicked for so long is learned as not clicked"),
            ("open_ms", default.open_ms, f"and can be acted on for {said_duration(default.open_ms)}"),
        ]
    else:
        why = "the log does not tell what was shown: a click is a positive, negatives are drawn"
        entries.append(("implicit", True, why))
    if purchases := kinds["purchase"]:
        why = f"{said_duration(default.purchase_window_ms)} from a click; {purchases:,} purchases in {span} of log"
        entries.append(("purchase_window_ms", default.purchase_window_ms, why))
    why = "time is in the log: idle partitions must not be moved by the clock of today"
    return [*entries, ("ticks", "log", why)]


def _model(found: Inspection) -> list[Entry]:
    default = TrainerSettings()
    positives = learnable(found)
    # The largest power of two that leaves so many steps, within bounds.
    batch = min(max(1 << (max(1, positives // STEPS).bit_length() - 1), LEAST_BATCH), default.batch_size)
    entries: list[Entry] = [
        ("batch_size", batch, f"{positives:,} examples: {max(1, positives // batch):,} steps of it"),
    ]
    if not found.kinds["impression"]:
        items = found.items.different
        recent = max(2, min(default.recent_items, items))
        why = f"negatives are drawn from the last so many items, of {items:,}"
        entries += [
            ("negatives", default.negatives, "for each click"),
            ("recent_items", recent, why),
        ]
    return [*entries, ("seed", default.seed, "another gives other negatives, and so another model")]


def _features(found: Inspection, batch: int) -> list[Entry]:
    """Capacities: room for twice the ids, and for what the largest batch may touch: where there is none a train worker
    that has fallen behind cannot take larger batches, and takes three times as long to catch up."""
    most = LARGEST_BATCHES * batch
    touched = {"users": most, "items": most * (1 + TrainerSettings().negatives + HISTORY), "categories": most}
    counted = {"users": found.users, "items": found.items, "categories": found.categories}
    entries: list[Entry] = []
    for name, ids in counted.items():
        rows = -(-(2 * ids.different + touched[name]) // 64) * 64
        count = f"{'' if ids.exact else 'about '}{ids.different:,} {name} in the log"
        room = "room for twice as many and the largest batch"
        why = f"{count}, {room}" if ids.different else f"the log tells of no {name}"
        if rows > MOST_ROWS:
            rows, why = MOST_ROWS, f"{count}; so many rows are in memory, the others in the store"
        entries.append((name, rows, why))
    return entries


def learnable(found: Inspection) -> int:
    """How many examples the joiner makes of the log, about: what was shown, or else what was clicked."""
    return found.shown or found.kinds["click"]


def said_duration(ms: int) -> str:
    """ms as a reader would say it: 3 days, 20 seconds, 1 ms."""
    for unit, name in ((DAY_MS, "days"), (HOUR_MS, "hours"), (MIN_MS, "minutes"), (1000, "seconds")):
        if ms >= 2 * unit:
            return f"{ms / unit:.0f} {name}"
    return f"{ms:,} ms"
