"""Kafka starts with Java's cache, and without."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deploy.broker import Broker
from deploy.kafka_aot import make_cache
from deploy.kafka_jars import KAFKA_VERSION, aot_cache, kafka_jars


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of its own, with the jars of this one."""
    folder = tmp_path / "cache" / f"kafka-{KAFKA_VERSION}"
    folder.mkdir(parents=True)
    for jar in kafka_jars():
        (folder / jar.name).symlink_to(jar)
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.nightly
def test_the_cache_is_made_once_and_used(cache: Path, tmp_path: Path) -> None:
    assert make_cache()
    made = aot_cache().stat()
    assert make_cache()
    assert aot_cache().stat() == made
    assert not list(cache.glob(".warming-*"))
    with Broker.start(tmp_path / "data") as broker:
        assert str(aot_cache()) in {Path(file.path).as_posix() for file in psutil.Process(broker.pid).memory_maps()}


@pytest.mark.nightly
def test_kafka_starts_without_and_with_a_spoiled_cache(cache: Path, tmp_path: Path) -> None:
    for spoil in (lambda: None, lambda: aot_cache().write_bytes(b"no cache")):
        spoil()
        with Broker.start(tmp_path / "data") as broker:
            assert broker.pid


def test_where_it_cannot_be_made_kafka_goes_without(cache: Path) -> None:
    core = next(cache.glob("kafka_2*.jar"))
    core.unlink()
    core.write_bytes(b"no jar")
    assert not make_cache()
    assert not aot_cache().exists()
