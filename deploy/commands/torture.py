"""headrace torture: what the promises are worth."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from deploy.commands.common import ConfigOption, DataDirOption, JsonOption, Output, say, settings_for
from deploy.torture import WRONG
from embedding_store.errors import HeadraceError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace torture --kills 50 --seed 1")(torture)


def torture(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    kills: Annotated[int, typer.Option(min=0, help="How often a worker is killed (kill -9).")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the log and the faults.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, max=8, help="Of the train worker; of several, some are lost.")] = 2,
    json: JsonOption = False,
) -> None:
    """Real workers under a real broker, killed and hurt at random moments, on a disk that is slow, full or damaged.

    The same log goes through twice, once undisturbed. Exit 1 if anything was lost, doubled, torn, or learned otherwise,
    or if damage was not noticed.
    """
    home = settings_for(config, data_dir=data_dir).data_dir / "torture"
    with Output(json) as out:
        import logging

        from deploy.processes import alone
        from deploy.torture.run import Torture
        from deploy.workers import WorkerFailed

        again = f"headrace torture --kills {kills} --seed {seed} --ranks {ranks}"
        for client in ("aiokafka", "kafka"):
            logging.getLogger(client).setLevel(logging.CRITICAL)  # the broker is to be away
        with alone(home.parent / "torture.lock", "torture", "wait for it"):
            try:
                result = Torture(kills, seed, home, _at, ranks=ranks).run()
            except WorkerFailed as error:
                raise HeadraceError(f"{error}; keep a copy of {home}, and run it again with `{again}`") from error
        out.result(result, _text(result))
    if not _holds(result):
        raise HeadraceError(f"a promise does not hold: keep a copy of {home}, and run it again with `{again}`")


def _at(line: str) -> None:
    """With the time, as the workers' own logs have it."""
    say(f"{time.strftime('%H:%M:%S')} {line}")


def _holds(result: dict) -> bool:
    calm, looked = result["calm"], bool(result["answers"] and result["versions_checked"])
    return looked and result["digest_equal"] and not any(result[name] for name in WRONG) and not any(calm.values())


def _text(result: dict) -> str:
    return "\n".join((
        f"{result['kills']} kills, faults: {result['faults']}",
        f"{result['events']:,} events, {result['examples']:,} examples: {result['lost']} lost,"
        f" {result['duplicated']} trained twice, {result['left_out']} left out for their loss",
        f"{result['answers']:,} answers of replicas, {result['answers_compared']:,} of them"
        f" and {result['versions_checked']} versions checked:"
        f" {result['replica_torn_reads']} torn, {result['missing_versions']} versions missing,"
        f" {result['differing_rows']} rows unlike the trainer's",
        f"{result['damages']['files']} files damaged: {result['damages']['refused']} refused,"
        f" {result['undetected_damage']} not detected",
        f"checkpoint {result['digest']}: {'as' if result['digest_equal'] else 'NOT as'} in the undisturbed run",
    ))  # fmt: skip
