"""The whole system on a real Kafka: promises 1, 3 and 6 of the design, seen from outside."""

from __future__ import annotations

import gzip
import json
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import MessageSizeTooLargeError
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.demos import TAOBAO, Demo, demo, headrace

KEYS = {
    "events_in", "events_rejected", "examples", "trained_examples", "lost", "duplicated", "versions_published",
    "trainer_version", "replica_version", "freshness_ms", "prequential", "ctr_first_window", "ctr_last_window",
    "ctr_frozen_last_window", "balance", "events_per_s", "seconds",
}  # fmt: skip
BALANCE = {"events_in", "rejected", "duplicates", "late", "joined", "history_only", "open", "set_aside"}

pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]


def comes_out(result: dict[str, Any]) -> None:
    """Nothing lost, nothing twice, and every figure that must balance does."""
    assert result.keys() >= KEYS
    assert (result["lost"], result["duplicated"], result["left_out"]) == (0, 0, 0)
    assert result["trained_examples"] == result["examples"] > 0
    balance = result["balance"]
    assert balance.keys() == BALANCE
    assert balance["events_in"] == sum(v for name, v in balance.items() if name != "events_in")
    assert {k: balance[k] for k in result["oracle_balance"]} == result["oracle_balance"]
    assert result["trainer_version"] == result["replica_version"]


def model(running: Demo) -> dict[str, Any] | None:
    """What the replica says of itself, if it answers yet."""
    try:
        return httpx.get(f"http://127.0.0.1:{running.settings['serve']['port']}/v1/model").json()
    except httpx.TransportError:
        return None


def trained(running: Demo, at_least: int) -> bool:
    answer = model(running)
    return bool(answer) and answer["info"].get("trained_rows", 0) >= at_least


def test_users_are_learned_from_and_garbage_harms_nobody(tmp_path: Path) -> None:
    with demo(tmp_path, "--seconds", 0, "--seed", 3) as running:
        running.until(lambda: trained(running, 500))
        settings = running.settings
        topic = settings["topics"]["prefix"] + "events"
        producer = KafkaProducer(bootstrap_servers=settings["bootstrap"], max_request_size=20_000_000)
        click = {"kind": "click", "event_id": "g", "ts": 5, "user": "u", "item": "i"}
        garbage = [
            b"", b"\xff\x00\xfe", b"{", b"[]", json.dumps(click | {"ts": -5}).encode(),
            json.dumps(click | {"ts": 1 << 42}).encode(), json.dumps(click | {"item": "x" * 900_000}).encode(),
        ]  # fmt: skip
        for partition in range(settings["topics"]["partitions"]):
            for value in garbage:
                producer.send(topic, value, partition=partition).get(60)
        with pytest.raises(MessageSizeTooLargeError):  # 10 MB: refused where it is sent, with a name
            producer.send(topic, b"x" * 10_000_000, partition=0).get(60)
        producer.close()
        dead = settings["topics"]["prefix"] + "events.dead"
        reasons = running.until(lambda: dead_letters(settings["bootstrap"], dead, 4 * len(garbage)))
        assert set(reasons) == {"not_json", "not_utf8", "wrong_type", "out_of_range", "from_the_future"}
        shown = running.until(lambda: fresh(scraped(running)), 120)
        running.process.send_signal(signal.SIGINT)
        result = running.result(300)
    comes_out(result)
    assert not (tmp_path / "targets.json").exists()  # nobody listens there any more
    assert shown["join", "headrace_join_rejected_total"] == 4 * len(garbage)
    assert shown["join", "headrace_join_kinds_total"] > 100
    assert shown["join", "headrace_join_watermark_lag_seconds"] < 4 * 60
    assert shown["train", "headrace_train_versions_published_total"] > 1
    assert shown["train", "headrace_train_stage_seconds_total"] > 0
    assert shown["demo", "headrace_player_events_total"] > 500
    assert result["events_rejected"] == result["balance"]["rejected"] == 4 * len(garbage)
    assert result["versions_published"] >= 10
    assert result["freshness_ms"]["count"] >= 100
    assert result["prequential"]["click"]["auc"] > 0.5
    assert result["balance"]["joined"] > 1_000


