"""What a replica says of itself, made into figures: samples of the page, the JSON at the end of a demo or a replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from online_model.examples import Counts
from online_model.positions import position_of

BALANCE = ("events_in", "rejected", "duplicates", "late", "joined", "history_only", "open", "set_aside")


@dataclass
class Model:
    """The newest answer of a replica's `/v1/model`, read as the demo needs it."""

    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> dict[str, Any]:
        return self.answer.get("info") or {}

    @property
    def version(self) -> str:
        return self.answer.get("version", "")

    @property
    def sequence(self) -> int:
        return self.answer.get("sequence", -1)

    @property
    def positions(self) -> dict[int, int]:
        """Partition of `events` → all below has had its effect."""
        return {int(p): offset for p, offset in (self.answer.get("positions") or {}).items()}

    @property
    def partitions(self) -> dict[int, dict[str, Any]]:
        return {int(p): at for p, at in (self.info.get("partitions") or {}).items()}

    @property
    def next_offsets(self) -> dict[int, int]:
        """Partition of `events` → the records below are in the figures of this version."""
        return {p: at["next"] for p, at in self.partitions.items()}

    @property
    def trained(self) -> dict[int, tuple[int, int]]:
        """Partition → rows trained and the sum of their ids, those that were rolled back included: what the oracle
        checks."""
        return {p: position_of(at).accounted for p, at in self.partitions.items()}

    @property
    def set_aside(self) -> dict[int, list[list[int]]]:
        """Partition of `events` → the offsets [from, to) that were not joined: what the oracle leaves out."""
        return {p: at["set_aside"] for p, at in self.partitions.items()}

    @property
    def trained_rows(self) -> int:
        return sum(at["rows"] for at in self.partitions.values())

    @property
    def left_out(self) -> int:
        """Rows of these, from whose batches nothing was learned: their loss exploded, or was no number."""
        return self.info.get("left_out", 0)

    def counts(self) -> Counts:
        """The joiner's balance, all partitions together."""
        total = Counts()
        for at in self.partitions.values():
            for name, value in at["counts"].items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def prequential(self, recent: bool = False) -> dict[str, dict[str, float | None]]:
        """task → {auc, ne, calibration, count}, each example scored once, before it was learned."""
        tasks = self.info.get("metrics") or {}
        figures = {name: task["recent"] if recent else task for name, task in tasks.items()}
        return {
            name: {key: task[key] for key in ("auc", "ne", "calibration", "count")}
            for name, task in figures.items()
            if task["count"]
        }


def balance(counts: Counts) -> dict[str, int]:
    """The balance of the contract."""
    return {name: getattr(counts, name) for name in BALANCE}


def rate_of(now: float, before: float, seconds: float) -> float:
    """Per second, over `seconds`."""
    return max(0.0, (now - before) / seconds) if seconds > 0 else 0.0


def sample(model: Model, freshness: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """One second of the run for the page and the terminal; `more`: what the replica does not know."""
    counts = model.counts()
    return {
        "events_in": counts.events_in,
        "examples": counts.rows,
        "trained_examples": model.trained_rows,
        "trainer_version": model.version,
        "replica_version": model.version,
        "versions_published": model.sequence,
        "freshness_ms": freshness,
        "prequential": model.prequential(recent=True),
        "rejected": counts.rejected,
        "duplicates": counts.duplicates,
        "late": counts.late,
        "open": counts.open,
        "rows": model.answer.get("rows") or {},
        **more,
    }
