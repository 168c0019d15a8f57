"""The twin that never learns: the same users, the same seed, the same replica code, with the model as it begins.

It runs in a process of its own that leaves the processor to the system that is being shown: it is in step with the wall
clock where there is time for it. When the shop has closed it catches up, and is as everybody else is: somebody waits
for it, on a machine that may have much else to do. It says each second of its world on stdout:
{"second": 3, "shown": 1110, "clicked": 64}. SIGTERM ends it; so does the end of its stdin, from which it is told when
the shop opens and that it has closed. Its one argument is the JSON of `TwinSettings`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import orjson
import torch

from deploy.demo.clicks import CLICKS_COME_S, ClickRate
from deploy.demo.twin import TwinSettings
from embedding_store.columns import TableRows
from embedding_store.delta import Version
from embedding_store.ids import feature_id
from embedding_store.initial import first_weights
from online_model.features import CARD, CATEGORY, ITEM, ITEM_EXTRAS, SELLER, TITLE_WORDS, table_specs, words_of
from online_model.ranker import Ranker
from online_model.serving.api import Context, RecommendRequest
from online_model.serving.replica import Replica
from replay.simulator import Marketplace
from streams.events import Click, Item, encode

STEP_MS = 50
RESTS = 3.0  # times the processor time that it took: a quarter of a core at most. Not every kernel heeds niceness


class Frozen:
    """A replica with the first weights and a catalogue that is kept up to date."""

    def __init__(self, settings: TwinSettings) -> None:
        (self._items,) = (spec.settings for spec in table_specs(settings.features) if spec.name == ITEM)
        self._sequence = 0
        self.replica = Replica(settings.replica, settings.features, settings.ranker)
        self._dense = Ranker(settings.features.dim, settings.ranker).weights()

    def catalogue(self, items: Sequence[Item]) -> None:
        """New and changed items, with rows as they are before anything is learned."""
        newest = {feature_id(ITEM, item.item): item for item in items}
        ids = np.array(sorted(newest), np.int64)
        columns = {name: np.zeros((len(ids), *shape), dtype) for name, (dtype, shape) in ITEM_EXTRAS.items()}
        columns["weights"] = first_weights(self._items, ids)
        columns["created"][:] = [newest[i].created or 0 for i in ids.tolist()]
        columns["category"][:] = [feature_id(CATEGORY, newest[i].category or "") for i in ids.tolist()]
        columns["seller"][:] = [feature_id(SELLER, newest[i].seller or "") for i in ids.tolist()]
        columns["words"][:] = [words_of(newest[i].title, TITLE_WORDS) for i in ids.tolist()]
        version = Version(
            epoch=1, sequence=self._sequence, base=(1, self._sequence - 1) if self._sequence else None,
            created_ms=0, positions={}, info={}, dense=self._dense, tables={ITEM: TableRows(ids, columns)},
            blobs={CARD: {i: encode(item) for i, item in newest.items()}},
        )  # fmt: skip
        self.replica.apply(version)
        self._sequence += 1


def life(settings: TwinSettings, start_ms: int, closed: threading.Event) -> Iterator[None]:
    """The twin's life from `start_ms` on, a step at a time and without end; sparingly until the shop has closed."""
    world, frozen, clicks = Marketplace(settings.simulator), Frozen(settings), ClickRate()
    seconds: dict[str, int] = {}  # request → the second it was shown in
    world.start(start_ms)
    frozen.catalogue(world.catalogue())
    now, said, worked = start_ms, 0, time.process_time()
    while True:
        before, worked = worked, time.process_time()
        closed.wait(RESTS * (worked - before))
        now += STEP_MS
        ahead = now / 1000 - time.time()
        if ahead > 0:
            time.sleep(ahead)  # in step with the world that learns
        step = world.advance(now)
        if step.items:
            frozen.catalogue(step.items)
        for event in step.events:
            if isinstance(event, Click):
                clicks.add(seconds[str(event.request_id)], clicked=1)
        for request in step.requests:
            answer = frozen.replica.recommend(
                RecommendRequest(request.user, request.scenario, Context(request.query or ""), request.k)
            )
            second = (request.ts - start_ms) // 1000
            seconds[request.request_id] = second
            clicks.add(second, shown=len(answer.items))
            world.show(request, [shown.item for shown in answer.items], ts=request.ts)
        while said < (now - start_ms) // 1000 - CLICKS_COME_S:
            say = {"second": said, "shown": clicks.shown[said], "clicked": clicks.clicked[said]}
            sys.stdout.buffer.write(orjson.dumps(say) + b"\n")
            sys.stdout.buffer.flush()
            said += 1
        while seconds and next(iter(seconds.values())) < said:  # nobody clicks these any more
            del seconds[next(iter(seconds))]
        yield


def _live(life: Iterator[None], closed: threading.Event) -> None:
    """Stepped back until the shop has closed, then no more. A thread's niceness has no way back: hence two of them."""

    def sparingly() -> None:
        os.nice(19)  # of this thread
        while not closed.is_set():
            next(life)

    _weigh_session(19)
    with ThreadPoolExecutor(1) as stepped_back:
        stepped_back.submit(sparingly).result()
    _weigh_session(0)
    for _ in life:
        pass


def _weigh_session(nice: int) -> None:
    """Where the kernel shares by session, niceness within one counts for nothing."""
    group = Path("/proc/self/autogroup")
    if group.exists():
        with contextlib.suppress(OSError):
            group.write_text(f"{nice}")


def _listen(closed: threading.Event) -> None:
    """The shop has closed with the next line; all is over at the end."""
    for _ in sys.stdin:
        closed.set()
    os._exit(0)


def _main() -> None:
    torch.set_num_threads(1)
    opened = sys.stdin.readline()
    if not opened:
        return  # nobody is left who would open a shop
    closed = threading.Event()
    threading.Thread(target=_listen, args=(closed,), daemon=True).start()
    _live(life(msgspec.json.decode(sys.argv[1], type=TwinSettings), int(opened), closed), closed)


if __name__ == "__main__":
    _main()
