"""The whole pipeline against a Kafka with TLS and users, everything signed; and commands that are not let in."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest
import trustme

from deploy.broker import Broker
from embedding_store.signing import SEAL
from streams.kafka_clients import client_arguments
from tests.end_to_end.demos import TAOBAO, demo, headrace
from tests.end_to_end.test_demo import comes_out, trained
from tests.streams.children import read_all

pytestmark = [pytest.mark.broker, pytest.mark.nightly, pytest.mark.timeout(600)]


def test_join_train_and_serve_behind_tls_and_a_password_with_signed_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 64)
    monkeypatch.setenv("HEADRACE_SIGNING_KEY_FILE", str(keys))
    with Broker.start(tmp_path / "broker", secure=True) as broker:
        client = tmp_path / "broker" / "kafka" / "secure" / "client.toml"
        log = tmp_path / "log.csv"
        with gzip.open(TAOBAO, "rt") as lines:
            log.write_text("".join(itertools.islice(lines, 5_000)))
        with demo(tmp_path / "run", "--config", client, "--log", "taobao", "--path", log) as running:
            running.until(lambda: trained(running, 100), 200)
            topics = running.settings["topics"]["prefix"]
            records = read_all(client_arguments(broker.connection), f"{topics}parameters")[0]
            comes_out(running.result(300))
        assert records
        assert all(dict(record.headers).get("signature") for record in records)
        (snapshot, *_) = (tmp_path / "run" / "demo" / "snapshots").glob(f"*/{SEAL}")
        assert snapshot.stat().st_size
        password = (client.parent / "password").read_text()
        written = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".toml", ".log", "")]
        assert not [path for path in written if path.is_file() and password.encode() in path.read_bytes()]


def test_a_command_that_is_not_let_in_ends_at_once_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with Broker.start(tmp_path, secure=True) as broker:
        config = tmp_path / "kafka" / "secure" / "client.toml"
        common = ("--config", config, "--data-dir", tmp_path / "data")
        attempts = {
            "password": (common, {"HEADRACE_KAFKA_PASSWORD_FILE": str(tmp_path / "wrong")}, "refuses the user"),
            "authority": (common, {"HEADRACE_KAFKA_CA_FILE": str(tmp_path / "other.pem")}, "is refused"),
            "name": ((*common, "--bootstrap", broker.bootstrap.replace("127.0.0.1", "localhost")), {}, "by a name"),
            "in the clear": (("--data-dir", tmp_path / "data", "--bootstrap", broker.bootstrap), {}, "with PLAINTEXT"),
        }
        for kind in ("join", "serve"):
            for what, (arguments, environment, said) in attempts.items():
                ended = headrace(kind, *arguments, **environment)
                assert ended.returncode == 1, (kind, what, ended.stderr)
                (line,) = ended.stderr.splitlines()
                assert said in line, (kind, what)
        assert headrace("topics", "create", "--data-dir", tmp_path).returncode == 0, "the data directory knows the way"
