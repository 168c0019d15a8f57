"""The torture finds nothing in what is sound, and each of six planted bugs."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deploy.commands.torture import _holds
from deploy.torture import WRONG
from deploy.torture.faults import ON_DISK, Kind, plan
from deploy.torture.run import Torture
from deploy.torture.story import Story
from deploy.torture.verdict import Outcome
from deploy.torture.watch import KEPT, Watch, _Kept
from replay.oracle import Verdict
from tests.streams.children import wait_for

pytestmark = pytest.mark.broker
FOUND_BY = {
    "one_early": "duplicated", "one_late": "lost", "acknowledged_early": "missing_versions",
    "no_tombstones": "differing_rows", "half_a_version": "replica_torn_reads",
    "unread_checksums": "undetected_damage",
}  # fmt: skip


def test_what_is_done_follows_from_the_seed() -> None:
    workers = ["join-0", "train"]
    assert plan(20, 3, workers) == plan(20, 3, workers) != plan(20, 4, workers)
    everybody = ["join-0", "train", "serve-0"]
    assert {fault.kind for fault in plan(50, 1, everybody)} >= set(ON_DISK), "50 kills meet all that a disk may do"
    assert {fault.target for fault in plan(50, 1, ["serve-0"]) if fault.kind in ON_DISK} == {"serve-0"}
    first, again, other = (list(Story(seed, 3_000, 250, 90_000).steps()) for seed in (1, 1, 2))
    assert first == again != other
    assert isinstance(first[-1], int), "a last tick closes everything"


def test_nothing_is_lost_doubled_or_torn_and_the_checkpoint_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    found = Torture(kills=3, seed=11, home=tmp_path / "torture", say=print, events=8_000, on_disk=(), ranks=2).run()
    assert {name: found[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert found["digest_equal"], found
    assert found["calm"] == {"lost": 0, "duplicated": 0}
    assert (found["kills"], found["faults"]["lose_rank"]) == (3, 1)
    assert found["answers"] > 100
    assert found["versions_checked"] > 3
    assert found["answers_compared"] > found["versions_checked"]
    assert found["left_out"] == 0


def test_rows_that_the_worker_should_have_learned_are_lost_though_the_verdict_learns_them() -> None:
    verdict = Verdict(2, 0, 5_000, {}, [])
    assert [Outcome("", verdict, {}, rest, 64, 0).lost for rest in (0, 63, 64, 900)] == [2, 2, 66, 902]


def test_of_the_answers_of_a_version_the_first_and_the_last_are_kept() -> None:
    kept = _Kept()
    for number in range(100):
        kept.add({"number": number})
    assert [answer["number"] for answer in kept] == [*range(KEPT), *range(100 - KEPT, 100)]


def test_a_run_in_which_nobody_was_answered_proves_nothing() -> None:
    good = dict.fromkeys(WRONG, 0) | {
        "digest_equal": True, "calm": {"lost": 0, "duplicated": 0}, "answers": 9, "versions_checked": 2,
    }  # fmt: skip
    assert _holds(good)
    for name, value in {"answers": 0, "versions_checked": 0, "digest_equal": False, "lost": 1}.items():
        assert not _holds(good | {name: value}), name


class Failing(BaseHTTPRequestHandler):
    """A replica that has a fault, and now and then is busy."""

    statuses: ClassVar[Iterator[int]] = itertools.cycle((500, 503, 429))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(next(self.statuses))
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_an_answer_that_is_a_fault_is_a_wrong_one() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        watch = Watch([server.server_port])
        watch.start()
        wait_for(lambda: watch.failed.total() >= 2)
        watch.stop()
        server.shutdown()
    assert set(watch.failed) == {"with status 500"}
    assert not watch.asked


@pytest.mark.nightly
def test_a_disk_that_damages_a_file_of_each_kind_and_is_slow_and_full_changes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "torture"
    found = Torture(kills=1, seed=3, home=home, say=print, events=8_000, on_disk=list(ON_DISK)).run()
    assert {name: found[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert found["digest_equal"], found
    assert found["damages"]["refused"] >= 1, "the checkpoint at least"
    done = {kind for kind in ON_DISK if found["faults"][kind]}
    assert done >= {"damage_store", "damage_checkpoint", "damage_snapshot", "slow_disk"}, found["faults"]
    assert not (home / "hurt" / "data").is_mount()
    assert (home / "hurt" / "data" / "train" / "CURRENT").exists(), "what there was is still there, to be looked at"


@pytest.mark.nightly
@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path) -> None:
    found = _with(bug, tmp_path)
    assert found[FOUND_BY[bug]] > 0, found
    assert {name for name in WRONG if found[name]} <= {FOUND_BY[bug], "differing_rows", "replica_torn_reads"}, found


def _with(bug: str, folder: Path) -> dict[str, Any]:
    """A short run with the bug in all workers, of which the trainer is killed."""
    on_disk: list[Kind] = ["damage_checkpoint"] if bug == "unread_checksums" else []
    launcher = (sys.executable, "-m", "tests.deploy.planted", bug)
    kills = 3 if bug in ("one_early", "one_late", "acknowledged_early") else 0
    return Torture(
        kills, 5, folder / "torture", print, launcher, events=12_000, calm=False, workers=("train",), gap_s=(0.2, 2.0),
        patient=True, on_disk=on_disk,
    ).run()  # fmt: skip
