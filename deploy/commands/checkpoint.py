"""headrace checkpoint list | verify | keep | export | rollback: the train worker's store and what is kept of it."""

from __future__ import annotations

import contextlib
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.common import ConfigOption, DataDirOption, JsonOption, Output, progress, say, settings_for
from embedding_store.errors import StoreError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.kept import KeptCheckpoints
    from streams.settings import TrainWorkerSettings

app = typer.Typer(help="Look after the train worker's store and the checkpoints that are kept of it.")
VersionOption = Annotated[
    str | None,
    typer.Option("--version", metavar="EPOCH.SEQUENCE", help="A kept checkpoint, as `list` names it.",
                 show_default=False),
]  # fmt: skip
LIVE, KEPT = "store", "kept"
TRIES = 5  # to open a store that is in use


@app.command("list", epilog="Example: headrace checkpoint list --json")
def list_(config: ConfigOption = None, data_dir: DataDirOption = None, json: JsonOption = False) -> None:
    """The store and the kept checkpoints: versions, times, rows.

    Reads all rows of a store that no worker has open; of one that is in use it says what its last commit says.
    """
    settings, kept = _opened(config, data_dir)
    with Output(json) as output, progress("reading the store"):
        versions = _live(settings.store) + _kept(kept)
        if not versions:
            raise _nothing(settings, kept)
        digest = next((v["digest"] for v in versions if v["digest"]), None)
        output.result({"versions": versions, "digest": digest, "ok": True}, _table(versions))


@app.command(epilog="Example: headrace checkpoint verify --json")
def verify(
    version: VersionOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    json: JsonOption = False,
) -> None:
    """Read everything and compare checksums; exit 1 names what is damaged.

    With --version only that kept checkpoint; else the store (where no worker has it open) and all that are kept.
    """
    settings, kept = _opened(config, data_dir)
    with Output(json) as output, progress("comparing checksums"):
        versions, damages = _verified_store(settings.store) if version is None else ([], [])
        for manifest in [kept.find(place_of(version))] if version else list(kept.newest_first()):
            wrong = kept.damages(manifest)
            versions.append({**manifest.about, "where": KEPT, "ok": not wrong})
            damages += wrong
        damages += kept.damaged_manifests() if version is None else []
        if not (versions or damages):
            raise _nothing(settings, kept)
        sound = [v for v in versions if v["ok"]]
        digest = next((v["digest"] for v in sound if v["digest"]), None)
        text = "\n".join(f"{v['where']} {v['version']}: {'sound' if v['ok'] else 'damaged'}" for v in versions)
        output.result({"versions": versions, "digest": digest, "ok": not damages, "damages": damages}, text)
    for damage in damages:
        say(f"headrace: {damage}: use another version (`headrace checkpoint list`), or delete it")
    if damages:
        raise typer.Exit(1)


@app.command(epilog="Example: headrace checkpoint keep --data-dir state")
def keep(config: ConfigOption = None, data_dir: DataDirOption = None, json: JsonOption = False) -> None:
    """Keep the store as it is now, before an upgrade or a move.

    As the train worker does every hour, into [train] checkpoints; the oldest beyond checkpoints_kept goes. The train
    worker must be stopped.
    """
    settings, kept = _opened(config, data_dir)
    from embedding_store.checkpoint import CheckpointStore
    from online_model.checkpoints import describe

    if not (settings.store / "CURRENT").exists():
        raise StoreError(f"there is no store at {settings.store}: name the data directory of a train worker")
    with Output(json) as output, progress("keeping the store"):
        with CheckpointStore(settings.store, None) as store:
            about = describe(store)
            kept.keep(store, describe, settings.checkpoints_kept)
        result = {"versions": [about], "digest": about["digest"], "ok": True, "kept_in": kept.url}
        output.result(result, f"version {about['version']} is kept in {kept.url}")


@app.command(epilog="Example: headrace checkpoint export --out model --version 1.450")
def export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new directory.")],
    version: VersionOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    json: JsonOption = False,
) -> None:
    """Tables and weights as safetensors, ids as Parquet: readable without Headrace.

    Of the store as it is (no worker may have it open), or of a kept checkpoint.
    """
    settings, kept = _opened(config, data_dir)
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.export import export_store
    from embedding_store.rocks import in_use
    from online_model.checkpoints import describe

    if out.exists():
        raise UsageError(f"{out} exists already: name a new directory with --out")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        Output(json) as output,
        progress("exporting"),
        tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".export-") as folder,
    ):
        path = settings.store
        if version is not None:
            path = Path(folder) / "store"
            kept.fetch(kept.find(place_of(version)), path)
        elif in_use(path):
            raise StoreError(f"a worker has the store {path} open: stop it, or name a kept one with --version")
        with CheckpointStore(path, None, read_only=True) as store:
            about = describe(store)
            files = export_store(store, out, about)
        result = {"versions": [about], "digest": about["digest"], "ok": True, "out": str(out), "files": files}
        output.result(result, f"version {about['version']} is in {out}: {', '.join(files)}")


