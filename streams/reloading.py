"""Settings of a serve worker that are changed while it runs: SIGHUP reads them again."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import msgspec

from embedding_store.errors import HeadraceError
from online_model.serving.policy import CHANGEABLE, PolicyInForce
from streams.settings import ServeWorkerSettings

log = logging.getLogger("headrace")


def reload_at_hangup(
    settings: ServeWorkerSettings, reload: Callable[[], ServeWorkerSettings], policy: PolicyInForce
) -> None:
    """From now on SIGHUP takes over what `reload` gives. `settings`: those the worker was started with."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, take_over, settings, reload, policy)


def take_over(settings: ServeWorkerSettings, reload: Callable[[], ServeWorkerSettings], policy: PolicyInForce) -> None:
    """Policy, arms, experiment and limits are changed at once; of what else differs from `settings` the log says that
    it needs a restart. Where the settings cannot be read nothing changes, and the log says why."""
    try:
        new = reload()
    except HeadraceError as error:
        log.error("the settings were read again and not taken: %s", error)
        return
    policy.change(new.serve)
    log.info("the settings were read again: policy %s is in force", policy.fingerprint)
    waiting = _differing(settings, new, "serve") + _differing(settings.serve, new.serve, *CHANGEABLE)
    if waiting:
        log.warning("what else was changed needs a restart: %s", ", ".join(f"serve.{name}" for name in waiting))


def _differing(old: msgspec.Struct, new: msgspec.Struct, *but: str) -> list[str]:
    """Names of the fields that differ."""
    return [name for name in old.__struct_fields__ if name not in but and getattr(old, name) != getattr(new, name)]
