"""Of who can write into `parameters`, or into the folder of snapshots, and has no key, a replica takes nothing: it says
so, counts it, and serves on with its last good version."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from embedding_store.secret import Secret
from embedding_store.signing import Signer, SigningSettings
from embedding_store.snapshot import requests, snapshots, write_snapshot
from streams.follower import REASONS
from streams.published import newest_version
from streams.settings import ServeWorkerSettings, TrainWorkerSettings
from tests.streams.test_follower import Serving, World, decoded, made_up, parts_of, until

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("one_thread")]

KEY, OTHER = "k" * 64, "o" * 64


@pytest.fixture
def world(broker: str, tmp_path: Path) -> Iterator[World]:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    made = World(broker, tmp_path, serve=False, signing=SigningSettings(key_file=keys))
    yield made
    made.end()


def refusals(world: World) -> dict[str, float]:
    registry = world.replica.holder.metrics.registry
    return {r: registry.get_sample_value("headrace_replica_refused_total", {"reason": r}) or 0.0 for r in REASONS}


class Copying(Signer):
    """Puts a signature that was good under other bytes."""

    def __init__(self, signature: bytes) -> None:
        self._copied = signature

    def sign(self, what: str, data: bytes) -> bytes:
        return self._copied


def attacks(first: list[bytes], signer: Signer, topic: str) -> dict[str, tuple[str, Signer | None, list[bytes]]]:
    """What is tried → (why it is refused, whose signature, the parts); `first`: of the version 1.1, which is held."""
    old = decoded(first)
    next_one = made_up(old, base=(1, 1), sequence=2)
    copying = Copying(signer.sign("version", first[0]))
    return {
        "no signature": ("unsigned", None, next_one),
        "another key": ("forged", Signer([Secret(OTHER)], topic), next_one),
        "of another trainer that has the same key": ("forged", Signer([Secret(KEY)], "other.parameters"), next_one),
        "changed after it was signed": ("forged", copying, next_one),
        "an old one as the next": ("forged", copying, parts_of(old, base=(1, 1), sequence=2)),
        "an old one as of the next epoch": ("forged", copying, parts_of(old, base=(1, 1), epoch=2)),
        "an old one again": ("replayed", signer, first),
    }


def test_forged_unsigned_and_replayed_versions_are_refused_logged_and_counted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    source, signer = world.source, world.source.signer
    assert signer is not None
    world.serving = Serving(world.serve_settings)
    first = source.version()
    source.send(*first)
    world.replica.reaches((1, 1), 20)
    for attack, (reason, whose, parts) in attacks(first, signer, world.serve_settings.topics.parameters).items():
        before = refusals(world)
        source.send_signed(whose, *parts)
        wanted = before | {reason: before[reason] + (1 if reason == "replayed" else len(parts))}
        until(partial(lambda wanted: refusals(world) == wanted, wanted), what=lambda: refusals(world))
        assert world.replica.held == (1, 1), attack
        assert not world.replica.holder.behind, "nothing of the trainer's is missing"
    assert "is not signed" in caplog.text
    assert "left out version 1.1" in caplog.text
    source.send(*source.version())
    world.replica.reaches((1, 2))
    assert not world.replica.errors
    assert not requests(world.snapshots)


def test_a_forged_snapshot_is_passed_over_and_a_signed_one_taken(world: World) -> None:
    good = decoded(world.source.version())
    world.source.snapshot()
    write_snapshot(world.snapshots, decoded(made_up(good, base=None, epoch=8)))  # newer, and nobody signed it
    shutil.copytree(world.snapshots / "1-1", world.snapshots / "7-1")  # or as another
    world.serving = Serving(world.serve_settings)
    world.replica.reaches((1, 1), 20)
    assert [path.name for path in snapshots(world.snapshots)] == ["8-1", "7-1", "1-1"]
    assert refusals(world)["unsigned"] == 1
    assert refusals(world)["forged"] == 1


def test_keys_change_without_a_pause(world: World, tmp_path: Path) -> None:
    """Replicas learn the new key first, then the trainer signs with it, then the old one goes."""
    both = tmp_path / "both"
    both.write_text(f"{KEY}\n{OTHER}\n")
    topic = world.serve_settings.topics.parameters
    world.serve_settings = _with(world.serve_settings, both)
    world.serving = Serving(world.serve_settings)
    world.source.send(*world.source.version())
    world.source.send_signed(Signer([Secret(OTHER), Secret(KEY)], topic), *world.source.version())
    world.replica.reaches((1, 2), 20)
    assert not any(refusals(world).values())


def _with(settings: ServeWorkerSettings, file: Path) -> ServeWorkerSettings:


    return msgspec.structs.replace(settings, signing=SigningSettings(key_file=file))


def test_a_forged_version_does_not_lead_the_trainers_epoch(world: World, broker: str) -> None:


    topic, signer = world.serve_settings.topics.parameters, world.source.signer
    first = world.source.version()
    world.source.send(*first)
    world.source.send_signed(None, *parts_of(decoded(first), epoch=99))
    assert asyncio.run(newest_version(broker, topic, signer)) == (1, 1)
    assert asyncio.run(newest_version(broker, topic)) == (99, 1)
    assert TrainWorkerSettings(bootstrap=broker, data_dir=Path()).signer is None
