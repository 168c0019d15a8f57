"""Where a replica listens: scoring and health on one port, the rest on another if it has one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.processes import free_port
from embedding_store.errors import UsageError
from embedding_store.secret import Secret
from online_model.serving.client import authorization
from online_model.serving.holder import Holder
from online_model.serving.settings import HttpSettings
from streams.serve_worker import _Listeners
from streams.settings import ServeWorkerSettings
from tests.online_model.serving.world import replica

TOKEN = Secret("t" * 32)


def settings(**values: Any) -> ServeWorkerSettings:
    return ServeWorkerSettings(bootstrap="", data_dir=Path(), **{"port": free_port(), **values})


def answers(given: ServeWorkerSettings, headers: Mapping[str, str]) -> dict[tuple[int, str], int]:
    """(port, path) → status."""

    async def run() -> dict[tuple[int, str], int]:
        listeners, found = _Listeners(given), {}
        listeners.over(Holder(replica()))
        serving = listeners.serve()
        async with httpx.AsyncClient(headers=headers) as http:
            for port in filter(None, (given.port, given.admin_port)):
                for path in ("/v1/model", "/healthz", "/metrics"):
                    found[port, path] = (await http.get(f"http://127.0.0.1:{port}{path}")).status_code
        listeners.end()
        await asyncio.gather(*serving)
        return found

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_an_admin_port_takes_the_metrics_from_the_other() -> None:
    given = settings(admin_port=free_port(), http=HttpSettings(token=TOKEN))
    port, admin = given.port, given.admin_port
    assert answers(given, {}) == {
        (port, "/v1/model"): 401, (port, "/healthz"): 200, (port, "/metrics"): 401,
        (admin, "/v1/model"): 401, (admin, "/healthz"): 401, (admin, "/metrics"): 401,
    }  # fmt: skip
    assert answers(given, authorization(TOKEN)) == {
        (port, "/v1/model"): 200, (port, "/healthz"): 200, (port, "/metrics"): 404,
        (admin, "/v1/model"): 404, (admin, "/healthz"): 404, (admin, "/metrics"): 200,
    }  # fmt: skip


def test_without_anything_set_all_is_on_one_port() -> None:
    given = settings()
    assert set(answers(given, {}).values()) == {200}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"http": HttpSettings(host="0.0.0.0")}, r"http\.host = 0\.0\.0\.0 .* asks for a token"),  # noqa: S104
        ({"http": HttpSettings(host="0.0.0.0", token=TOKEN)}, r"set serve\.admin_port"),  # noqa: S104
        ({"http": HttpSettings(admin_host="::"), "admin_port": 1}, r"http\.admin_host = :: .* asks for a token"),
        ({"http": HttpSettings(host="192.0.2.1", token=TOKEN), "admin_port": 1}, "is it an address of this machine"),
    ],
)
def test_nothing_listens_that_should_not(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _Listeners(settings(**values))
