"""The line replay.continue: an hour of the live topics recorded, replayed, and on with what is live."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from tests.figures.common import Bench, FigureError, Row, at_least, equal, headrace, program, say, started

DIRECT = ("--direct", "--deterministic")
EVENT_S, SPEED = 4_500, 60  # seconds of event time, played so many times as fast
HOUR_S = 3_600  # of them: the first hour is recorded, the rest is live
SETTLED_S = 60  # after the play: there the replays end
SETTINGS = """
[topics]
partitions = 4
[join]
ticks = "log"
[simulator]
requests_per_s = 1.5
"""
_EXAMPLES = r"""
import json, sys
from online_model.examples import ExamplesDigest
from replay.oracle import read_topic
from streams.blocks import decode_block
digest = ExamplesDigest()
for _, _, value, _ in read_topic(sys.argv[1], "examples"):
    digest.add(decode_block(value).examples)
print(json.dumps({"rows": digest.rows, "digest": digest.hexdigest()}))
"""
_COUNT = r"""
import json, sys
from replay.recording import Recording
found = Recording(sys.argv[1])
topics = found.about.topics
print(json.dumps({"records": sum(1 for t in topics for p in range(len(found.begin(t))) for _ in found.records(t, p))}))
"""
SAME = ("examples_digest", "checkpoint_digest", "balance")


def goes_on(bench: Bench) -> list[Row]:
    """An hour recorded, then replayed and on with the live topics, gives what one replay of the whole gives"""
    folder = bench.empty("continue")
    (folder / "headrace.toml").write_text(SETTINGS)
    say(f"continue: {EVENT_S:,} s of simulated users")
    headrace(folder, "simulate", "--seconds", EVENT_S, "--out", "log.jsonl.gz")
    try:
        server = headrace(folder, "broker", "start")["bootstrap"]
        headrace(folder, "topics", "create")
        with started(folder, "join", says="joining partitions"):
            hour, through, until = _while_it_is_played(folder)
            say("continue: the undisturbed replay")
            everything = headrace(folder, "record", "--out", "whole", "--from-beginning", "--to-end")
            whole = headrace(folder, "replay", "recording", "whole", *DIRECT, "--until", until)
            live = program(_EXAMPLES, server)
    finally:
        headrace(folder, "broker", "stop")
    rows = [equal(f"{key}, replayed with --continue", through[key], whole[key]) for key in SAME]
    rows.append(equal("examples of the live joiner", live["digest"], whole["examples_digest"]))
    for what, found in (("with --continue", through), ("undisturbed", whole)):
        seen = f"{found['lost']}, {found['duplicated']}, {found['trained_examples']:,} of {found['examples']:,}"
        good = found["lost"] == found["duplicated"] == 0 and found["trained_examples"] == found["examples"] > 0
        rows.append(Row(f"{what}: lost, duplicated, trained of examples", seen, "0, 0, all", good))
    rows += [
        at_least("records of the hour, in the recording", hour, 1_000),
        at_least("records that the replay took from the live topics", through["live_records"], 1_000),
        equal("records in all", hour + through["live_records"], everything["records"] + everything["items"]),
    ]
    return rows


def _while_it_is_played(folder: Path) -> tuple[int, dict[str, Any], int]:
    """(records in the recording of the first hour, the replay that goes on, where it ended in ms)."""
    begun = time.time()
    with started(folder, "replay", "events", "log.jsonl.gz", "--speed", SPEED, "--no-wait") as player:
        say("continue: the recorder, killed -9 on its way and started again")
        with started(folder, "record", "--out", "hour", "--from-beginning", "--file-seconds", 2) as recorder:
            time.sleep(max(0.0, begun + HOUR_S / SPEED / 2 - time.time()))  # half of the hour
            recorder.kill()
        headrace(folder, "record", "--out", "hour", "--seconds", max(1.0, begun + HOUR_S / SPEED - time.time()))
        found = program(_COUNT, folder / "hour")
        until = int((begun + EVENT_S / SPEED + SETTLED_S) * 1000)
        say("continue: the replay, while the rest is played")
        through = headrace(folder, "replay", "recording", "hour", *DIRECT, "--continue", "--until", until)
        try:
            if player.wait(SETTLED_S) != 0:
                raise FigureError("the play failed: see replay.stderr")
        except subprocess.TimeoutExpired:
            raise FigureError("the play did not end: use a quieter machine") from None
    return found["records"], through, until
