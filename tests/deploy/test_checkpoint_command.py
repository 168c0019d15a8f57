"""headrace checkpoint as users meet it: JSON, exit codes, one line for what is wrong, files for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from deploy.cli import run
from embedding_store.kept import KeptCheckpoints
from online_model.checkpoints import describe
from tests.deploy.test_cli import headrace
from tests.online_model.test_trainer import SMALL
from tests.online_model.test_trainer_commits import learn, log, opened


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with a store of six commits; the second and the fourth are kept."""
    monkeypatch.chdir(tmp_path)
    kept, trainer = KeptCheckpoints(str(tmp_path / "data" / "checkpoints")), opened(tmp_path / "data" / "train")
    for number, block in enumerate(log()[:6]):
        learn(trainer, [block], number)
        trainer.commit()
        if number in (1, 3):
            kept.keep(trainer.store, describe, keep=3)
    trainer.store.close()
    return tmp_path / "data"


def checkpoint(
    capfd: pytest.CaptureFixture[str], home: Path, *arguments: str, code: int = 0
) -> tuple[dict, list[str]]:
    """(the JSON of a command, its lines on stderr)"""
    capfd.readouterr()
    assert run(["checkpoint", *arguments, "--data-dir", str(home), "--json"]) == code
    out, err = capfd.readouterr()
    return json.loads(out.splitlines()[-1]) if out else {}, err.splitlines()


