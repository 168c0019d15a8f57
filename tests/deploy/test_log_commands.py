"""headrace log and headrace init as users meet them: what they print, their JSON, their files, one line for errors."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import run
from deploy.settings import load
from embedding_store.errors import UsageError
from replay.readers import in_time_order, open_log
from streams.events import Item
from tests.deploy.test_cli import environment
from tests.public_logs import DATA, KUAIRAND, TAOBAO_BY_USER

KEYS = {"rows", "rejected", "kinds", "from", "to", "ordered", "duplicates"}  # of every command, as documented
BY_USER = "1,10,3,pv,1511600005\n1,11,3,buy,1511600009\n2,10,3,pv,1511600001\n2,10,3,cart,1511600002\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)


def write(name: str, text: str = BY_USER) -> str:
    Path(name).write_text(text)
    return name


def public(name: str) -> str:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not in {DATA}: set HEADRACE_DATA to the folder of the public logs")
    return str(DATA / name)


def result_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    code = run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    (line,) = out.splitlines()
    return json.loads(line)


def refused(capfd: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line of a command that must fail with that code."""
    assert run(arguments) == code
    out, err = capfd.readouterr()
    assert err.startswith("headrace: ")
    assert err.count("\n") == 1
    assert out == ""
    return err


# --- log inspect, log validate


def test_inspect_finds_the_format_and_says_what_is_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    log = write("log.csv", 3 * BY_USER + "2,10,3,pv,never\n")
    found = result_of(capfd, "log", "inspect", log)
    assert found.keys() >= KEYS
    assert found["format"] == "taobao"
    assert (found["rows"], found["rejected"], found["reasons"]) == (13, 1, {"time": 1})
    assert found["kinds"] == {"click": 6, "purchase": 3, "cart": 3}
    assert (found["from"], found["to"], found["ordered"]) == (1_511_600_001_000, 1_511_600_009_000, False)
    assert (found["users"], found["items"], found["duplicates"]) == (2, 2, 0)
    assert run(["log", "inspect", log, "--format", "taobao"]) == 0
    said = capfd.readouterr().out
    assert "13, 1 of them wrong (without an event: 1 time)" in said
    assert "2017-11-25 08:53:21 UTC to 2017-11-25 08:53:29 UTC" in said


def test_a_public_log_is_valid(capfd: pytest.CaptureFixture[str]) -> None:
    found = result_of(capfd, "log", "validate", public(KUAIRAND))
    assert (found["format"], found["rows"], found["rejected"], found["ok"]) == ("kuairand", 41_828, 0, True)


def test_validate_fails_when_too_many_rows_are_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    few = write("few.csv", BY_USER * 10 + "1,2,3,pv,never\n")
    assert "1 of 41 rows are wrong (1 time), 2.44 % where 1 % may be" in refused(capfd, 1, "log", "validate", few)
    assert result_of(capfd, "log", "validate", few, "--max-rejected-share", "0.03")["ok"] is True
    many = write("many.csv", BY_USER * 50 + "1,2,3,pv,never\n" * 3 + BY_USER)
    assert "the first is line 201, time" in refused(capfd, 1, "log", "validate", many)
    write("headrace.toml", "[log]\nmax_rejected_share = 0.5\n")
    assert result_of(capfd, "log", "validate", many)["ok"] is True
    assert run(["log", "validate", many, "--max-rejected-share", "0.001", "--json"]) == 1
    failed = json.loads(capfd.readouterr().out)
    assert failed.keys() >= KEYS
    assert failed["ok"] is False


