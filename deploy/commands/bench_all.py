"""headrace bench all and headrace bench check: what is done with all benchmarks together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.common import BootstrapOption, JsonOption, Output, progress, say

if TYPE_CHECKING:
    from deploy.bench.suite import Bench

QUICK_OUT = Path(".headrace/benchmarks")


def register(app: typer.Typer) -> None:
    """Adds them to `headrace bench`."""
    app.command("all", epilog="Example: headrace bench all --only join --only train --out docs")(every)
    app.command(epilog="Example: headrace bench check, or after a change that is wanted: headrace bench check --keep")(
        check
    )


def every(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: minutes instead of an hour.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="These; may be repeated.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For all that is written. [docs; with --quick .headrace/benchmarks]",
                     show_default=False),
    ] = None,
    bootstrap: BootstrapOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """All benchmarks, one after the other, and their figures as Markdown, JSON and plots. Exit 1 if one fails.

    In benchmarks.md only the blocks between `<!-- figures NAME -->` and `<!-- end -->` are written; each as soon as it
    is there. Without --bootstrap each that needs Kafka starts an embedded broker, and removes it.
    """
    with Output(json) as stdout:
        from deploy.bench.common import BenchError
        from deploy.bench.every import bench_all, chosen

        benches = chosen(only or [], quick)
        folder = out or (QUICK_OUT if quick else Path("docs"))
        with progress("benchmarks", len(benches)) as (bar, task):

            def begins(bench: Bench) -> None:
                bar.update(task, said=bench.name)

            def ended(bench: Bench, seconds: float, why: str) -> None:
                bar.advance(task)
                say(f"{bench.name}: {why or 'done'} ({seconds:.0f} s)")

            found = bench_all(benches, folder, quick, bootstrap, begins, ended)
        failed = found["failed"]
        stdout.result(
            {**found, "out": str(folder)}, f"written to {folder / 'benchmarks.md'}" if found["benchmarks"] else None
        )
        if failed:
            why = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            raise BenchError(f"{len(failed)} of {len(benches)} benchmarks failed, and have no new figures: {why}")


def check(
    keep: Annotated[
        bool, typer.Option("--keep", help="The ratios are as wanted: keep them, medians of 5 runs.")
    ] = False,
    kept: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The kept ratios. [those of this version]", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Ratios to the references, beside those that were kept. Exit 1 if one has become worse, a line for each.

    Never times: what is slower here and now is slower for the reference too. A benchmark that seems worse is measured
    again, five times at most, and the best counts. Ratios differ between kinds of machines: keep your own with --kept.
    """
    with Output(json) as out:
        from deploy.bench import check as checks
        from deploy.bench.common import BenchError

        file = kept or checks.KEPT
        before = {} if keep else checks.kept_in(file)
        with progress("bench check", len(checks.CHECKED)) as (bar, task):

            def ran(bench: Bench, run: int) -> None:
                bar.update(task, said=bench.name, advance=1 if run == 1 else 0)
                say(f"{bench.name}: run {run}")

            if keep:
                told = checks.keep(file, checks.CHECKED, ran=ran)
                out.result(told, f"{len(told['ratios'])} ratios are kept in {file}")
                return
            ratios = checks.check(before, checks.CHECKED, ran=ran)
        worse = [ratio for ratio in ratios if ratio.worse]
        out.result(
            checks.as_json(ratios), f"{len(ratios) - len(worse)} of {len(ratios)} ratios are as good as the kept ones"
        )
        for ratio in worse:
            say(ratio.line())
        if worse:
            raise BenchError(f"{len(worse)} ratios are worse than the kept ones ({file}); if that is wanted, --keep")
