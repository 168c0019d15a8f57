"""Over a real socket, while versions keep coming: readers see whole versions only."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from embedding_store.delta import Version
from online_model.serving import server as serving_server
from online_model.serving.app import create_app
from online_model.serving.holder import Holder
from tests.online_model.serving.torn import LEVELS, alone, uniform
from tests.online_model.serving.world import dense, rank

pytestmark = pytest.mark.usefixtures("one_thread")  # as the worker has it
N = 200
LAST = LEVELS  # versions: no two score alike
DENSE = dense()


def version_of(sequence: int) -> Version:
    return uniform(sequence, DENSE, N)


class Server:
    """uvicorn in a thread, as the serve worker runs it: in one loop with what applies the versions."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.go, self.stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    async def _run(self) -> None:
        self.holder = Holder(alone(version_of(1)))
        app = create_app(self.holder, max_age_ms=1 << 50)
        server = serving_server.Server(app)
        serving = asyncio.create_task(server.serve([self.socket]))
        sequence = 1
        while not self.stop.is_set():
            if self.go.is_set() and sequence < LAST:
                sequence += 1
                self.holder.apply(version_of(sequence))
            await asyncio.sleep(0.002)
        self.holder.close()
        server.should_exit = True
        await serving

    def close(self) -> None:
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with httpx.Client(base_url=made.url, timeout=5) as http:
        assert http.get("/readyz").status_code == 200
    yield made
    made.close()


def expected_scores() -> dict[str, float]:
    """Version → the score of all its items."""
    made, out = alone(version_of(1)), {}
    for sequence in range(1, LAST + 1):
        made.apply(version_of(sequence))
        out[made.version] = rank(made, "u", "live", [0]).items[0].score
    return out


def read(url: str) -> list[tuple[str, int, list[float]]]:
    """Answers of one client until the last version is there."""
    seen: list[tuple[str, int, list[float]]] = []
    with httpx.Client(base_url=url, timeout=5) as http:
        while not seen or seen[-1][0] != f"1.{LAST}":
            for path, body in (("/v1/rank", {"candidates": list(range(N))}), ("/v1/recommend", {"k": 50})):
                answer = http.post(path, json={"user": "u", "scenario": "live", **body}).json()
                seen.append((answer["model_version"], answer["feature_hash"], [i["score"] for i in answer["items"]]))
    return seen


def test_readers_see_whole_versions_only(server):
    expected = expected_scores()
    assert len(set(expected.values())) == LAST
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, server.url) for _ in range(3)]
        server.go.set()
        answers = [reader.result(60) for reader in readers]
    for seen in answers:
        assert len({version for version, _, _ in seen}) > 20  # versions came while it read
        sequences = [int(version.split(".")[1]) for version, _, _ in seen]
        assert sequences == sorted(sequences)
        for version, _, scores in seen:
            assert scores == pytest.approx([expected[version]] * len(scores), rel=1e-5)
        hashes = {version: feature_hash for version, feature_hash, _ in seen}
        assert len(set(hashes.values())) == len(hashes)
        assert all(hashes[version] == feature_hash for version, feature_hash, _ in seen)


def test_a_long_poll_over_a_socket_does_not_hold_up_the_end(server):
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=40) as http:
        waiting = pool.submit(http.get, "/v1/model?newer_than=100000&wait_ms=30000")
        with httpx.Client(base_url=server.url) as other:
            assert other.get("/healthz").status_code == 200
        server.close()
        assert waiting.result(5).json()["sequence"] == 1


def test_an_endless_body_is_cut_off(server):
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    with httpx.Client(base_url=server.url, timeout=5) as http:
        try:
            response = http.post("/v1/rank", content=endless())
        except httpx.WriteError:
            pass  # the server may close the connection while the client still sends
        else:
            assert response.status_code == 413
            assert "larger than" in response.json()["detail"]
    with httpx.Client(base_url=server.url, timeout=5) as http:
        assert http.post("/v1/rank", json={"user": 1, "candidates": [1]}).status_code == 200


def test_a_client_that_goes_away_in_the_middle_hurts_nobody(server):
    host, port = server.socket.getsockname()
    for _ in range(3):
        with socket.create_connection((host, port)) as raw:
            raw.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{")
    with httpx.Client(base_url=server.url, timeout=5) as http:
        assert http.post("/v1/rank", json={"user": 1, "candidates": [1]}).status_code == 200