def scraped(running: Demo) -> dict[tuple[str, str], float]:
    """(job, sample) → its value, the sum over its labels, of all targets that the demo names; all of them are well."""
    found: dict[tuple[str, str], float] = {}
    for target in json.loads((running.data_dir / "targets.json").read_text("utf-8")):
        job, (address,) = target["labels"]["job"], target["targets"]
        health = httpx.get(f"http://{address}{'/healthz' if job == 'serve' else '/health'}")
        assert (health.status_code, health.json()) == (200, {"ok": True}), job
        for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text):
            for sample in family.samples:
                found[job, sample.name] = found.get((job, sample.name), 0.0) + sample.value
    return found


def fresh(shown: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """What was scraped, if probes have come all the way, and enough was joined to look at; else nothing."""
    assert {job for job, name in shown if name == "headrace_info"} == {"join", "train", "serve", "demo"}
    enough = shown.get(("join", "headrace_join_kinds_total"), 0) > 300
    return shown if enough and shown["demo", "headrace_freshness_seconds_count"] > 4 * 100 else {}


def dead_letters(bootstrap: str, topic: str, expected: int) -> list[str] | None:
    """The reasons of all dead letters there are, once there are as many as expected."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False)
    try:
        place = TopicPartition(topic, 0)
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end, letters = consumer.end_offsets([place])[place], []
        while consumer.position(place) < end:
            for records in consumer.poll(timeout_ms=500).values():
                letters += [dict(record.headers)["reason"].decode() for record in records]
        assert len(letters) <= expected
        return letters if len(letters) == expected else None
    finally:
        consumer.close()


@pytest.mark.nightly
@pytest.mark.skipif(not TAOBAO.exists(), reason="the Taobao log is not beside the checkout")
def test_a_real_log_comes_out_exactly_with_train_and_join_killed_in_the_middle(tmp_path: Path) -> None:
    with demo(tmp_path, "--log", "taobao", "--path", TAOBAO, "--no-page") as running:
        running.until(lambda: trained(running, 2_000))
        killed = [running.kill("train"), running.kill("join")]
        result = running.result()
    comes_out(result)
    assert result["balance"]["events_in"] == 96_168
    assert result["balance"]["open"] == 0
    assert result["restarts"] == {"join": 1, "train": 1, "serve": 0}
    assert all(not psutil.pid_exists(pid) for pid in killed)


@pytest.mark.nightly
def test_ctrl_c_ends_it_cleanly_and_the_next_one_can_go_on(tmp_path: Path) -> None:
    with demo(tmp_path, "--seconds", 0, "--no-page") as running:
        running.until(lambda: trained(running, 300))
        refused = headrace("demo", "--data-dir", tmp_path, "--seconds", 5)
        assert refused.returncode != 0
        assert one_line(refused.stderr)
        assert "--data-dir" in refused.stderr
        running.process.send_signal(signal.SIGINT)
        first = running.result()
        comes_out(first)
    with demo(tmp_path, "--seconds", 4, "--no-page", "--keep") as running:
        second = running.result()
    comes_out(second)
    assert second["examples"] > first["examples"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


def one_line(stderr: str) -> bool:
    """One line with a remedy, and no traceback."""
    return len(stderr.strip().splitlines()) == 1 and "Traceback" not in stderr


LONG = [pytest.param(kind, marks=pytest.mark.nightly) for kind in ("truncated", "bytes")]


@pytest.mark.parametrize("kind", ["missing", "empty", *LONG])
def test_a_log_that_cannot_be_read_is_said_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.csv.gz"
    row = b"1,2,3,pv,1511658000\n"
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(gzip.compress(row * 5_000)[:-20])
        case "bytes":
            path.write_bytes(gzip.compress(b"\xff\xfe\x00" * 5_000))
    done = headrace("demo", "--log", "taobao", "--path", path, "--data-dir", tmp_path / "state", "--no-page", "--json")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(path.name, last), done.stderr


def test_no_broker_is_said_in_one_line(tmp_path: Path) -> None:
    for arguments in (
        ("demo", "--bootstrap", "127.0.0.1:9", "--data-dir", tmp_path),
        ("join", "--bootstrap", "127.0.0.1:9", "--data-dir", tmp_path),
        ("train", "--data-dir", tmp_path),
    ):
        done = headrace(*arguments)
        assert done.returncode == 1
        assert one_line(done.stderr), done.stderr
        assert "headrace broker start" in done.stderr
