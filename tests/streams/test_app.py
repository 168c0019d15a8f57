"""The end of a worker: it comes, whatever the worker waits for."""

from __future__ import annotations

import signal
import subprocess
import sys

HANGS = """
import asyncio
from streams import app

async def main(stop):
    print("up", flush=True)
    await stop.wait()
    await asyncio.Event().wait()  # as a producer whose Kafka is away

app.STOP_SECONDS = 0.2
app.run(main)
"""


def test_a_worker_that_waits_for_what_does_not_come_ends_all_the_same() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip().splitlines()[-1].endswith("What was committed is kept; start it again")
