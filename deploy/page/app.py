"""The live page over HTTP on 127.0.0.1: static files, plotly.js from the installed package, server-sent events.

`LivePage` runs its own event loop in a thread, so that the demo publishes samples from wherever it likes. Each event of
`/samples` is a JSON array of samples; its id is the number of the newest one, so a browser that reconnects asks for
what it missed and for nothing twice. Whoever looks at the page can be a user too (`visits.py`), where the system is one
that takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from deploy.page.history import History
from deploy.page.visit_routes import visit_routes
from deploy.page.visits import Visited, Visits
from embedding_store.errors import HeadraceError, UsageError
from online_model.serving.access import ADMIN, Gate, Guard

HOST = "127.0.0.1"
KEEP_ALIVE_S = 15.0
STATIC = Path(__file__).parent / "static"
PLOTLY = Path(str(files("plotly"))) / "package_data" / "plotly.min.js"
# Plotly writes its own style sheet into the page and draws with inline styles; nothing else is inline.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:"
)

# Of all routes: access.py refuses what is not here. The page is of this machine, where no token is asked for.
SCOPES = dict.fromkeys(("/", "/plotly.js", "/samples", "/samples.json", "/static", "/visit"), ADMIN)
VISIT_SCOPES = dict.fromkeys(("/visit/recommend", "/visit/act"), ADMIN)  # where somebody may be visited


class Feed:
    """The history and the news that it has grown; the streams of all open pages hang on it."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.ended = False
        self.run = secrets.token_hex(4)  # a page left open from an earlier run on this port must start afresh
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Tell all streams to look again. Only on the page's event loop."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def end(self) -> None:
        """The run is over: streams say so and finish. Only on the page's event loop."""
        self.ended = True
        self.wake()

    async def stream(self, last_event_id: str) -> AsyncIterator[bytes]:
        """Server-sent events until the run ends: `all` (every sample so far) unless the browser has seen some of this
        very run, then plain messages with what is new."""
        run, _, number = last_event_id.partition("-")
        last = int(number) if run == self.run and number.isdecimal() else 0
        while True:
            news = self._news  # taken before looking, or a sample in between would wait for the next
            ended = self.ended
            newest, samples = self.history.after(last)
            if samples:
                kind = b"" if last else b"event: all\n"
                yield b"%sid: %s-%d\ndata: [%s]\n\n" % (kind, self.run.encode(), newest, b",".join(samples))
                last = newest
            elif ended:
                yield b"event: end\ndata: {}\n\n"
                return
            else:
                try:
                    await asyncio.wait_for(news.wait(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield b": still here\n\n"


class LivePage:
    """The page of one run. `port` 0 takes any free one; `start`, `publish` and `stop` may be called from any thread."""

    def __init__(self, port: int = 0, visited: Visited | None = None) -> None:
        """`visited`: the system that the page's visitors may be users of; None: they only look."""
        self._port, self._visited = port, visited
        self._visits: Visits | None = None
        self.url = ""  # once it is started
        self._history = History()
        self._started = threading.Event()
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._feed: Feed | None = None

    def start(self) -> str:
        """Serve, and return the page's address. Raises UsageError if the port is taken."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, self._port))
        except OSError as error:
            listener.close()
            raise UsageError(
                f"the live page cannot use port {self._port} ({error.strerror}); choose another --port, or 0 for any"
            ) from None
        listener.listen(128)
        self._thread = threading.Thread(target=self._run, args=(listener,), name="live-page", daemon=True)
        self._thread.start()
        if not self._started.wait(10):
            raise HeadraceError("the live page did not start within 10 s; run with --no-page to do without it")
        self.url = f"http://{HOST}:{listener.getsockname()[1]}/"
        return self.url

    def publish(self, sample: Mapping[str, Any]) -> None:
        """Add one sample (a JSON-like dict; numpy numbers are fine, nan becomes null) and show it in all open pages."""
        self._history.add(orjson.dumps(sample, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))
        if self._feed is not None:
            self._call(self._feed.wake)

    def close_visits(self, why: str) -> None:
        """Visitors only look from now on, and are told why."""
        if self._visits is not None:
            self._visits.closed = why

    def stop(self) -> None:
        """Tell the open pages that the run is over, and end. Does nothing if it is not running."""
        thread, self._thread = self._thread, None
        if thread is None or self._server is None or self._feed is None:
            return
        self._call(self._feed.end)
        self._server.should_exit = True
        thread.join(10)

    def __enter__(self) -> LivePage:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _call(self, function: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function)

    def _run(self, listener: socket.socket) -> None:
        asyncio.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._visited is not None:
                self._visits = await stack.enter_async_context(Visits(self._visited))
            await self._serve_until_stopped(listener)

    async def _serve_until_stopped(self, listener: socket.socket) -> None:
        self._loop, self._feed = asyncio.get_running_loop(), Feed(self._history)
        config = uvicorn.Config(
            make_app(self._feed, self._visits), log_config=None, log_level="warning", access_log=False,
            lifespan="off", timeout_graceful_shutdown=2, server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._started.set()
        await self._server.serve(sockets=[listener])


def make_app(feed: Feed, visits: Visits | None = None) -> Guard:
    """The page's HTTP app over `feed`; `visits`: the system whose user one may be."""
    index = (STATIC / "index.html").read_text("utf-8")

    fresh = {"Cache-Control": "no-store"}

    async def page(_: Request) -> Response:
        return Response(index, media_type="text/html", headers=fresh | {"Content-Security-Policy": POLICY})

    async def plotly(_: Request) -> Response:
        return FileResponse(PLOTLY, media_type="text/javascript")

    async def samples(request: Request) -> Response:
        stream = feed.stream(request.headers.get("last-event-id", ""))
        return StreamingResponse(stream, media_type="text/event-stream", headers=fresh)

    async def all_samples(_: Request) -> Response:
        _newest, kept = feed.history.after(0)
        return Response(b"[%s]" % b",".join(kept), media_type="application/json", headers=fresh)

    routes = [
        Route("/", page),
        Route("/plotly.js", plotly),
        Route("/samples", samples),
        Route("/samples.json", all_samples),
        *visit_routes(visits),
    ]
    app = Starlette(routes=routes)
    app.mount("/static", StaticFiles(directory=STATIC))
    # Another site must not read the page, nor do anything here, through a visitor's browser.
    scopes = SCOPES | (VISIT_SCOPES if visits is not None else {})
    return Guard(app, scopes, Gate(), lambda denial: Response(denial.reason, denial.status))
