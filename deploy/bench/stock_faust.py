"""Faust as it comes: an app with its own settings, its own JSON codec, its own consumer."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Callable
from typing import Any


def run_stock_faust(bootstrap: str, name: str, add: Callable[[Any], object]) -> None:
    """A worker in this process, of a group of its own, from the beginning of its topics, until the process ends.

    add: gives the app its agents.
    """
    import faust

    async def main() -> None:
        app = faust.App(
            f"{name}-{uuid.uuid4().hex}", broker=f"kafka://{bootstrap}", value_serializer="json", web_enabled=False,
            topic_disable_leader=True, topic_allow_declare=False, datadir=tempfile.mkdtemp(), stream_wait_empty=False,
            consumer_auto_offset_reset="earliest", loop=asyncio.get_running_loop(),
        )  # fmt: skip
        add(app)
        await app.start()
        await asyncio.Event().wait()

    asyncio.run(main())
