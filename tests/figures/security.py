"""Figures of security: what is tried on Kafka, versions, snapshots and checkpoints, and what comes of it."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trustme

from deploy.broker import Broker
from deploy.broker_security import make_secure
from embedding_store.copies import MANIFEST
from embedding_store.kept import KeptCheckpoints
from embedding_store.signing import SigningSettings
from embedding_store.snapshot import write_snapshot
from online_model.checkpoints import describe
from tests.embedding_store.test_signing import seal_anew
from tests.figures.common import Bench, Row, command, environment
from tests.streams.test_follower import Serving, World, decoded, made_up, until
from tests.streams.test_signed_versions import KEY, attacks, refusals

AT_ONCE_S = 15.0  # from the start of a command to its end, on a busy machine
VALID = datetime.timedelta(seconds=120)  # of the certificate that expires: Kafka starts in that time


def security(bench: Bench) -> list[Row]:
    """Each attack is refused, said, and counted where there is a counter; what was good before goes on."""
    folder = bench.empty("security")
    return [*_kafka(folder / "kafka"), *_versions(folder / "versions")]


def _kafka(folder: Path) -> Iterator[Row]:
    make_secure(folder / "kafka", VALID)
    expires = time.monotonic() + VALID.total_seconds()
    (folder / "wrong").write_text("wrong")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    with Broker.start(folder) as broker:
        ours = ("--config", folder / "kafka" / "secure" / "client.toml", "--data-dir", folder / "data")
        elsewhere = broker.bootstrap.replace("127.0.0.1", "localhost")
        yield _turned_away("a certificate of another authority", ours, "is refused", CA_FILE=folder / "other.pem")
        yield _turned_away("a certificate of another name", (*ours, "--bootstrap", elsewhere), "by a name")
        yield _turned_away("a wrong password", ours, "refuses the user", PASSWORD_FILE=folder / "wrong")
        yield _turned_away("no TLS where it is asked for", (*ours[2:], "--bootstrap", broker.bootstrap), "PLAINTEXT")
        time.sleep(max(0.0, expires - time.monotonic()) + 2)
        yield _turned_away("an expired certificate", ours, "certificate has expired")


def _turned_away(what: str, arguments: tuple[object, ...], says: str, **kafka: Path) -> Row:
    """`headrace topics create`, which asks Kafka and nothing else."""
    variables = {f"HEADRACE_KAFKA_{name}": str(value) for name, value in kafka.items()}
    began = time.monotonic()
    done = subprocess.run(
        command("topics", "create", *arguments), env=environment() | variables | _packages(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    lines = done.stderr.strip().splitlines()
    holds = done.returncode == 1 and len(lines) == 1 and says in lines[0] and seconds < AT_ONCE_S
    seen = f"exit {done.returncode} after {seconds:.1f} s, {len(lines)} line: {lines[-1] if lines else ''}"
    return Row(what, seen, f"exit 1 within {AT_ONCE_S:.0f} s, one line that says why", holds)


def _packages() -> dict[str, str]:
    """Ours, with all that this process found beside them."""
    return {"PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])}


def _versions(folder: Path) -> Iterator[Row]:
    folder.mkdir()
    keys = folder / "keys"
    keys.write_text(KEY)
    with Broker.start(folder / "broker") as broker:
        world = World(broker.bootstrap, folder, serve=False, signing=SigningSettings(key_file=keys))
        try:
            yield from _attacked(world, folder, keys)
        finally:
            world.end()


def _attacked(world: World, folder: Path, keys: Path) -> Iterator[Row]:
    source, signer = world.source, world.source.signer
    assert signer is not None
    first = source.version()
    world.serving = Serving(world.serve_settings)
    source.send(*first)
    world.replica.reaches((1, 1), 60)
    for name, (reason, whose, parts) in attacks(first, signer, world.serve_settings.topics.parameters).items():
        yield _refused(world, f"a version: {name}", reason, lambda w=whose, p=parts: source.send_signed(w, *p))
        time.sleep(1.1)  # of what is forged one line a second is said
    source.send(*source.version())
    world.replica.reaches((1, 2), 60)
    yield Row("after all that", "the next version is served", "it is", not world.replica.errors)

    source.snapshot()
    world.serving.end()
    write_snapshot(world.snapshots, decoded(made_up(decoded(first), base=None, epoch=8)))
    part = next((world.snapshots / "1-2").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    world.serving = Serving(world.serve_settings)
    for name, reason in (("made up, without a signature", "unsigned"), ("changed", "forged")):
        until(lambda reason=reason: refusals(world)[reason] >= 1, 30)
        yield Row(f"a snapshot: {name}", f"refused, counted as {reason}", "refused, counted", True)

    lost = folder / "lost"  # where the store is no more, and is to come back
    kept = KeptCheckpoints(str(lost / "checkpoints"), signer)
    kept.keep(source.trainer.store, describe, 3)
    (copy,) = (lost / "checkpoints").iterdir()
    seal_anew(copy, about={"made": "up"})  # with a checksum that fits
    arguments = ("checkpoint", "rollback", "--data-dir", lost)
    settings = {"HEADRACE_SIGNING_KEY_FILE": str(keys), "HEADRACE_TOPICS_PREFIX": world.serve_settings.topics.prefix}
    done = subprocess.run(
        command(*arguments), env=environment() | settings | _packages(), capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines()
    holds = done.returncode == 1 and len(lines) == 1 and "not signed with a key of ours" in lines[0]
    yield Row(f"a kept checkpoint: {MANIFEST} changed, its checksum too", f"exit {done.returncode}: {lines[-1]}",
              "rollback refused, exit 1, one line", holds)  # fmt: skip


def _refused(world: World, what: str, reason: str, send: Callable[[], Any]) -> Row:
    """Counted under its reason, said in the log; the version served stays, and nothing is missing."""
    before = refusals(world)[reason]
    with _said() as said:
        send()
        until(lambda: refusals(world)[reason] > before, 30)
    holds = world.replica.held == (1, 1) and not world.replica.holder.behind and bool(said)
    return Row(what, f"refused, counted as {reason}, {len(said)} lines in the log; 1.1 is served",
               "refused, counted, in the log; the last good version is served", holds)  # fmt: skip


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("headrace")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
