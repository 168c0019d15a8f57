"""The listener of a worker: its metrics and its health, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from deploy.processes import free_port
from embedding_store.errors import UsageError
from streams.health import AWAY_SECONDS, Progress, kafka_away
from streams.listener import serve_metrics


class Worker:
    """One that says what it is told to say."""

    why = ""

    def unwell(self) -> str:
        return self.why


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def client(worker: Worker) -> Iterator[httpx.Client]:
    registry, port = CollectorRegistry(), free_port()
    Counter("some", "Some", registry=registry).inc(3)
    end = serve_metrics(registry, port, worker.unwell)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        yield client
    end()


def test_it_answers_with_the_metrics(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "some_total 3.0" in answer.text


def test_health_is_503_with_the_reason_while_the_worker_is_unwell(client: httpx.Client, worker: Worker) -> None:
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"ok": True})
    worker.why = "records wait"
    answer = client.get("/health")
    assert client.get("/healthz").status_code == 200, "it lives"
    assert (answer.status_code, answer.json()) == (503, {"ok": False, "why": "records wait"})
    worker.why = ""
    assert client.get("/health").status_code == 200


def test_all_other_paths_and_methods_are_refused(client: httpx.Client) -> None:
    for path in ("/", "/metrics/", "/metrics/x", "/favicon.ico"):
        assert client.get(path).status_code == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        for path in ("/metrics", "/health"):
            assert client.request(method, path).status_code == 405, (method, path)


def test_a_port_that_is_taken_is_said_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port} for metrics: choose another metrics_port"):
            serve_metrics(CollectorRegistry(), port)


def test_progress_is_stuck_only_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("streams.health.time.monotonic", lambda: now)
    progress = Progress()
    now = 500.0
    assert progress.stuck_s == 0  # nothing to do is no reason
    progress.wanted()
    now = 510.0
    progress.wanted()  # more of it is no progress
    assert progress.stuck_s == 10
    progress.made(more=True)
    now = 513.0
    assert progress.stuck_s == 3
    progress.made(more=False)
    now = 900.0
    assert progress.stuck_s == 0


def test_kafka_is_away_once_it_has_not_answered_for_a_while() -> None:
    assert kafka_away(AWAY_SECONDS) == ""
    assert kafka_away(AWAY_SECONDS + 2) == "Kafka has not answered for 12 s"
