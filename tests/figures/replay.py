"""Figures of the replay: determinism, kills, the way through Kafka, readers, memory, the simulator, `headrace init`."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.figures.common import (
    Bench,
    FigureError,
    Line,
    Row,
    at_least,
    at_most,
    command,
    environment,
    equal,
    headrace,
    program,
    public,
    say,
    started,
)
from tests.figures.pace import max_speed
from tests.figures.time_travel import goes_on

TAOBAO_BY_USER = "taobao-userbehavior/by_user_100k.csv.gz"
TAOBAO_BY_TIME = "taobao-userbehavior/time_ordered_96k.csv.gz"
KUAIRAND = "kuairand/kuairand27k_explicit_feedback_kcore15.tsv.gz"
BANDIT, BANDIT_RANDOM = "open-bandit/bts_men.csv.gz", "open-bandit/random_men.csv.gz"
INIT = (
    TAOBAO_BY_USER, TAOBAO_BY_TIME, KUAIRAND, "ml-100k/ml-100k.inter.gz",
    "yoochoose/yoochoose-clicks-100k_train_full.tsv.gz", BANDIT, "online-retail/online_retail.csv.gz",
    "ga-merch-store/all_sessions.csv.gz",
)  # fmt: skip
REPLAYED = {"taobao": TAOBAO_BY_USER, "kuairand": KUAIRAND}
DIRECT = ("--direct", "--deterministic")
KILLS = 10
ATTEMPTS = 60  # replays that are begun or resumed to be killed
SEED = 4
FAULTS = ("--duplicates", "0.05", "--shuffle-ms", "250", "--fault-seed", "3")


def _replay(bench: Bench, name: str, *options: object) -> dict[str, Any]:
    """The figures of an undisturbed deterministic replay of a public log, and its `wall_s`."""
    path, start = public(REPLAYED[name]), time.monotonic()
    say(f"{name}: a replay {' '.join(map(str, options))}".rstrip())
    found = headrace(bench.empty(name), "replay", name, path, *DIRECT, *options)
    return found | {"wall_s": time.monotonic() - start}


def _whole(bench: Bench, name: str) -> dict[str, Any]:
    return bench.once(("whole", name), lambda: _replay(bench, name))


def digests(bench: Bench) -> list[Row]:
    """Two deterministic replays give one digest, another seed another one"""
    rows = []
    for name in REPLAYED:
        one, two, other = _whole(bench, name), _replay(bench, name), _replay(bench, name, "--seed", 1)
        digest = one["checkpoint_digest"]
        rows += [
            Row(f"{name}, checkpoint of the second run", two["checkpoint_digest"], digest,
                two["checkpoint_digest"] == digest),
            equal(f"{name}, examples of the second run", two["examples_digest"], one["examples_digest"]),
            Row(f"{name}, checkpoint with another seed", other["checkpoint_digest"], f"not {digest}",
                other["checkpoint_digest"] != digest),
            equal(f"{name}, examples with another seed", other["examples_digest"], one["examples_digest"]),
            _accounts(name, one),
        ]  # fmt: skip
    return rows


def kills(bench: Bench) -> list[Row]:
    """Killed at ten random moments and resumed, a replay ends with the digest of one that was never interrupted"""
    return [row for name in REPLAYED for row in _kills(bench, name)]


def _kills(bench: Bench, name: str) -> list[Row]:
    """Replays with kill -9, until ten have hit. A replay that ends before its kill is a result, and another begins."""
    whole, dice = _whole(bench, name), random.Random(SEED)
    folder, moments, ends, pace = bench.empty(f"{name}-killed"), [], [], whole
    for _ in range(ATTEMPTS):
        loading = pace["wall_s"] - pace["seconds"]  # imports, and the log put in order: nothing is at stake yet
        seconds = loading + dice.uniform(0, pace["seconds"]) if len(moments) < KILLS else None
        about, start = folder / ".headrace" / "replay" / "replay.json", time.monotonic()
        found = _until_killed(folder, name, about.exists(), seconds)
        if found is None:
            moments.append(seconds)
            say(f"{name}: kill {len(moments)} of {KILLS}, after {seconds:.1f} s")
            continue
        ends.append(found)
        say(f"{name}: came to its end, resumed at slice {found['resumed_at']} of {found['slices']}")
        if seconds is None:
            break
        if not found["resumed_at"]:  # the machine is faster, or slower, than it was
            pace = found | {"wall_s": time.monotonic() - start}
        folder = bench.empty(f"{name}-killed")
    else:
        raise FigureError(f"{name}: {len(moments)} of {KILLS} kills hit in {ATTEMPTS} attempts: use a quieter machine")
    resumed = ", ".join(f"{end['resumed_at']} of {end['slices']}" for end in ends)
    rows = [
        Row(f"{name}, kills that hit", str(len(moments)), str(KILLS), len(moments) == KILLS),
        Row(f"{name}, slices kept over the kills, of each run that ended", resumed, "one above 0",
            any(end["resumed_at"] > 0 for end in ends)),
    ]  # fmt: skip
    for end in ends:
        rows += [equal(f"{name}, {key} after kills", end[key], whole[key])
                 for key in ("checkpoint_digest", "examples_digest")]  # fmt: skip
        rows.append(_accounts(f"{name} after kills", end))
    return rows


def _until_killed(folder: Path, name: str, resume: bool, seconds: float | None) -> dict[str, Any] | None:
    """The figures of a replay that ends within `seconds`; None if it was killed then."""
    words = command("replay", name, public(REPLAYED[name]), *DIRECT, "--json", *(["--resume"] if resume else []))
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            if process.returncode == -signal.SIGKILL:
                return None  # else it had ended by itself just before
        finally:
            process.kill()
    if process.returncode != 0:
        raise FigureError(f"{name}: exit {process.returncode}: {err[-500:]}")
    return json.loads(out.splitlines()[-1])


def _accounts(what: str, found: dict[str, Any]) -> Row:
    """Lost 0, duplicated 0, and as many learned as there are."""
    seen = f"{found['lost']}, {found['duplicated']}, {found['trained_examples']:,} of {found['examples']:,}"
    whole = found["trained_examples"] == found["examples"] > 0
    return Row(f"{what}: lost, duplicated, trained of examples", seen, "0, 0, all",
               whole and found["lost"] == found["duplicated"] == 0)  # fmt: skip


def kafka(bench: Bench) -> list[Row]:
    """Through Kafka at x50, with 5 % duplicates and shuffling, the examples are those of the direct mode"""
    made = bench.empty("simulated") / "log.jsonl.gz"
    headrace(made.parent, "simulate", "--seconds", 600, "--events", 40_000, "--out", made)
    rows = []
    for what, path in (("taobao by time", public(TAOBAO_BY_TIME)), ("simulated, times in ms", made)):
        say(f"{what}: the direct mode")
        folder = bench.empty("kafka")
        headrace(folder, "init", path)
        direct = headrace(folder, "replay", *DIRECT)
        say(f"{what}: through Kafka")
        with _workers(folder):
            through = headrace(folder, "replay", "--speed", 50, *FAULTS)
        late = through["balance"]["late"]
        rows += [
            equal(f"{what}, examples_digest through Kafka", through["examples_digest"], direct["examples_digest"]),
            _accounts(f"{what}, through Kafka", through),
            at_least(f"{what}, events sent twice", through["faults"]["duplicates"], 100),
            # In events, where an impression sent twice counts as its items.
            at_least(f"{what}, duplicates that the joiner found", through["balance"]["duplicates"],
                     through["faults"]["duplicates"]),
            equal(f"{what}, events too late", late, direct["balance"]["late"]),
        ]  # fmt: skip
        shuffled = through["faults"]["shuffled"]
        if path == made:
            rows.append(at_least(f"{what}, events shuffled", shuffled, 100))
        else:
            rows.append(Row(f"{what}, events shuffled", str(shuffled), "any: its clock ticks in seconds", True))
    return rows


@contextlib.contextmanager
def _workers(folder: Path) -> Iterator[None]:
    """An embedded broker, a joiner and a trainer on the data dir and the settings in `folder`."""
    try:
        headrace(folder, "broker", "start")
        headrace(folder, "topics", "create")
        with (
            started(folder, "join", says="joining partitions"),
            started(folder, "train", says="training on partitions"),
        ):
            yield
    finally:
        headrace(folder, "broker", "stop")


def readers(bench: Bench) -> list[Row]:
    """Every reader on its file: rows in = rows out + rejected by reason"""
    rows = []
    for place in (*INIT, BANDIT_RANDOM):
        say(f"{place}: read")
        found, lines = program(_READ, public(place)), _rows_of(public(place))
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found["rejected"].items()) or "none"
        out = found["good"] + sum(found["rejected"].values())
        seen = f"{found['rows']:,} in, {found['good']:,} out, rejected: {reasons}; wrong: {found['wrong']:,}"
        rows.append(Row(f"{found['format']}, {place}", seen, f"in = out + rejected = {lines:,} rows of the file",
                        found["rows"] == out == lines))  # fmt: skip
    return rows


_READ = """
import json, sys
from replay.readers import detect, open_log
log = open_log(detect(sys.argv[1]), sys.argv[1])
for _ in log:
    pass
