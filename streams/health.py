"""How a worker knows that it is not well: work that waits and does not get done, a Kafka that is away."""

from __future__ import annotations

import time

AWAY_SECONDS = 10.0  # Kafka that answers nothing for so long is worth saying


class Progress:
    """Whether there is work, and since when none of it was done. Told by the worker, read from any thread."""

    def __init__(self) -> None:
        self._since: float | None = None  # None: there is nothing to do

    def wanted(self) -> None:
        """There is something to do."""
        if self._since is None:
            self._since = time.monotonic()

    def made(self, more: bool) -> None:
        """Some of it was done; `more`: there is more to do."""
        self._since = time.monotonic() if more else None

    @property
    def stuck_s(self) -> float:
        """For how long work has waited without any being done."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


def kafka_away(away_s: float) -> str:
    """Why a worker is unwell if Kafka has not answered for so long; "" where that is not long."""
    return f"Kafka has not answered for {away_s:.0f} s" if away_s > AWAY_SECONDS else ""
