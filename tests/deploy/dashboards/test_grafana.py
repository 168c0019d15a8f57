"""Dashboards and rules onto a server: the plan says what a push does, a second push does nothing, edits are put back.

The server is a stand-in (stand_in.py), not Grafana. With GRAFANA_URL and GRAFANA_TOKEN set, the story is told to a real
one instead; it then keeps what was pushed.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from deploy.cli import run
from deploy.dashboards.alerts import ALERTS, EVERY_S, FOLDER_UID, GROUP
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.grafana import plan, push
from deploy.dashboards.panels import SOURCE_UID
from embedding_store.errors import HeadraceError, UsageError
from tests.deploy.dashboards.stand_in import TOKEN, Grafana, standing_in

PROMETHEUS = "http://127.0.0.1:9090"
SLUGS = [alert.uid for alert in ALERTS]


@pytest.fixture
def server() -> Iterator[Grafana]:
    with standing_in() as grafana:
        yield grafana


def actions(changes: list) -> Counter[str]:
    return Counter(change.action for change in changes)


def todo(changes: list) -> list[str]:
    return [str(change) for change in changes if change.action != "none"]


def test_plan_changes_nothing_and_push_does_what_it_says(server: Grafana) -> None:
    planned = plan(server.url, TOKEN, PROMETHEUS)
    assert not server.writes
    assert actions(planned) == {"create": 1 + 1 + len(BOARDS) + len(ALERTS) + 1}
    assert todo(push(server.url, TOKEN, PROMETHEUS)) == todo(planned)
    assert server.dashboards.keys() == {board.uid for board in BOARDS}
    assert list(server.rules) == SLUGS
    assert server.intervals == {(FOLDER_UID, GROUP): EVERY_S}


def test_a_second_push_writes_nothing(server: Grafana) -> None:
    push(server.url, TOKEN, PROMETHEUS)
    written = len(server.writes)
    assert todo(push(server.url, TOKEN, PROMETHEUS)) == []
    assert todo(plan(server.url, TOKEN, PROMETHEUS)) == []
    assert len(server.writes) == written


def edit_title(server: Grafana) -> None:
    server.dashboards["headrace-streams"]["dashboard"]["panels"][1]["title"] = "By hand"


def edit_threshold(server: Grafana) -> None:
    defaults = server.dashboards["headrace-freshness"]["dashboard"]["panels"][1]["fieldConfig"]["defaults"]
    defaults["thresholds"]["steps"][1]["value"] = 99.5


def add_panel(server: Grafana) -> None:
    server.dashboards["headrace-kafka"]["dashboard"]["panels"].append({"id": 9, "type": "text", "title": "By hand"})


def move_dashboard(server: Grafana) -> None:
    server.dashboards["headrace-store"]["meta"]["folderUid"] = "by-hand"


def pause_rule(server: Grafana) -> None:
    server.rules["headrace-guard-tripped"]["isPaused"] = True


def edit_expression(server: Grafana) -> None:
    server.rules["headrace-disk-low"]["data"][0]["model"]["expr"] = "headrace_disk_free_bytes < 1"


def move_source(server: Grafana) -> None:
    server.sources[SOURCE_UID]["url"] = "http://by-hand:9090"


def rename_folder(server: Grafana) -> None:
    server.folders[FOLDER_UID]["title"] = "By hand"


def slow_group(server: Grafana) -> None:
    server.intervals[FOLDER_UID, GROUP] = 3_600


def delete_dashboard(server: Grafana) -> None:
    del server.dashboards["headrace-model"]


def delete_rule(server: Grafana) -> None:
    del server.rules["headrace-target-down"]


def old_rule(server: Grafana) -> None:
    server.rules["headrace-of-before"] = {**server.rules["headrace-disk-low"], "uid": "headrace-of-before"}


@pytest.mark.parametrize(
    ("edit", "seen", "in_diff"),
    [
        (edit_title, "change dashboard headrace-streams", '-    "title": "By hand"'),
        (edit_threshold, "change dashboard headrace-freshness", '"value": 99.5'),
        (add_panel, "change dashboard headrace-kafka", "By hand"),
        (move_dashboard, "change dashboard headrace-store", '"folderUid": "by-hand"'),
        (pause_rule, "change alert rule headrace-guard-tripped", '"isPaused": true'),
        (edit_expression, "change alert rule headrace-disk-low", "headrace_disk_free_bytes < 1"),
        (move_source, f"change data source {SOURCE_UID}", '"url": "http://by-hand:9090"'),
        (rename_folder, "change folder headrace", '"title": "By hand"'),
        (slow_group, "change rule group headrace", '"interval": 3600'),
        (delete_dashboard, "create dashboard headrace-model", ""),
        (delete_rule, "create alert rule headrace-target-down", ""),
        (old_rule, "remove alert rule headrace-of-before", ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_edit_by_hand_is_seen_and_put_back(
    server: Grafana, edit: Callable[[Grafana], None], seen: str, in_diff: str
) -> None:
    push(server.url, TOKEN, PROMETHEUS)
    pushed = json.loads(json.dumps(everything(server)))
    edit(server)
    (change,) = [change for change in plan(server.url, TOKEN, PROMETHEUS) if change.action != "none"]
    assert str(change) == seen
    assert in_diff in change.diff
    assert todo(push(server.url, TOKEN, PROMETHEUS)) == [seen]
    assert everything(server) == pushed
    assert todo(plan(server.url, TOKEN, PROMETHEUS)) == []


def everything(server: Grafana) -> dict[str, Any]:
    """What is kept, without what the server counts by itself."""
    def ours(thing: dict) -> dict:
        return {k: v for k, v in thing.items() if k not in ("id", "version")}

    return {
        "sources": [ours(source) for source in server.sources.values()],
        "folders": [ours(folder) for folder in server.folders.values()],
        "dashboards": {u: [d["meta"]["folderUid"], ours(d["dashboard"])] for u, d in server.dashboards.items()},
        "rules": {uid: ours(rule) for uid, rule in server.rules.items()},
        "intervals": [*server.intervals.values()],
    }  # fmt: skip


def test_rules_of_others_are_left_alone(server: Grafana) -> None:
    push(server.url, TOKEN, PROMETHEUS)
    server.rules["theirs"] = {**server.rules["headrace-disk-low"], "uid": "theirs", "ruleGroup": "theirs"}
    assert todo(push(server.url, TOKEN, PROMETHEUS)) == []
    assert "theirs" in server.rules


def test_a_wrong_token_is_one_line_with_a_remedy(server: Grafana) -> None:
    with pytest.raises(HeadraceError, match=r"HTTP 401.*token"):
        push(server.url, "wrong", PROMETHEUS)
    assert not server.writes


def test_a_server_that_is_not_there_is_one_line_with_a_remedy() -> None:
    with pytest.raises(HeadraceError, match=r"no Grafana answers .*--url"):
        plan("http://127.0.0.1:9", TOKEN, PROMETHEUS)
    with pytest.raises(UsageError, match="address of a server"):
        plan("127.0.0.1", TOKEN, PROMETHEUS)


def test_what_is_no_grafana_is_one_line_with_a_remedy() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *said: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(HeadraceError, match="no Grafana: check --url"):
                plan(f"http://127.0.0.1:{other.server_port}", TOKEN, PROMETHEUS)
        finally:
            other.shutdown()
            thread.join()


def test_the_command_says_what_changed(server: Grafana, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", server.url, "--token", TOKEN]
    assert run(["dashboards", "plan", *arguments]) == 0
    assert "create dashboard headrace-freshness" in capfd.readouterr().out
    for changed in (1 + 1 + len(BOARDS) + len(ALERTS) + 1, 0):
        assert run(["dashboards", "push", *arguments, "--json"]) == 0
        result = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert (result["changed"], result["rules"], len(result["dashboards"])) == (changed, len(ALERTS), len(BOARDS))
        assert {"panels", "queries_run", "empty"} <= result.keys()


@pytest.mark.skipif("GRAFANA_URL" not in os.environ, reason="GRAFANA_URL and GRAFANA_TOKEN name no real server")
def test_a_real_grafana_takes_it_and_a_second_push_changes_nothing() -> None:
    url, token = os.environ["GRAFANA_URL"], os.environ["GRAFANA_TOKEN"]
    push(url, token, PROMETHEUS)
    assert todo(plan(url, token, PROMETHEUS)) == []
    assert todo(push(url, token, PROMETHEUS)) == []
