"""headrace estimate: what a policy would have earned that was never served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deploy.commands.common import ConfigOption, DataDirOption, JsonOption, Output, progress, settings_for
from deploy.commands.compare import SIMULATED
from embedding_store.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace estimate openbandit random_men.csv.gz --policy popular")(estimate)


def estimate(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Format of the log, as openbandit; or simulated.")
    ] = None,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="The log: a path or a URL. [log.path]")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    policy: Annotated[
        str, typer.Option(metavar="P", help="logged, uniform, popular, served (with --served), or headrace.")
    ] = "logged",
    served: Annotated[
        str | None, typer.Option(metavar="FILE", help="Another log of this format: judge the policy that served it.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=0, max=1, help="The best item but for this share, which goes to all alike.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.001, help="Items in proportion to score^(1/temperature). [1]")
    ] = None,
    reward: Annotated[
        Literal["click", "watch", "purchase"], typer.Option(help="Of an item shown; watch: seconds of play.")
    ] = "click",
    split: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.95, help="Share that a policy learns from, before what is judged. [0.5 if it learns]"
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(min=1, help="No weight above this. Biased: intervals do not know of it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of headrace's first weights. [0]")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The report. [DATA_DIR/estimate.html]")
    ] = None,
    json: JsonOption = False,
) -> None:
    """What a policy would have earned that was never served, from a log with propensities; or why the log cannot say.

    Four estimators, with 95 % intervals. The policy is fixed before the decisions that it is judged on.
    """
    if epsilon is not None and temperature is not None:
        raise UsageError("either --epsilon or --temperature says how items are chosen, not both")
    log_format = "events" if name == SIMULATED else name
    settings = settings_for(
        config, data_dir=data_dir, log__format=log_format, log__path=file, model__seed=seed, model__ranker__seed=seed
    )
    if not settings.log.format or not settings.log.path:
        raise UsageError("which log? headrace estimate NAME FILE, or [log] format and path in the settings")
    from replay.off_policy.estimate import EstimateSettings
    from replay.off_policy.estimate import estimate as estimated
    from replay.off_policy.policies import Choice
    from replay.off_policy.report import write
    from replay.readers import open_log

    def opened(path: str) -> Any:
        return open_log(settings.log.format, path, settings.log.max_rejected_share, settings.log.columns)

    wanted = EstimateSettings(
        policy, settings.join.join, settings.model, reward, Choice(temperature or 1.0, epsilon), split, clip,
        None if served is None else opened(served), settings.topics.partitions,
    )  # fmt: skip
    log = opened(settings.log.path)
    with Output(json) as output:
        with progress(f"estimating on {log.name}", 1.0) as (bar, task):
            found = estimated(log, wanted, lambda what, share: bar.update(task, description=what, completed=share))
        path = report or settings.data_dir / "estimate.html"
        write(found, path)
        output.result(found | {"report": str(path)}, _text(found, path))


def _text(found: dict[str, Any], path: Path) -> str:
    from replay.off_policy.report import verdict

    lines = [f"{'':8}{'value':>10}{'low':>10}{'high':>10}{'ESS':>10}"]
    lines.append(f"{'logged':8}" + "".join(_cell(found["logged"][key]) for key in ("value", "low", "high")))
    for name, one in found["estimates"].items():
        cells = "".join(_cell(one[key]) for key in ("value", "low", "high"))
        ess = f"{'-' if one['ess'] is None else format(one['ess'], ',.0f'):>10}"
        lines.append(f"{name:8}{cells}{ess}" + (f"  not estimable: {one['why']}" if one["why"] else ""))
    return "\n".join([*lines, verdict(found), str(path)])


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.5f}':>10}"
