"""doctor --bundle: what is promised is in the archive, and of secrets planted everywhere nothing is."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import shutil
import stat
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import bundle as module
from deploy.bundle import write_bundle
from deploy.check import Check
from deploy.cli import run
from deploy.settings import load
from embedding_store.errors import UsageError
from embedding_store.kept import KeptCheckpoints
from online_model.checkpoints import describe
from streams.join_store import JoinStore
from streams.joiner import JoinSettings
from streams.topics import TopicSettings
from tests.online_model.test_trainer_commits import learn, log, opened

HUSH = "Xq7-tellnobody"
USER = "user-in-a-row-1234"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with stores, a kept checkpoint, and logs."""
    data = tmp_path_factory.mktemp("source") / "data"
    trainer = opened(data / "train")
    learn(trainer, log()[:1], 0)
    trainer.commit()
    KeptCheckpoints(str(data / "checkpoints")).keep(trainer.store, describe, keep=1)
    trainer.store.close()
    JoinStore(data / "join" / "0", JoinSettings()).close()
    (data / "join" / "0" / "999999.log").write_text(f"a row of {USER}")  # as RocksDB's own: no log
    (data / "demo").mkdir()
    (data / "demo" / "train.log").write_text(
        f"begun\n{'x' * 80}\npassword={HUSH}\nAuthorization: Bearer {HUSH}\nkafka://u:{HUSH}@host failed\n"
        f"the token file says t0ken-of-file\nenvironment says planted-in-env\n"
    )
    return data


@pytest.fixture
def home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the working directory is elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in [name for name in os.environ if name.startswith("HEADRACE_") and name != "HEADRACE_CACHE"]:
        monkeypatch.delenv(name)
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture
def metrics() -> Iterator[int]:
    """The port of a worker that answers at /metrics, with a secret."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'headrace_join_offset{{partition="0",token="{HUSH}"}} 7\n'.encode())

        def log_message(self, *arguments: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def members(file: Path) -> dict[str, str]:
    with tarfile.open(file) as archive:
        return {
            entry.name.removeprefix("headrace-bundle/"): archive.extractfile(entry).read().decode()  # type: ignore[union-attr]
            for entry in archive
        }


def bundled(home: Path, file: Path, environment: dict[str, str] | None = None, **more: object) -> dict[str, str]:
    settings = load(None, environment or {}, {"data_dir": str(home)})
    checks = [Check("planted", False, f"token={HUSH}", "see https://a:" + HUSH + "@host")]
    write_bundle(file, settings, checks, environment or {}, **more)  # type: ignore[arg-type]
    return members(file)


def test_of_secrets_planted_everywhere_none_is_in_it(home: Path, tmp_path: Path, metrics: int) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("t0ken-of-file 2030-01-01 score\n")
    outside = tmp_path / "worker.err"
    outside.write_text(f"-----BEGIN PRIVATE KEY-----\n{HUSH}\n-----END PRIVATE KEY-----\n")
    environment = {
        "HEADRACE_JOIN_METRICS_PORT": str(metrics),
        "HEADRACE_JOIN_SNAPSHOTS": f"s3://me:{HUSH}@bucket/joins",
        "AWS_SECRET_ACCESS_KEY": "planted-in-env",
    }
    settings = load(None, environment, {"data_dir": str(home)})
    checks = [Check("planted", False, f"token={HUSH}", f"see https://a:{HUSH}@host")]
    environment |= {"HEADRACE_KAFKA_PASSWORD": HUSH + "-2", "HEADRACE_HTTP_TOKEN_FILE": str(tokens)}
    file = tmp_path / "b.tar.gz"
    told = write_bundle(file, settings, checks, environment, [outside])
    found = members(file)
    for name, text in found.items():
        for secret in (HUSH, "t0ken-of-file", "planted-in-env", USER):
            assert secret not in text, f"{secret} is in {name}"
    raw = gzip.decompress(file.read_bytes())
    assert HUSH.encode() not in raw
    assert "headrace_join_offset" in found["metrics/join.txt"]
    assert "begun" in found["logs/demo/train.log"]
    assert "HEADRACE_KAFKA_PASSWORD=***" in found["environment.txt"]
    assert "a private key" in found["logs/worker.err"]
    assert set(told["members"]) | {"CONTENTS.txt"} == set(found)


def test_stores_and_checkpoints_are_in_it_by_their_heads_alone(home: Path, tmp_path: Path) -> None:
    found = bundled(home, tmp_path / "b.tar.gz")
    stores = json.loads(found["stores.json"])
    assert stores["train"]["version"] == "1.1"
    assert stores["train"]["positions"]["0"]["rows"] > 0
    assert stores["train"]["bytes"] > 1_000
    assert stores["join/0"]["next_offset"] is None
    (kept,) = json.loads(found["checkpoints.json"])
    assert kept["version"] == "1.1"
    assert not [name for name in found if name.endswith(("999999.log", "LOG"))]
    assert "data_dir" in found["settings.toml"]
    assert "msgspec==" in found["packages.txt"]
    assert "nothing answers" in found["CONTENTS.txt"], "what is missing is said"


def test_it_is_for_its_owner_alone_and_takes_no_file_s_place(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.tar.gz"
    bundled(home, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    link = tmp_path / "link.tar.gz"
    link.symlink_to(tmp_path / "nowhere")
    for place in (file, link):
        with pytest.raises(UsageError, match="exists already"):
            bundled(home, place)
    assert file.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UsageError, match="no such file"):
        bundled(home, tmp_path / "c.tar.gz", logs=[tmp_path / "no.log"])
    assert not (tmp_path / "c.tar.gz").exists()


def test_it_stays_small_and_says_what_it_left_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (home / "demo" / f"{number}.log").write_text("".join(f"line {n} of {number}\n" for n in range(40_000)))
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    found = bundled(home, tmp_path / "b.tar.gz")
    assert sum(map(len, found.values())) < (1 << 20) + 10_000
    assert "the bundle has 1 MB already" in found["CONTENTS.txt"]
    kept = [text for name, text in found.items() if name.startswith("logs/demo/") and len(text) > 1_000]
    assert kept
    for text in kept:
        assert text.startswith("line ")
        assert text.endswith("\n"), "ends are kept, from the beginning of a line"
        assert "line 39999 of" in text


def test_the_topics_are_in_it(home: Path, tmp_path: Path, broker: str, topics: TopicSettings) -> None:
    environment = {"HEADRACE_BOOTSTRAP": broker, "HEADRACE_TOPICS_PREFIX": topics.prefix}
    told = json.loads(bundled(home, tmp_path / "b.tar.gz", environment)["kafka.json"])
    events = told["topics"][topics.events]
    assert events["configs"]["message.timestamp.type"] == "LogAppendTime"
    assert (events["partitions"], events["ends"]["0"], events["newest_ms"]) == (1, 0, None)


def test_the_command_says_what_is_in_it(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("deploy.doctor._probed", list)
    code = run(["doctor", "--data-dir", str(home), "--bundle", "b.tar.gz", "--json"])
    out, err = capfd.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert code == (0 if result["ok"] else 1)
    assert result["bundle"]["bytes"] == Path("b.tar.gz").stat().st_size
    assert "stores.json" in result["bundle"]["members"]
    assert "values that are called password, token, key or the like are left out" in err
    assert "look through them before you send it" in err
    assert run(["doctor", "--bundle", "b.tar.gz"]) == 2
    assert "b.tar.gz exists already" in capfd.readouterr().err
    assert run(["doctor", "--log", "x"]) == 2
