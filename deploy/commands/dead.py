"""headrace replay dead: refused records to a file, or repaired and back to where they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.commands.common import Output, connected
from deploy.settings import Settings
from embedding_store.errors import UsageError


def replay_dead(
    settings: Settings, file: str | None, out: Path | None, repair: str | None, again: bool, json: bool
) -> None:
    """The command; `file`: what an earlier --out wrote, edited. Raises UsageError, BrokerError, LogError."""
    from replay import dead

    if out is not None and (file or repair):
        raise UsageError("--out writes what is new in events.dead, as it is: leave FILE and --repair out")
    if file is not None and again:
        raise UsageError("--again reads events.dead: leave FILE out")
    mend = dead.load_repair(repair) if repair is not None else None
    letters = dead.read_file(file) if file is not None else None
    settings = connected(settings)
    with Output(json) as output:
        if letters is not None:
            told = dead.send(letters, settings.connection, settings.topics, settings.join.join.future_ms, mend)
        else:
            with dead.NewLetters(settings.connection, settings.topics, again) as new:
                if out is not None:
                    told = dead.write_file(new, out)
                else:
                    told = dead.send(new, settings.connection, settings.topics, settings.join.join.future_ms, mend)
                new.done()
        result: dict[str, Any] = {
            "read": told.read, "written": told.written, "sent": told.sent, "refused": dict(told.refused),
            "skipped": told.skipped,
        }  # fmt: skip
        output.result(result, _text(told, out))


def _text(told: Any, out: Path | None) -> str:
    if out is not None:
        return f"{told.written:,} refused records are in {out}: edit it, then `headrace replay dead {out}`"
    lines = [f"{told.read:,} refused records: {told.sent:,} sent to events, {told.skipped:,} left out"]
    lines += [f"{count:,} are still refused: {reason}" for reason, count in told.refused.most_common()]
    return "\n".join(lines)