def beside(home: Path, *arguments: str) -> dict:
    """The JSON of a command in a process of its own: a store is not in use for the process that has it."""
    done = headrace("checkpoint", *arguments, "--data-dir", str(home), "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_list_says_what_there_is_and_is_there_while_a_worker_runs(capfd, home):
    trainer = opened(home / "train")
    digest, rows = trainer.digest(), describe(trainer.store)["rows"]
    running = beside(home, "list")
    trainer.store.close()
    told, _ = checkpoint(capfd, home, "list")
    assert (told["ok"], told["digest"]) == (True, digest)
    assert [(v["where"], v["version"]) for v in told["versions"]] == [
        ("store", "1.6"), ("kept", "1.4"), ("kept", "1.2"),
    ]  # fmt: skip
    assert told["versions"][0]["rows"] == rows
    for version in told["versions"]:
        assert version["bytes"] > 10_000
        assert version["event_time_ms"] > 1_700_000_000_000
        assert len(version["settings"]) == 16
    assert (running["versions"][0]["in_use"], running["versions"][0]["version"]) == (True, "1.6")
    assert running["digest"] == told["versions"][1]["digest"], "of the store nothing was read: the newest kept one's"
    assert run(["checkpoint", "list", "--data-dir", str(home)]) == 0
    assert "1.6" in capfd.readouterr().out


def test_verify_names_the_file_that_is_damaged(capfd, home):
    told, _ = checkpoint(capfd, home, "verify")
    assert (told["ok"], [v["ok"] for v in told["versions"]]) == (True, [True] * 3)
    damaged = next((home / "checkpoints" / "1000000000002").glob("*.sst"))
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.unlink()  # not in place: other versions may have it too
    damaged.write_bytes(bytes(raw))
    told, lines = checkpoint(capfd, home, "verify", code=1)
    assert (told["ok"], [v["ok"] for v in told["versions"]]) == (False, [True, True, False])
    assert [str(damaged) in line for line in lines] == [True]
    assert checkpoint(capfd, home, "verify", "--version", "1.4")[0]["ok"]
    checkpoint(capfd, home, "verify", "--version", "1.2", code=1)
    table = max((home / "train").glob("*.sst"), key=lambda path: path.stat().st_size)
    raw = bytearray(table.read_bytes())
    raw[len(raw) // 2] ^= 1
    table.unlink()
    table.write_bytes(bytes(raw))
    told, lines = checkpoint(capfd, home, "verify", code=1)
    assert (told["ok"], [v["ok"] for v in told["versions"]]) == (False, [False, True, False])
    assert str(table) in lines[0]


def test_keep_keeps_what_is_there_now_of_a_stopped_worker(capfd, home):
    trainer = opened(home / "train")
    refused = headrace("checkpoint", "keep", "--data-dir", str(home), cwd=home)
    assert (refused.returncode, "stop that worker" in refused.stderr) == (1, True)
    trainer.store.close()
    told, _ = checkpoint(capfd, home, "keep")
    again, _ = checkpoint(capfd, home, "keep")
    listed, _ = checkpoint(capfd, home, "list")
    assert (told["versions"][0]["version"], again["digest"]) == ("1.6", told["digest"])
    assert [(v["where"], v["version"]) for v in listed["versions"]] == [
        ("store", "1.6"), ("kept", "1.6"), ("kept", "1.4"), ("kept", "1.2"),
    ]  # fmt: skip
    assert listed["versions"][1]["digest"] == listed["digest"] == told["digest"]
    assert checkpoint(capfd, home, "verify", "--version", "1.6")[0]["ok"]


def test_export_is_read_without_headrace(capfd, home, tmp_path):
    trainer = opened(home / "train")
    rows = {table: next(trainer.store.iter_rows(table)) for table in ("item", "user")}
    cards = dict(trainer.store.iter_blobs("card"))
    weights = trainer._ranker.weights()
    trainer.store.close()
    told, _ = checkpoint(capfd, home, "export", "--out", str(tmp_path / "out"))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["digest"] == told["digest"]
    for table, expected in rows.items():
        (name,) = about["tables"][table]
        numbers = load_file(tmp_path / "out" / f"{name}.safetensors")
        columns = pq.read_table(tmp_path / "out" / f"{name}.parquet")
        assert columns["id"].to_pylist() == expected.ids.tolist()
        np.testing.assert_array_equal(numbers["weights"], expected.columns["weights"])
        np.testing.assert_array_equal(numbers["momentum"], expected.columns["momentum"])
        if table == "item":
            assert columns["clicks"].to_pylist() == expected.columns["clicks"].tolist()
        else:
            assert columns["history"].to_pylist() == [bytes(h) for h in expected.columns["history"]]
    written = pq.read_table(tmp_path / "out" / "card.parquet").to_pydict()
    assert dict(zip(written["id"], written["value"], strict=True)) == cards
    dense = load_file(tmp_path / "out" / "dense.safetensors")
    for name, array in weights.items():
        np.testing.assert_array_equal(dense[name], array)
    assert checkpoint(capfd, home, "export", "--out", str(tmp_path / "out"), code=2)[1] == [
        f"headrace: {tmp_path / 'out'} exists already: name a new directory with --out"
    ]
    kept, _ = checkpoint(capfd, home, "export", "--out", str(tmp_path / "older"), "--version", "1.2")
    assert kept["versions"][0]["version"] == "1.2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "older", "out"], "nothing is left over"


def test_rollback_goes_to_a_kept_version_of_a_stopped_worker(capfd, home):
    trainer = opened(home / "train")
    refused = headrace("checkpoint", "rollback", "--data-dir", str(home), cwd=home)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "is in use by another process: stop that worker" in line
    assert [v["where"] for v in beside(home, "verify")["versions"]] == ["kept", "kept"]
    trainer.store.close()
    before, _ = checkpoint(capfd, home, "list")
    told, _ = checkpoint(capfd, home, "rollback", "--version", "1.2")
    assert (told["versions"], told["ok"], told["set_aside_rows"]) == (["2.7"], True, 400)
    after, _ = checkpoint(capfd, home, "list")
    assert after["versions"][0]["version"] == "2.7"
    assert after["digest"] == told["digest"]
    assert after["versions"][0]["rows"] == before["versions"][2]["rows"]
    trainer = opened(home / "train", SMALL)
    assert (trainer.positions[0].rows, trainer.positions[0].accounted[0]) == (200, 600)
    trainer.store.close()


def test_what_is_not_there_is_said_in_one_line(capfd, home, tmp_path):
    for code, arguments in (
        (1, ["list"]), (1, ["verify"]), (1, ["rollback"]), (1, ["keep"]), (1, ["export", "--out", "x"]),
        (1, ["rollback", "--version", "3.3"]), (2, ["rollback", "--version", "three"]),
    ):  # fmt: skip
        _, lines = checkpoint(capfd, tmp_path / "nowhere", *arguments, code=code)
        assert len(lines) == 1, lines
        assert lines[0].startswith("headrace: ")
