"""headrace replay dead: what was refused is edited or repaired, goes back, and is joined."""

from __future__ import annotations

import base64
import json
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from kafka import KafkaProducer

from deploy.cli import run
from streams.blocks import decode_block
from streams.topics import TopicSettings, create_topics
from tests.streams.children import group_offsets, read_all, running, wait_for

PARTITIONS = 2
NOT_TEXT = b'{"kind":"click","user":"\xff"}'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def topics(broker: str, topic_prefix: str) -> TopicSettings:
    settings = TopicSettings(prefix=topic_prefix, partitions=PARTITIONS)
    create_topics(broker, settings)
    Path("headrace.toml").write_text(
        f'bootstrap = "{broker}"\n[topics]\nprefix = "{topic_prefix}"\npartitions = {PARTITIONS}\n'
    )
    return settings


def _told(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capfd.readouterr()
    assert run(["replay", "dead", *arguments, "--json"]) == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dead", "f.jsonl", "--out", "g.jsonl"), "leave FILE and --repair out"),
        (("dead", "--out", "g.jsonl", "--repair", "a:b"), "leave FILE and --repair out"),
        (("dead", "f.jsonl", "--again"), "leave FILE out"),
        (("dead", "--repair", "mend"), "write MODULE:FUNCTION"),
        (("dead", "--repair", "no_such_module:fix"), "no_such_module"),
        (("dead", "--repair", "json:no_such_function"), "no_such_function"),
        (("dead", "--repair", "json:__name__"), "is not a function"),
        (("dead", "--direct"), "leave the others out"),
        (("dead", "bad.jsonl"), "bad.jsonl, line 2:"),
        (("events", "log.jsonl", "--out", "x"), "are of `headrace replay dead`"),
    ],
)
def test_wrong_usage_is_one_line(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    Path("bad.jsonl").write_text('{"value":"{}"}\n{"value":7}\n')
    assert run(["replay", *arguments]) == 2
    line = capfd.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert said in line


@pytest.mark.broker
def test_refused_records_go_back_edited_or_repaired_and_are_joined(
    broker: str, topics: TopicSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    now = int(time.time() * 1000) - 60_000
    about = {"user": "u", "request_id": "r"}
    shown = about | {"kind": "impression", "event_id": "s", "ts": now, "items": [*range(6)]}
    clicks = [about | {"kind": "click", "event_id": f"c{n}", "ts": str(now + 9), "item": n} for n in range(4)]
    later = {"kind": "tick", "event_id": "later", "ts": now + 30_000}
    user_partition = _partition_of(broker, topics, json.dumps(shown).encode())
    settings = {"bootstrap": broker, "data_dir": tmp_path / "data", "join": {}, "ticks": "log",
                "topics": {"prefix": topics.prefix, "partitions": PARTITIONS}}  # fmt: skip
    with running("join", tmp_path / "log", **settings) as child, ExitStack() as made:

        def joined(offset: int) -> None:
            group = f"{topics.prefix}headrace-join.store"
            wait_for(lambda: group_offsets(broker, group, topics.events, PARTITIONS)[user_partition] == offset,
                     child=child)  # fmt: skip

        producer = made.enter_context(closing(KafkaProducer(bootstrap_servers=broker)))
        for value in [*(json.dumps(click).encode() for click in clicks), NOT_TEXT, json.dumps(later).encode()]:
            producer.send(topics.events, value, partition=user_partition)
        producer.send(topics.events, None, key=b"k", partition=user_partition)
        producer.flush()
        joined(8)
        nothing = {"written": 0, "sent": 0, "refused": {}, "skipped": 0}

        assert _told(capfd, "--out", "dead.jsonl") == nothing | {"read": 6, "written": 6}
        assert _told(capfd) == nothing | {"read": 0}  # the group has moved on
        lines = [json.loads(line) for line in Path("dead.jsonl").read_text().splitlines()]
        assert [line["reason"] for line in lines] == ["wrong_type"] * 4 + ["not_utf8", "not_json"]
        assert [line["offset"] for line in lines] == [1, 2, 3, 4, 5, 7]
        assert json.loads(lines[0]["value"]) == clicks[0]
        assert base64.b64decode(lines[4]["value"]) == NOT_TEXT
        assert run(["replay", "dead", "--out", "dead.jsonl", "--again"]) == 2  # an edited file is not written over
        assert "is there already" in capfd.readouterr().err

        lines[0]["value"] = lines[0]["value"].replace(f'"{now + 9}"', str(now + 9))
        lines[1]["value"] = clicks[1] | {"ts": now + 9}  # the object itself
        Path("dead.jsonl").write_text("\n".join(map(json.dumps, lines)))
        told = _told(capfd, "dead.jsonl")
        assert told == nothing | {"read": 6, "sent": 2, "refused": {"wrong_type": 2, "not_utf8": 1}, "skipped": 1}
        joined(10)
        assert _clicked(broker, topics) == {0, 1}

        Path("mend.py").write_text(
            "import json\n"
            "def fix(raw):\n"
            "    click = json.loads(raw.decode('utf-8', 'replace'))\n"
            "    mended = {**click, 'ts': int(click.get('ts', -1))}\n"
            "    return None if click.get('item') == 3 else json.dumps(mended).encode()\n"
        )
        told = _told(capfd, "--again", "--repair", "mend:fix")
        assert told == nothing | {"read": 6, "sent": 3, "refused": {"out_of_range": 1}, "skipped": 2}
        joined(13)
        assert _clicked(broker, topics) == {0, 1, 2}  # 0 and 1 were sent twice: duplicates
        assert child.stop() == 0, child.said
    counts = _blocks(broker, topics)[user_partition][-1].counts
    assert (counts.rejected, counts.duplicates, counts.late) == (6, 2, 3)


@pytest.mark.broker
def test_nothing_is_taken_as_done_when_the_repair_fails(
    broker: str, topics: TopicSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    headers = [("reason", b"x"), ("detail", b""), ("partition", b"0"), ("offset", b"7")]
    with closing(KafkaProducer(bootstrap_servers=broker)) as producer:
        producer.send(topics.events_dead, b"{}", headers=headers).get(10)
        producer.send(topics.events_dead, b"sent by something else").get(10)
    Path("broken.py").write_text("def fix(raw): return 1 // 0\ndef text(raw): return ''\n")
    for function, said in (("fix", "ZeroDivisionError"), ("text", "must give bytes")):
        assert run(["replay", "dead", "--repair", f"broken:{function}"]) == 2
        line = capfd.readouterr().err.strip()
        assert said in line
        assert "0:7" in line
    told = _told(capfd)
    assert told["refused"] == {"missing_field": 1, "not_json": 1}
    assert _told(capfd)["read"] == 0


def _partition_of(broker: str, topics: TopicSettings, value: bytes) -> int:
    """Sends it keyed by its user, as a producer of Kafka's would."""
    with closing(KafkaProducer(bootstrap_servers=broker)) as producer:
        return producer.send(topics.events, value, key=json.loads(value)["user"].encode()).get(10).partition


def _blocks(broker: str, topics: TopicSettings) -> dict:
    return {p: [decode_block(r.value) for r in records] for p, records in read_all(broker, topics.examples).items()}


def _clicked(broker: str, topics: TopicSettings) -> set[int]:
    examples = [block.examples for blocks in _blocks(broker, topics).values() for block in blocks]
    return {int(raw) for rows in examples for raw in rows.item_raw[rows.click == 1]}
