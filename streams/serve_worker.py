"""The serve worker: a replica kept fresh from the topic `parameters` (follower.py), behind HTTP."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import torch
import uvloop

from embedding_store.errors import UsageError
from online_model.features import FeatureSettings
from online_model.ranker import RankerSettings
from online_model.serving.access import Gate, check_listening, is_loopback
from online_model.serving.app import App, create_admin_app, create_app
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.serving.replica import Replica
from online_model.serving.server import Server, listen
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
    listeners = _Listeners(settings)
    holder = Holder(Replica(settings.serve, FeatureSettings(), RankerSettings()))  # empty: never asked to score
    if reload is not None:
        reload_at_hangup(settings, reload, holder.policy)
    tell_process(holder.metrics.registry, settings.data_dir)
    web = listeners.over(holder)
    holder.let_by = web.turns.let_by
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
    serving = listeners.serve()
    for task in (*working, *serving):
        task.add_done_callback(app.fail_loudly)
    await stop.wait()
    holder.close()
    listeners.end()
    await asyncio.gather(*serving)
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)


class _Listeners:
    """Where the replica answers: one listener for scoring and health, one for the rest if it has a port of its own."""

    def __init__(self, settings: ServeWorkerSettings) -> None:
        """Listens at once, and is asked nothing yet. Raises UsageError."""
        http, self._settings = settings.http, settings
        self._gate = Gate(http)
        check_listening(http, self._gate, http.host, "http.host")
        if settings.admin_port:
            check_listening(http, self._gate, http.admin_host, "http.admin_host")
        elif not is_loopback(http.host):
            raise UsageError(
                f"http.host = {http.host} is beyond the loopback, where /metrics does not belong: set serve.admin_port"
            )
        self._sockets = [listen(http.host, settings.port)]
        if settings.admin_port:
            self._sockets.append(listen(http.admin_host, settings.admin_port, "admin_port"))
        self._servers: list[Server] = []

    def over(self, holder: Holder) -> App:
        """The app that scores."""
        settings = self._settings
        web = create_app(
            holder, settings.serve.max_age_ms, gate=self._gate, admin=not settings.admin_port,
            access_log=settings.access_log,
        )  # fmt: skip
        apps = [web, create_admin_app(holder, self._gate, web.turns)] if settings.admin_port else [web]
        self._servers = [Server(web, settings.http) for web in apps]
        return web

    def serve(self) -> list[asyncio.Task[None]]:
        """Begin to answer."""
        scheme = "https" if self._settings.http.tls_cert else "http"
        log.info("serving on %s://%s", scheme, _address(self._sockets[0]))
        for admin in self._sockets[1:]:
            log.info("metrics and documentation on %s://%s", scheme, _address(admin))
        pairs = zip(self._servers, self._sockets, strict=True)
        return [asyncio.create_task(server.serve([listening])) for server, listening in pairs]

    def end(self) -> None:
        """Answer what has been asked, and no more."""
        for server in self._servers:
            server.should_exit = True


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