@app.command(epilog="Example: headrace checkpoint rollback --version 1.450")
def rollback(
    version: VersionOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    json: JsonOption = False,
) -> None:
    """Take back what was learned since a kept checkpoint.

    The newest one, or that of --version. The train worker must be stopped; started again it goes on where the input
    is, so what is taken back is not learned again. Replicas load a snapshot. It also brings back a store that is lost
    or damaged: what came after the checkpoint is then learned again.
    """
    settings, kept = _opened(config, data_dir)
    from online_model.checkpoints import roll_back

    with Output(json) as output, progress("rolling back"):
        done = roll_back(settings.store, kept, place_of(version))
        text = f"the store is at version {done['version']}, with the model of {done['from']}; " + (
            "what came after it is learned again" if done["restored"] else f"{done['set_aside_rows']:,} rows set aside"
        )
        output.result({"versions": [done["version"]], "ok": True, **done}, f"{text}. Start the train worker.")


def _opened(config: Path | None, data_dir: Path | None) -> tuple[TrainWorkerSettings, KeptCheckpoints]:
    settings = settings_for(config, data_dir=data_dir).train
    from embedding_store.kept import KeptCheckpoints

    return settings, KeptCheckpoints(settings.checkpoints_url, settings.signer)


def _nothing(settings: TrainWorkerSettings, kept: KeptCheckpoints) -> StoreError:
    return StoreError(
        f"there is no store at {settings.store} and nothing is kept in {kept.url}: name the data directory of a train "
        "worker with --data-dir"
    )


def _live(path: Path) -> list[dict[str, Any]]:
    """The store: none, or what its last commit is."""
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.rocks import in_use
    from online_model.checkpoints import about, describe

    if not (path / "CURRENT").exists():
        return []
    used = in_use(path)
    with _open_beside(path) if used else CheckpointStore(path, None, read_only=True) as store:
        head = store.head()
        if head is None:
            return []
        told = about(head) | {"rows": None, "digest": None} if used else describe(store)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return [{"where": LIVE, **told, "bytes": size, "in_use": used}]


def _open_beside(path: Path) -> CheckpointStore:
    """A store that a worker has open. While it is being opened the worker may put other files in place: then again."""
    from embedding_store.checkpoint import CheckpointStore

    for _ in range(TRIES - 1):
        with contextlib.suppress(StoreError):
            return CheckpointStore(path, None, read_only=True)
    return CheckpointStore(path, None, read_only=True)


def _kept(kept: KeptCheckpoints) -> list[dict[str, Any]]:
    return [
        {"where": KEPT, **m.about, "bytes": sum(file.size for file in m.files), "kept_ms": m.made_ms}
        for m in kept.newest_first()
    ]


def _verified_store(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(the store as a version, what is wrong with it)"""
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.rocks import in_use
    from online_model.checkpoints import describe

    if not path.exists():
        return [], []
    if in_use(path):
        say(f"headrace: a worker has the store {path} open: it is left out; stop the worker to verify it")
        return [], []
    try:
        with CheckpointStore(path, None, read_only=True, strict=True) as store:
            store.scan()
            return [{**describe(store), "where": LIVE, "ok": True}], []
    except StoreError as error:
        unknown = {"version": "?", "digest": None, "where": LIVE, "ok": False}
        return [unknown], [str(error)]


def place_of(version: str | None, option: str = "--version") -> tuple[int, int] | None:
    """(epoch, sequence) of "1.450". Raises UsageError."""
    if version is None:
        return None
    epoch, _, sequence = version.partition(".")
    if not (epoch.isdecimal() and sequence.isdecimal()):
        raise UsageError(f"{option} {version}: versions are named EPOCH.SEQUENCE, see `headrace checkpoint list`")
    return int(epoch), int(sequence)


def _table(versions: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("", "version", "newest event", "made", "rows", "MB", "settings", box=None, pad_edge=False)
    for v in versions:
        rows = ", ".join(f"{name} {count:,}" for name, count in v["rows"].items()) if v["rows"] else "in use"
        table.add_row(
            v["where"], v["version"], _time(v["event_time_ms"]), _time(v["created_ms"]), rows,
            f"{v['bytes'] / 1e6:,.1f}", v["settings"],
        )  # fmt: skip
    return table


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S") if ms else "–"