counts = {key: getattr(log, key) for key in ("rows", "good", "rejected", "wrong")}
print(json.dumps({"format": log.name} | counts))
"""


def _rows_of(path: Path) -> int:
    """The rows below the header, if there is one, counted by other code than the readers'."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if {".tsv", ".inter"} & set(path.suffixes) else ",")
        header = not next(rows)[0].isdigit()
        return sum(1 for _ in rows) + (not header)


_MEMORY = r"""
import json, re, sys
from pathlib import Path
from replay.readers import in_time_order, open_log
def most():  # ru_maxrss would begin with what the process that started this one has
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
def read(path, hold):
    log = open_log("taobao", path)
    for _ in in_time_order(log, hold):
        pass
    return log.rows
read(sys.argv[1], 1_000)
start = most()
print(json.dumps({"rows": read(sys.argv[2], int(sys.argv[3])), "grown_mb": most() - start}))
"""
WINDOW = 20_000  # records that the sort holds; a row of these logs is an item and an event
FLAT_MB = 4.0  # more for ten times the rows


def memory(bench: Bench) -> list[Row]:
    """Sorted input is streamed in flat memory, and what is not sorted takes a bounded window"""
    folder, rows = bench.empty("memory"), []
    small = _table(folder / "small.csv", 2_000, shuffled=False)
    for what, shuffled in (("in order, streamed", False), ("out of order, sorted on disk", True)):
        grown = {}
        for count in (100_000, 1_000_000):
            say(f"memory: {count:,} rows {what}")
            path = _table(folder / "log.csv", count, shuffled)
            found = program(_MEMORY, small, path, WINDOW)
            if found["rows"] != count:
                raise FigureError(f"{found['rows']:,} rows were read of {count:,}")
            grown[count] = found["grown_mb"]
            path.unlink()
        window = f"window of {WINDOW:,} records"
        rows.append(Row(f"peak RSS for 100,000 rows {what}, {window}", f"{grown[100_000]:.1f} MB", "the window", True))
        rows.append(at_most(f"the same for 1,000,000 rows (seen: {grown[1_000_000]:.1f} MB), more by",
                            grown[1_000_000] - grown[100_000], FLAT_MB, " MB"))  # fmt: skip
    return rows


