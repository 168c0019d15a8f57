"""Figures of the backfill: Spark and the stream make the same examples; a trainer goes on with the stream after it."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.figures.common import Bench, FigureError, Line, Row, at_least, equal, headrace, program, public, say, started

LOGS = {
    "taobao": "taobao-userbehavior/by_user_100k.csv.gz",
    "onlineretail": "online-retail/online_retail.csv.gz",
}
EVENTS, RATE = 5_000_000, 1_000  # simulated, so many a second of event time
PLAYED, PLAYED_S, SPEED = 60_000, 1_200, 10  # events of the hand-over, in less than so many seconds of event time
PAUSED_AT = 5_000  # records: a third of them
SETTLED_S = 180
SETTINGS = """
[topics]
partitions = 4
[join]
ticks = "log"
[train]
device = "cpu"
[simulator]
requests_per_s = 10
"""
_SENT = r"""
import sys, time
from streams.topics import end_offsets
server, wanted, end = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
while sum(end_offsets(server, "events").values()) < wanted:
    if time.monotonic() > end:
        sys.exit("not so much was played in time")
    time.sleep(0.2)
print("{}")
"""
_DIRECT = r"""
import json, sys
from online_model.examples import ExamplesDigest
from replay.joining import JoinedLog
from replay.readers import in_time_order, open_log
from streams.joiner import JoinSettings
log = open_log(sys.argv[1], sys.argv[2])
joined, digest = JoinedLog(JoinSettings(implicit=not log.has_impressions), 4), ExamplesDigest()
for _, blocks in joined.slices(in_time_order(log)):
    for block in blocks:
        digest.add(block.examples)
for block in joined.close():
    digest.add(block.examples)
print(json.dumps({"rows": digest.rows, "digest": digest.hexdigest()}))
"""
_LEARNED = r"""
import json, sys, time
from embedding_store.delta import Assembler
from online_model.examples import Counts
from replay.oracle import Rules, compare, expect, read_topic
from streams.joiner import JoinSettings
from streams.topics import end_offsets
server, end = sys.argv[1], time.monotonic() + float(sys.argv[2])
ends = end_offsets(server, "events")
while time.monotonic() < end:
    assembler, newest = Assembler(), None
    for _, _, value, _ in read_topic(server, "parameters"):
        newest = assembler.add(value) or newest
    if newest is not None and {int(p): at for p, at in newest.positions.items()} == ends:
        break
    time.sleep(1.0)
else:
    sys.exit("not all was learned in time")
about = newest.info["partitions"]
verdict = compare(expect(read_topic(server, "events"), Rules.of(JoinSettings())),
                  {int(p): (at["rows"], at["sum"]) for p, at in about.items()})
print(json.dumps({"lost": verdict.lost, "duplicated": verdict.duplicated, "rows": verdict.expected_rows,
                  "trained": sum(at["rows"] for at in about.values()), "oracle": verdict.balance,
                  "balance": {name: sum(at["counts"][name] for at in about.values()) for name in verdict.balance}}))
"""


def _equal(bench: Bench, name: str, path: Path, format_: str) -> list[Row]:
    """The digests of a log by both engines, and by the joiners of a replay."""
    folder = bench.empty(f"backfill-{name}")
    say(f"{name}: joined as the stream does")
    direct = program(_DIRECT, format_, path)
    rows = []
    for engine in ("spark", "local"):
        say(f"{name}: backfill --engine {engine}")
        found = headrace(folder, "backfill", path, "--format", format_, "--engine", engine, "--out", engine)
        rows.append(equal(f"{name}, examples by {engine}", found["examples_digest"], direct["digest"]))
        rows.append(
            Row(f"{name}, examples, seconds of {engine}", f"{found['examples']:,}, {found['seconds']}", "", True)
        )
    return rows


def public_logs(bench: Bench) -> list[Row]:
    """Spark and the stream make the same examples of Taobao and of Online Retail"""
    return [row for name, path in LOGS.items() for row in _equal(bench, name, public(path), name)]


def simulated(bench: Bench) -> list[Row]:
    """Spark and the stream make the same examples of five million simulated events"""
    return _simulated(bench, EVENTS)


def small(bench: Bench) -> list[Row]:
    """Spark and the stream make the same examples of 200,000 simulated events"""
    return _simulated(bench, 200_000)


def _simulated(bench: Bench, events: int) -> list[Row]:
    folder = bench.empty("simulated")
    headrace(folder, "simulate", "--seconds", events // RATE, "--events", events, "--out", "log.jsonl.gz")
    return _equal(bench, f"{events:,} simulated", folder / "log.jsonl.gz", "events")


def handover(bench: Bench) -> list[Row]:
    """What is played while it is recorded and backfilled is learned once, the trainer killed in both parts"""
    folder = bench.empty("handover")
    (folder / "headrace.toml").write_text(SETTINGS)
    headrace(folder, "simulate", "--seconds", PLAYED_S, "--events", PLAYED, "--out", "log.jsonl.gz")
    try:
        server = headrace(folder, "broker", "start")["bootstrap"]
        headrace(folder, "topics", "create")
        with started(folder, "replay", "events", "log.jsonl.gz", "--speed", SPEED, "--no-wait") as player:
            program(_SENT, server, PAUSED_AT, PLAYED_S / SPEED + SETTLED_S)
            player.send_signal(signal.SIGUSR1)  # it pauses: Spark may take longer than the rest would
            headrace(folder, "record", "--out", "recording", "--from-beginning", "--to-end")
            made = headrace(folder, "backfill", "recording", "--engine", "spark", "--out", "backfill")
            found = _learned(folder, server, player)
    finally:
        headrace(folder, "broker", "stop")
    seen = f"{found['lost']}, {found['duplicated']}, {found['trained']:,} of {found['rows']:,}"
    good = found["lost"] == found["duplicated"] == 0 and found["trained"] == found["rows"]
    return [
        Row("lost, duplicated, trained of examples", seen, "0, 0, all", good),
        equal("balance", found["balance"], found["oracle"]),
        at_least("examples of the backfill", made["examples"], 1_000),
        at_least("examples after it", found["rows"] - made["examples"], 1_000),
    ]


def _learned(folder: Path, server: str, player: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The verdict of the oracle, when all is learned by workers that begin with the backfill."""
    with started(folder, "train", "--backfill", "backfill", says="learning the backfill") as train:
        train.kill()
    with started(folder, "join", "--backfill", "backfill", says="joining partitions"):
        with started(folder, "train", "--backfill", "backfill", says="training on partitions") as train:
            train.kill()
        with started(folder, "train", "--backfill", "backfill", says="training on partitions"):
            player.send_signal(signal.SIGUSR2)
            try:
                if player.wait(PLAYED_S / SPEED + SETTLED_S) != 0:
                    raise FigureError("the play failed: see replay.stderr")
            except subprocess.TimeoutExpired:
                raise FigureError("the play did not end: use a quieter machine") from None
            return program(_LEARNED, server, SETTLED_S)


LINES: dict[str, Line] = {"logs": public_logs, "small": small, "simulated": simulated, "handover": handover}
