"""The `headrace` command: reads settings, calls the owner of the work, prints its result.

Exit 0: done. 1: failed, one line on stderr says what to do. 2: wrong usage or settings, one line. 130: Ctrl-C.
Nothing that is slow to import (torch, Kafka clients, the readers) is imported before a command needs it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from deploy.commands import (
    backfill,
    bench,
    broker,
    checkpoint,
    compare,
    dashboards,
    demo,
    doctor,
    estimate,
    init,
    log,
    monitor,
    record,
    replay,
    simulate,
    topics,
    torture,
    workers,
)
from embedding_store.errors import HeadraceError, UsageError

STOPPED = 130  # the exit code of a command that Ctrl-C ended
app = typer.Typer(
    name="headrace",
    help="A recommender that learns from its users while they are looking.",
    epilog="Example: headrace demo --seconds 60. With --debug, an error of any command shows its traceback.",
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes 0.3 s to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (doctor, demo, monitor, workers, init, record, replay, backfill, simulate, compare, estimate, torture):
    part.register(app)
app.add_typer(log.app, name="log")
app.add_typer(bench.app, name="bench")
app.add_typer(broker.app, name="broker")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(topics.app, name="topics")
app.add_typer(dashboards.app, name="dashboards")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given:
        given.remove("--debug")
        os.environ["HEADRACE_DEBUG"] = "1"  # the workers of a demo inherit it
    sys.exit(run(given))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are on stderr by then."""
    debug = os.environ.get("HEADRACE_DEBUG", "") not in ("", "0")
    try:
        code = app(args=list(arguments), prog_name="headrace", standalone_mode=False)
        if code == STOPPED:  # typer turned a Ctrl-C into it
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:  # the parser's own: an unknown option, a missing argument
        return _fail(error.format_message().rstrip(".") + f"; see `{_command(arguments)} --help`", error.exit_code)
    except HeadraceError as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", STOPPED)
    except Exception as error:  # noqa: BLE001 - the last line of defence: users never see a traceback they did not ask for
        if debug:
            traceback.print_exc()
            return 1
        return _fail(f"{type(error).__name__}: {error} (not foreseen; with --debug you see where)", 1)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split("\n"))
    sys.stderr.write(f"headrace: {line}\n")
    return code


def _command(arguments: Sequence[str]) -> str:
    """`headrace broker start` of what was typed, as far as it names commands."""
    words = ["headrace"]
    group: object = typer.main.get_command(app)
    for argument in arguments:
        group = getattr(group, "commands", {}).get(argument)
        if group is None:
            break
        words.append(argument)
    return " ".join(words)


if __name__ == "__main__":
    main()
