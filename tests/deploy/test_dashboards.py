"""The dashboard asks for names that the workers export, and reaches a server that keeps it.

The server here is a stand-in of some thirty lines on the loopback, not Grafana: it keeps dashboards by uid, counts
versions and wants a token. With GRAFANA_URL and GRAFANA_TOKEN set, the last test runs against a real one.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.dashboards import build, dashboards, push
from embedding_store.errors import HeadraceError


class StandIn(ThreadingHTTPServer):
    """Keeps what POST /api/dashboards/db brings."""

    def __init__(self) -> None:
        self.kept: dict[str, dict] = {}
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer right":
            return self._answer(401, {"message": "Unauthorized"})
        if self.path != "/api/dashboards/db":
            return self._answer(404, {"message": "Not found"})
        board = body["dashboard"]
        known = self.server.kept.get(board["uid"])
        if known is not None and not body.get("overwrite"):
            return self._answer(412, {"message": "The dashboard has been changed by someone else"})
        version = known["version"] + 1 if known else 1
        self.server.kept[board["uid"]] = {"version": version, "dashboard": board}
        return self._answer(
            200, {"uid": board["uid"], "version": version, "url": f"/d/{board['uid']}", "status": "success"}
        )

    def _answer(self, status: int, body: dict) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_every_query_names_a_metric_that_a_worker_exports(tmp_path: Path) -> None:
    from prometheus_client import generate_latest

    from online_model.serving.metrics import Metrics
    from online_model.trainer import open_trainer
    from streams.metrics import TrainMetrics, train_values
    from tests.online_model.test_trainer import SMALL

    class Replica:
        epoch, sequence, created_ms = 1, 2, 3

        def rows(self) -> dict[str, int]:
            return {"item": 4}

        def nbytes(self) -> dict[str, int]:
            return {"item": 4_000}

        def recall(self) -> float:
            return 0.95

    metrics = Metrics()
    metrics.watch(Replica)  # type: ignore[arg-type]
    metrics.request("/v1/rank", 200, 0.01)
    metrics.refused("invalid")
    metrics.answered("rank", degraded=True)
    trainer = open_trainer(SMALL, tmp_path / "store", lambda: 1)
    text = metrics.text() + generate_latest(TrainMetrics(lambda: train_values(trainer, 0, 0)).registry)
    trainer.store.close()
    exported = set(re.findall(r"^(headrace_\w+)", text.decode(), re.MULTILINE))
    asked = {
        name
        for d in dashboards()
        for p in d["panels"]
        for t in p["targets"]
        for name in re.findall(r"headrace_\w+", t["expr"])
    }
    assert asked
    assert asked <= exported


def test_panels_have_units_and_do_not_overlap() -> None:
    for dashboard in dashboards():
        places = set()
        for panel in dashboard["panels"]:
            assert panel["fieldConfig"]["defaults"]["unit"]
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not places & cells
            assert at["x"] + at["w"] <= 24
            places |= cells


def test_pushing_twice_leaves_one_dashboard(stand_in: StandIn) -> None:
    assert push(stand_in.url, "right") == [f"{stand_in.url}/d/headrace-overview"]
    push(stand_in.url, "right")
    (kept,) = stand_in.kept.values()
    assert kept["version"] == 2
    assert kept["dashboard"] == dashboards()[0]


def test_a_wrong_token_is_one_line_with_a_remedy(stand_in: StandIn) -> None:
    with pytest.raises(HeadraceError, match=r"refuses the dashboard .*token"):
        push(stand_in.url, "wrong")
    assert not stand_in.kept


def test_the_files_are_what_is_pushed(tmp_path) -> None:
    (file,) = build(tmp_path / "new")
    assert json.loads(file.read_text()) == dashboards()[0]


@pytest.mark.skipif("GRAFANA_URL" not in os.environ, reason="GRAFANA_URL and GRAFANA_TOKEN name no real server")
def test_a_real_grafana_takes_it() -> None:
    assert push(os.environ["GRAFANA_URL"], os.environ["GRAFANA_TOKEN"])