@pytest.mark.parametrize(
    "command", [["log", "inspect"], ["log", "validate"], ["log", "sort", "--out", "x.jsonl"], ["init"]]
)
def test_a_file_that_is_no_log_is_one_line(capfd: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert "nowhere.csv: No such file" in refused(capfd, 1, *command, "nowhere.csv")
    assert "empty.csv: the file is empty" in refused(capfd, 1, *command, write("empty.csv", ""))
    assert "no format fits" in refused(capfd, 1, *command, write("prose.txt", "It was a dark\nand stormy night\n"))
    assert "not a file" in refused(capfd, 1, *command, ".")
    assert "no reader is named 'klingon'" in refused(capfd, 2, *command, write("log.csv"), "--format", "klingon")
    assert sorted(path.name for path in Path().iterdir()) == ["empty.csv", "log.csv", "prose.txt"]


# --- log sort


@pytest.mark.parametrize("out", ["sorted.jsonl", "sorted.jsonl.gz"])
def test_a_sorted_log_is_one_of_events_with_the_same_records(capfd: pytest.CaptureFixture[str], out: str) -> None:
    log = write("log.csv")
    found = result_of(capfd, "log", "sort", log, "--out", out)
    assert found.keys() >= KEYS
    assert (found["rows"], found["ordered"], found["out"]) == (4, True, out)
    again = result_of(capfd, "log", "inspect", out)
    assert (again["format"], again["ordered"], again["rejected"]) == ("events", True, 0)
    assert {key: again[key] for key in ("kinds", "from", "to", "users")} == {
        key: found[key] for key in ("kinds", "from", "to", "users")
    }
    assert list(open_log("events", out)) == list(in_time_order(open_log("taobao", log)))
    assert sorted(path.name for path in Path().iterdir()) == ["log.csv", out]
    raw = Path(out).read_bytes()
    assert len((gzip.decompress(raw) if out.endswith(".gz") else raw).splitlines()) == 6


def test_a_public_log_is_sorted_whole(capfd: pytest.CaptureFixture[str]) -> None:
    log = public(KUAIRAND)
    found = result_of(capfd, "log", "sort", log, "--out", "sorted.jsonl")
    assert found["kinds"] == {"impression": 41_828, "click": 27_484, "watch": 41_828}
    times = [record.ts for record in open_log("events", "sorted.jsonl") if not isinstance(record, Item)]
    assert len(times) == 111_140
    assert times == sorted(times)


def test_what_cannot_be_sorted_leaves_no_file(capfd: pytest.CaptureFixture[str]) -> None:
    log = write("log.csv", BY_USER * 50 + "1,2,3,pv,never\n" * 3)
    before = Path("kept.jsonl")
    before.write_text("of an earlier run\n")
    refused(capfd, 1, "log", "sort", log, "--format", "taobao", "--out", "kept.jsonl")
    assert before.read_text() == "of an earlier run\n"
    assert "name a file that ends in .jsonl" in refused(capfd, 2, "log", "sort", log, "--out", "x.csv")
    assert "is the log itself" in refused(capfd, 2, "log", "sort", "kept.jsonl", "--out", "./kept.jsonl")
    assert "No such file" in refused(capfd, 1, "log", "sort", write("log.csv"), "--out", "no/folder/x.jsonl")
    assert sorted(path.name for path in Path().iterdir()) == ["kept.jsonl", "log.csv"]


def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    log = Path("log.csv")
    with log.open("w") as file:
        file.writelines(f"{n % 99},{n % 99},3,pv,{1_511_600_000 - n % 1000}\n" for n in range(300_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "log", "sort", str(log), "--out", "x.jsonl"], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not Path(".x.jsonl.partial").exists():  # it reads and sorts, then writes
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "headrace: stopped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


# --- init


def test_init_writes_settings_that_load_and_fit(capfd: pytest.CaptureFixture[str]) -> None:
    log = public(TAOBAO_BY_USER)
    found = result_of(capfd, "init", log)
    assert found.keys() >= KEYS
    assert found["out"] == "headrace.toml"
    settings = load()
    settings.check()
    assert (settings.log.format, settings.log.path) == ("taobao", log)
    assert settings.join.join.implicit is True
    assert settings.join.ticks == "log"
    assert settings.model.features.items >= 2 * 64_467
    text = Path("headrace.toml").read_text()
    assert "# 64,467 items in the log, room for twice as many" in text
    values = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    assert sum("  # " in line for line in values) >= len(values) - 1, "each value but the path has its reason"


@pytest.mark.parametrize(
    ("name", "format_", "rows", "implicit"),
    [
        pytest.param(KUAIRAND, "kuairand", 41_828, False, marks=pytest.mark.nightly),
        pytest.param("ml-100k/ml-100k.inter.gz", "movielens", 100_000, False, marks=pytest.mark.nightly),
        ("open-bandit/random_men.csv.gz", "openbandit", 10_000, False),
        pytest.param("ga-merch-store/all_sessions.csv.gz", "gamerch", 15_134, False, marks=pytest.mark.nightly),
        ("yoochoose/yoochoose-clicks-100k_train_full.tsv.gz", "yoochoose", 70_278, True),
        pytest.param("amazon-grocery/train.csv.gz", "generic", 121_892, True, marks=pytest.mark.nightly),
    ],
)
def test_init_fits_every_public_format(
    capfd: pytest.CaptureFixture[str], name: str, format_: str, rows: int, implicit: bool
) -> None:
    found = result_of(capfd, "init", public(name))
    assert (found["format"], found["rows"]) == (format_, rows)
    settings = load()
    settings.check()
    assert (settings.log.format, settings.join.join.implicit) == (format_, implicit)
    for table in ("users", "items", "categories"):
        assert getattr(settings.model.features, table) >= 2 * found[table]
    start, end = found["from"], found["to"]
    since = str(end - (end - start) * min(rows, 10_000) // rows)
    trained = result_of(capfd, "replay", "--direct", "--deterministic", "--from", since)
    assert trained["trained_examples"] == trained["examples"] > 100
    assert (trained["lost"], trained["duplicated"]) == (0, 0)


def test_init_fits_the_head_of_a_long_log(capfd: pytest.CaptureFixture[str]) -> None:
    with gzip.open(public("online-retail/online_retail.csv.gz"), "rt", encoding="utf-8", errors="replace") as file:
        write("log.csv", "".join(line for line, _ in zip(file, range(5_001), strict=False)))
    assert result_of(capfd, "init", "log.csv")["format"] == "onlineretail"
    assert load().join.join.implicit is True


def test_init_does_not_write_over_a_file_unless_told(capfd: pytest.CaptureFixture[str]) -> None:
    log = write("log.csv")
    write("headrace.toml", "# mine, and not even TOML [\n")
    assert "headrace.toml is there already: write over it with --force" in refused(capfd, 2, "init", log)
    assert Path("headrace.toml").read_text() == "# mine, and not even TOML [\n"
    assert run(["init", log, "--force"]) == 0
    assert load().log.path == log
    capfd.readouterr()
    assert "choose a place that can be written" in refused(capfd, 2, "init", log, "--out", "no/folder/x.toml")


def test_init_for_another_folder_names_the_whole_path(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("other").mkdir()
    result_of(capfd, "init", write("log.csv"), "--out", "other/headrace.toml", "--max-rejected-share", "0.25")
    settings = load(Path("other/headrace.toml"))
    assert settings.log.path == str(tmp_path / "log.csv")
    assert settings.log.max_rejected_share == 0.25


def test_init_guesses_the_columns_of_an_unknown_table(capfd: pytest.CaptureFixture[str]) -> None:
    rows = "".join(
        f"u{n % 7};i{n % 5};{'view' if n % 3 else 'checkout'};2024-05-01T10:00:{n:02};x\n" for n in range(60)
    )
    log = write("shop.csv", "customer_id;product_id;action;date;weather\n" + rows)
    assert run(["init", log]) == 0
    said = capfd.readouterr().err
    assert "taken as generic: user is customer_id, item is product_id, time is date, kind is action" in said
    assert "'checkout' is purchase" in said
    columns = load().log.columns
    assert (columns.user, columns.time_unit, columns.kinds) == (
        "customer_id", "iso", {"checkout": "purchase", "view": "click"},
    )  # fmt: skip
    found = result_of(capfd, "log", "inspect", log)
    assert found["format"] == "generic"
    assert found["kinds"] == {"click": 40, "purchase": 20}


def test_init_refuses_a_log_without_anything_to_learn_from(capfd: pytest.CaptureFixture[str]) -> None:
    log = write("log.csv", "".join(f"{n},10,3,buy,1511600005\n" for n in range(50)))
    assert "it has no impression and no click" in refused(capfd, 1, "init", log)
    assert not Path("headrace.toml").exists()


@pytest.mark.nightly
def test_the_settings_that_init_writes_train_at_once(tmp_path: Path) -> None:
    rows = "".join(f"{n % 40},{n * n % 60},{n % 4},pv,{1_511_600_000 + n}\n" for n in range(2_000))
    write("log.csv", rows)
    for arguments in (["init", "log.csv"], ["replay", "--direct", "--deterministic", "--json"]):
        ran = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *arguments], env=environment(), capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    trained = json.loads(ran.stdout.splitlines()[-1])
    assert trained["events_in"] == trained["trained_examples"] == 2_000
    assert (trained["lost"], trained["duplicated"]) == (0, 0)


def test_settings_with_a_section_log_keep_the_log_of_the_demo_apart() -> None:
    write("headrace.toml", '[log]\nformat = "taobao"\npath = "a"\n[demo]\nlog = "kuairand"\npath = "b"\n')
    settings = load()
    assert (settings.log.format, settings.demo.log, settings.demo.path) == ("taobao", "kuairand", "b")
    write("headrace.toml", '[log.columns]\ntime_unit = "weeks"\n')
    with pytest.raises(UsageError, match=r"log.columns.time_unit = 'weeks': expected s or ms or us or ns or iso$"):
        _ = load().log


@pytest.mark.parametrize(
    "command",
    [
        ["replay", "taobao", "none", "--direct"], ["compare", "taobao", "none"], ["estimate", "taobao", "none"],
        ["backfill", "none", "--format", "taobao", "--out", "x"], ["compare", "recording", "none"],
    ],
)  # fmt: skip
def test_a_format_that_is_named_leaves_aside_the_columns_that_init_wrote_for_another_log(
    capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    columns = '[log.columns]\nuser = "u"\nitem = "i"\ntime = "t"\n'
    write("headrace.toml", f'[log]\nformat = "generic"\npath = "clicks.csv"\n{columns}')
    assert "none" in refused(capfd, 1, *command)  # it looked for the file, and did not refuse the settings
    assert load(None, {}, {"log.format": "generic", "log.path": "none"}).log.columns.user == "u"
    write("headrace.toml", f'[log]\nformat = "taobao"\npath = "none"\n{columns}')
    assert "a log of format taobao has its own columns" in refused(capfd, 2, "compare")  # these contradict each other


def test_help_has_an_example_and_imports_nothing_slow() -> None:
    program = (
        "import sys; from deploy.cli import run\n"
        "for command in ('log inspect', 'log validate', 'log sort', 'init'):\n"
        "    print('##', command, run([*command.split(), '--help']))\n"
        "print(*(m for m in ('torch', 'numpy', 'pyarrow', 'fsspec') if m in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    *helps, imported = ran.stdout.split("##")
    assert len(helps) == 4
    assert all("Example: headrace" in text for text in helps)
    assert imported.split() == ["init", "0"]
