"""The serve worker: a replica kept fresh from the topic `parameters` (follower.py), behind HTTP on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import torch
import uvicorn
import uvloop

from embedding_store.errors import UsageError
from online_model.features import FeatureSettings
from online_model.ranker import RankerSettings
from online_model.serving.app import create_app
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.serving.replica import Replica
from streams import app
from streams.follower import Follower
from streams.impressions import ImpressionLog
from streams.live_events import LiveEvents
from streams.metrics import tell_process
from streams.reloading import reload_at_hangup
from streams.settings import ServeWorkerSettings
from streams.shadow import Shadow
from streams.warm_up import WarmUp

log = logging.getLogger("headrace")

HOST = "127.0.0.1"
DRAIN_SECONDS = 5


def run_serve(settings: ServeWorkerSettings, reload: Callable[[], ServeWorkerSettings] | None = None) -> None:
    """Serve in the foreground until SIGTERM or SIGINT. Fatal errors end the process with exit 1 and one line.

    `reload`: reads the settings again, at SIGHUP (reloading.py).
    """
    serve = lambda stop: _serve(settings, stop, reload)  # noqa: E731
    app.run(serve, uvloop.new_event_loop, worker="serve", logs=settings.logs)


async def _serve(
    settings: ServeWorkerSettings, stop: asyncio.Event, reload: Callable[[], ServeWorkerSettings] | None
) -> None:
    # A request is a millisecond of small matrices: threads that meet at each of them cost more than they bring, and
    # on shared cores much more.
    torch.set_num_threads(1)
    listening = _listen(settings.port)
    holder = Holder(Replica(settings.serve, FeatureSettings(), RankerSettings()))  # empty: never asked to score
    if reload is not None:
        reload_at_hangup(settings, reload, holder.policy)
    tell_process(holder.metrics.registry, settings.data_dir)
    web = create_app(holder, settings.serve.max_age_ms, access_log=settings.access_log)
    server = _Server(
        uvicorn.Config(
            web,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # there is none in front of the loopback
            ws="none",
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    live = LiveUsers(settings.live_actions, settings.disorder_ms)
    follower = Follower(settings, holder, live)
    events = LiveEvents(settings, holder, live, follower.caught_up)
    holder.parts["live"] = live.figures
    parts: list[Follower | LiveEvents | WarmUp | ImpressionLog | Shadow] = [
        follower, events, WarmUp(settings, holder, follower.caught_up)
    ]  # fmt: skip
    if settings.shadow_topic:
        shadow = Shadow(settings, holder, live, lambda: web.turns.busy)
        holder.served.append(shadow.served)
        holder.parts["shadow"] = shadow.figures
        events.clicked, events.moved = shadow.clicked, shadow.moved
        parts.append(shadow)
    if settings.serve.log_impressions:
        impressions = ImpressionLog(settings, holder.metrics.registry)
        holder.served.append(impressions.served)
        parts.append(impressions)
    working = [asyncio.create_task(part.run()) for part in parts]
    serving = asyncio.create_task(server.serve([listening]))
    for task in (*working, serving):
        task.add_done_callback(app.fail_loudly)
    log.info("serving on http://%s:%s", *listening.getsockname())
    await stop.wait()
    holder.close()
    server.should_exit = True
    await serving
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port), backlog=2048)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port}: choose another port") from error


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM is handled by the worker: the long polls are let go first."""
        yield
