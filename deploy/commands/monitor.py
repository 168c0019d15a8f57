"""headrace monitor: a running system, on the live page and in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from deploy.commands.common import (
    BootstrapOption,
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    connected,
    settings_for,
)
from embedding_store.errors import UsageError
from embedding_store.secret import Secret, read_secret

if TYPE_CHECKING:
    from deploy.monitor import MonitorOptions
    from deploy.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace monitor --replica http://127.0.0.1:8080 --scrape http://127.0.0.1:9101")(
        monitor
    )


def monitor(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    replica: Annotated[
        str | None, typer.Option(metavar="URL", help="The replica. [that of [serve] on this machine]")
    ] = None,
    scrape: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A process whose /metrics is shown; can be repeated.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the live page; 0: any free one.")] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The token that the replica and --scrape ask for. [HEADRACE_HTTP_TOKEN]"),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Write into `events`: probes for freshness, the page's users.")
    ] = True,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of /metrics, freshness by stage; 0: none.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="How long; 0: until Ctrl-C.")] = 0.0,
    json: JsonOption = False,
) -> None:
    """The live page of a running system.

    Freshness, throughput, quality, versions and Kafka's offsets, as seen from outside, and the panel to be a user.
    What is away is named, and shown again when it is back. Ctrl-C ends it; what it watches goes on. With --no-probe
    nothing is written: there is no freshness then, and no panel.
    """
    settings = settings_for(config, data_dir=data_dir, bootstrap=bootstrap)
    replica = _address("--replica", replica or f"http://127.0.0.1:{settings.serve.port}")
    scrape = [_metrics(_address("--scrape", url)) for url in scrape or []]
    settings = connected(settings)
    token = read_secret(token_file, "--token-file") if token_file else settings.http.token
    options = _options(settings, replica, scrape, probe, token)
    with Output(json) as out:
        out.result(_watch(settings, options, port, metrics_port, seconds))


def _options(
    settings: Settings, replica: str, scrape: list[str], probe: bool, token: Secret | None
) -> MonitorOptions:
    from deploy.monitor import MonitorOptions

    return MonitorOptions(
        replica, settings.connection, settings.topics, probe, live=settings.join.ticks == "live",
        scrape=tuple(scrape), token=token,
    )  # fmt: skip


def _address(option: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"{option} {url}: write it as http://127.0.0.1:8080")
    return url.rstrip("/")


def _metrics(url: str) -> str:
    return url if urlsplit(url).path else f"{url}/metrics"


def _watch(settings: Settings, options: MonitorOptions, port: int, metrics_port: int, seconds: float) -> dict[str, Any]:
    """Until it is stopped. Returns the last sample."""
    import asyncio
    import contextlib
    import logging
    import signal

    from prometheus_client import CollectorRegistry

    from deploy.monitor import Monitor
    from deploy.page import LivePage, Visited
    from deploy.summary import Summary
    from deploy.watching import Board
    from streams.listener import serve_metrics
    from streams.metrics import tell_process

    for name in ("aiokafka", "kafka"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters of it is among the problems
    registry, boards = CollectorRegistry(), list[Board]()
    watching = Monitor(options, boards, registry)
    visited = Visited(
        options.replica, options.bootstrap, options.topics, settings.join.join.watch_wait_ms, when=watching.stages.when,
        token=options.token,
    )
    page = LivePage(port, visited=visited if options.probe and options.live else None)

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        if seconds:
            loop.call_later(seconds, stop.set)
        async with watching:
            await watching.run(stop)

    tell_process(registry, settings.data_dir)
    with contextlib.ExitStack() as stack:
        stack.callback(serve_metrics(registry, metrics_port, http=settings.http))
        boards += [stack.enter_context(page), stack.enter_context(Summary(page.url))]
        asyncio.run(run())
    return watching.last