def _table(path: Path, rows: int, shuffled: bool) -> Path:
    dice = random.Random(SEED)
    with path.open("w") as file:
        file.writelines(
            f"{n % 997},{n % 499},7,pv,{1_511_600_000 + (dice.randrange(10**6) if shuffled else n)}\n"
            for n in range(rows)
        )
    return path


def likeness(bench: Bench) -> list[Row]:
    """A world fitted to one half of a log against the other half"""
    rows = []
    for what, name, place in (
        ("kuairand", "kuairand", KUAIRAND), ("bts", "openbandit", BANDIT), ("random", "openbandit", BANDIT_RANDOM)
    ):  # fmt: skip
        for split in ("time", "alternate"):
            say(f"{what}: the simulator, split by {split}")
            folder = bench.empty(what)
            found = headrace(folder, "simulate", "--like", name, public(place), "--check", split)
            rows += _likeness(f"{what}, {split}", what, found)
    return rows


def _likeness(where: str, what: str, found: dict[str, Any]) -> list[Row]:
    held, low, high = (100 * x for x in (found["held_out_click_rate"], *found["click_rate_interval"]))
    if what == "kuairand":
        rate = 100 * found["click_rate"]
        rows = [Row(f"{where}: click rate", f"{rate:.2f} %", f"{held:.2f} % within 5 %", abs(rate / held - 1) <= 0.05)]
        rows.append(at_most(f"{where}: KS of watch time", found["watch_ks"], 0.1))
        rows.append(at_most(f"{where}: KS of its share of the duration", found["watch_share_ks"], 0.1))
    else:
        rate = 100 * found["true_ctr"]
        short = f"the half it was fitted to has {100 * found['fitted_click_rate']:.2f} %"
        rows = [Row(f"{where}: click rate, few clicks", f"{rate:.2f} %", f"in {low:.2f} to {high:.2f} %",
                    low <= rate <= high, short if where == "bts, time" else "")]  # fmt: skip
    parts, chance = found["ceiling"]["parts"], found["ceiling"]["chance"]
    beside = f"ceiling: real halves {parts:.2f}, dealt at random {chance:.2f}"
    # What no fit can reach is known to fall short; where the real halves do reach it, the world has to.
    rank = at_least(f"{where}: rank correlation ({beside})", found["rank_correlation"], 0.9,
                    short=f"the real halves reach {parts:.2f} themselves" if parts < 0.9 else "")  # fmt: skip
    return [*rows, rank]


def init(bench: Bench) -> list[Row]:
    """`headrace init` writes settings with which the whole log is learned at once"""
    rows = []
    for place in INIT:
        say(f"{place}: init and replay")
        folder = bench.empty("init")
        found = headrace(folder, "init", public(place))
        rows.append(_accounts(f"{found['format']}, {place}", headrace(folder, "replay", *DIRECT)))
    return rows


LINES: dict[str, Line] = {
    line.__name__: line for line in (digests, kills, kafka, max_speed, readers, memory, likeness, init)
} | {"continue": goes_on}
