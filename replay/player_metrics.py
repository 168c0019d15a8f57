"""What a process that sends events says of that on /metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from streams.events import KINDS
from streams.metrics import About, Value, Values

GARBAGE = "garbage"  # records that were damaged on purpose
ABOUT: About = {
    "events_total": ("Events sent, as the joiner's balance will count them", ("kind",)),
    "behind_seconds": ("How late the record that is sent next is; at full speed 0", ()),
}


def tell_player(registry: CollectorRegistry, kinds: Callable[[], Mapping[type, int]], behind_s: Callable[[], float]
                ) -> None:  # fmt: skip
    """kinds: type of event → how many so far; any other type is garbage. Both are asked in the scrape's thread."""

    def values() -> dict[str, Value]:
        sent: dict[tuple[str, ...], float] = dict.fromkeys([(name,) for name in KINDS.values() if name != "tick"], 0)
        for kind, n in list(kinds().items()):
            sent[KINDS.get(kind, GARBAGE),] = n
        return {"events_total": sent, "behind_seconds": behind_s()}

    registry.register(Values("headrace_player_", ABOUT, values))
