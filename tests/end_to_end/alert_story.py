"""A running demo under a real Prometheus: things go wrong in it, alerts fire; things are put right, they clear.

`CHAPTERS` and `OF_RANKS` say what goes wrong and which alerts that causes, all that there are; alert_causes.py how it
is done. `OF_RANKS` needs a demo of its own with two ranks, which two cores cannot keep as fresh as the others want it.

The rules are those that users get, with all windows and durations divided by 60 (`SCALE`). Bounds are not scaled, but
for that of `snapshot-old`, with the interval that it is twice of. The windows of `freshness-burn-slow` are divided by
360 (`DAYS_SCALE`): they are of days, and what the test does to freshness would be in them to its end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import yaml

from deploy.dashboards.alerts import ALERTS, Alert, rule_file
from deploy.dashboards.objectives import CALIBRATION, SNAPSHOT_AGE
from deploy.dashboards.validate import Report, validate
from deploy.torture.disk import Disk, unmount
from tests.deploy.dashboards.prometheus import Prometheus, prometheus
from tests.end_to_end import alert_causes as wrong
from tests.end_to_end.demos import Demo, demo

SCALE, DAYS_SCALE = 1 / 60, 1 / 360
DAYS = "freshness-burn-slow"
EVENTS_PER_S = 150
SETTLED, SETTLES_S = 0.9 * (CALIBRATION.high or 0), 300
ANSWERS_S = 180  # until every series is there
WINDOW_S, RATE = 60, "20s"  # looked back; for $__rate_interval
FIRES_S, CLEARS_S = 240, 300  # at most; a machine that others use takes its time
TARGETS = 4  # join, train, serve and the demo itself
QUIET_S = 20  # without any alert, before and after all that goes wrong
ROOM = 64 << 30  # bytes; of the demo's disk, where we may mount one: it takes memory for what is in it only
ON_DISK = {"disk-low", "disk-filling"}
# One partition: each has transactions of its own, and of four Kafka alone has more of two cores than the replica.
SETTINGS = f"""
[topics]
partitions = 1

[model]
window = 10000

[model.guard]
examples = 400
min_calibration = 0.4

[train]
ranks = {{ranks}}
snapshot_interval_s = {900 * SCALE:g}
"""
TITLES = {alert.name: alert.title for alert in ALERTS}


@dataclass(frozen=True)
class Told:
    """One alert that was caused: how long it took, seconds. `summary` is as somebody who is woken reads it."""

    alert: str
    cause: str
    fired_s: float
    cleared_s: float
    summary: str


@dataclass
class Watched:
    """The demo, the Prometheus that scrapes it, and the disk that it is on."""

    demo: Demo
    prometheus: Prometheus
    disk: Disk
    told: list[Told] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # what was to happen and did not

    def firing(self, alert: str, **labels: str) -> list[dict]:
        return self.prometheus.firing(TITLES[alert], **labels)

    def value(self, promql: str) -> float:
        """Of an expression with one series; 0 without."""
        result = self.prometheus.ask("query", query=promql)["result"]
        return float(result[0]["value"][1]) if result else 0.0

    def settled(self) -> bool:
        """Whether clicks are as often as the model says, nearly: a new one has to learn that first."""
        return 0 < self.value('headrace_train_calibration{scenario="all", task="click"}') < SETTLED

    def quiet(self) -> None:
        """No alert whatever for QUIET_S."""
        fired = f'count_over_time(ALERTS{{alertstate="firing"}}[{QUIET_S}s])'
        asked = lambda: self.prometheus.ask("query", query=fired)["result"]  # noqa: E731
        time.sleep(QUIET_S)  # so long there must have been none
        try:
            self.prometheus.until(lambda: not asked(), CLEARS_S, f"no alert fires for {QUIET_S} s")
        except AssertionError as error:
            names = sorted({one["metric"]["alertname"] for one in asked()})
            raise AssertionError(f"{error}: {', '.join(names)}") from None

    def caused(self, cause: str, alerts: dict[str, dict[str, str]], under: contextlib.AbstractContextManager) -> None:
        """All `alerts` (with labels) are quiet, fire while `under` lasts, and are quiet again after it."""
        fired, summaries = {}, {}
        for alert, labels in alerts.items():
            self._until(False, alert, labels, CLEARS_S, f"before {cause}")
        begun = time.monotonic()
        with under:
            for alert, labels in alerts.items():
                self._until(True, alert, labels, FIRES_S, cause)
                fired[alert] = time.monotonic() - begun
                summaries[alert] = self.firing(alert, **labels)[0]["annotations"]["summary"]
        ended = time.monotonic()
        for alert, labels in alerts.items():
            what = f"{alert} is quiet and all processes answer, after {cause}"
            self.prometheus.until(partial(self._over, alert, labels), CLEARS_S, what)
            self.told.append(Told(alert, cause, fired[alert], time.monotonic() - ended, summaries[alert]))

    def _over(self, alert: str, labels: dict[str, str]) -> bool:
        """Whether its expression gives nothing though there is everything that it asks of: where a process is being
        started again there are no series, and what is only pending would fire later."""
        wanted = {"alertname": TITLES[alert], **labels}.items()
        left = [one for one in self.prometheus.ask("alerts")["alerts"] if one["labels"].items() >= wanted]
        return not left and self.value("count(up == 1)") == TARGETS

    def _until(self, fires: bool, alert: str, labels: dict[str, str], timeout_s: float, when: str) -> None:
        what = f"{alert} {'fires' if fires else 'is quiet'}, {when}"
        self.prometheus.until(lambda: bool(self.firing(alert, **labels)) == fires, timeout_s, what)


@contextmanager
def watched(folder: Path, ranks: int = 1) -> Iterator[Watched]:
    """A demo that learns, scraped once a second, with our rules."""
    folder.mkdir(exist_ok=True)
    config, home = folder / "headrace.toml", folder / "demo"
    config.write_text(SETTINGS.format(ranks=ranks))
    home.mkdir()
    disk = Disk(home, room=ROOM)
    disk.mount()
    arguments = ("--config", config, "--seconds", 0, "--rate", EVENTS_PER_S, "--no-page")
    try:
        with (
            demo(home, *arguments) as running,
            prometheus(folder / "prometheus", home / "targets.json", _rules(folder)) as server,
        ):
            found = Watched(running, server, disk)
            server.until(lambda: found.value("headrace_train_rows_total") > 1_000, 180, "the demo learns")
            server.until(found.settled, SETTLES_S, "its clicks are as often as it says")
            yield found
    finally:
        unmount(home)


def _rules(folder: Path) -> list[Path]:
    """Our rules as files, one for each scale."""
    bound = f"> {SNAPSHOT_AGE.high:g}"

    def fitted(alert: Alert) -> Alert:
        assert (bound in alert.expr) == (alert.name == "snapshot-old")
        return replace(alert, expr=alert.expr.replace(bound, f"> {(SNAPSHOT_AGE.high or 0) * SCALE:g}"))

    files = []
    for scale in (SCALE, DAYS_SCALE):
        files.append(folder / f"{len(files)}.rules.yml")
        chosen = [fitted(alert) for alert in ALERTS if (alert.name == DAYS) == (scale == DAYS_SCALE)]
        files[-1].write_text(yaml.safe_dump(rule_file(chosen, scale)), "utf-8")
    return files


def answered(found: Watched) -> Report:
    """What `validate` says once every query has an answer, or after ANSWERS_S."""

    def asked() -> Report:
        return validate(found.prometheus.url, WINDOW_S, RATE)

    end = time.monotonic() + ANSWERS_S
    while (report := asked()).empty and time.monotonic() < end:
        time.sleep(1)  # the next scrape
    return report


def possible(found: Watched) -> set[str]:
    """The alerts that are caused: all, but those of a disk where none may be mounted."""
    return {alert.name for alert in ALERTS} - (set() if found.disk.mounted else ON_DISK)


def story(found: Watched, chapters: Sequence[Sequence[Callable[[Watched], None]]]) -> list[Told]:
    """All of it: one after the other, or at the same time where one does not touch the other. What fails is noted, and
    the rest goes on."""
    with ThreadPoolExecutor() as threads:
        for chapter in chapters:
            for under_way in [threads.submit(part, found) for part in chapter]:
                try:
                    under_way.result()
                except AssertionError as error:
                    found.failed.append(str(error).splitlines()[0])
    return found.told


def _stopped_trainer(found: Watched) -> None:
    found.caused("the train worker stands still",
                 {"target-down": {"job": "train"}, "freshness-stalled": {}},
                 wrong.stopped_worker(found.demo, "train"))  # fmt: skip


def _slow_trainer(found: Watched) -> None:
    found.caused("the train worker stands still most of the time",
                 {"freshness-burn-fast": {}, "freshness-burn-slow": {}}, wrong.slowed(found.demo, "train"))  # fmt: skip


def _killed_replica(found: Watched) -> None:
    found.caused("the replica is killed", {"target-down": {"job": "serve"}}, wrong.killed(found.demo, "serve"))


def _no_snapshots(found: Watched) -> None:
    found.caused("the place of snapshots is away, and Kafka has deleted versions that the replica had not read",
                 {"snapshot-old": {}, "replica-stale": {"job": "serve"}},
                 wrong.at_once(wrong.snapshots_away(found.demo), wrong.lost_versions(found.demo)))  # fmt: skip


def _no_time(found: Watched) -> None:
    found.caused("the process that sends probes stands still, and a source sends whose clock does",
                 {"probes-missing": {}, "watermark-stalled": {"partition": "0"}},
                 wrong.clock_stands_still(found.demo))  # fmt: skip


def _flood(found: Watched) -> None:
    found.caused("a source sends a large page again and again", {"join-lag-growing": {}}, wrong.flooded(found.demo))


def _stopped_rank(found: Watched) -> None:
    found.caused("the second rank of the train worker stands still",
                 {"checkpoint-old": {}, "train-lag-growing": {}}, wrong.stopped_rank(found.demo))  # fmt: skip


def _full_disk(found: Watched) -> None:
    if found.disk.mounted:
        found.caused("the disk becomes full", {"disk-low": {}, "disk-filling": {}}, wrong.filling(found.disk))


def _garbage(found: Watched) -> None:
    found.caused("records that are no events", {"dead-letters": {}}, wrong.sent(found.demo, lambda n, now: [b"{"]))


def _overload(found: Watched) -> None:
    found.caused("more clients than may wait", {"serve-errors": {}, "serve-slow": {}}, wrong.overloaded(found.demo))


def _crowd(found: Watched) -> None:
    found.caused("a crowd that clicks on everything", {"guard-tripped": {}}, wrong.sent(found.demo, wrong.clicked))


def _not_learning(found: Watched) -> None:
    crowd = wrong.sent(found.demo, wrong.clicked_new, wrong.NEW_PER_S)
    found.caused("a crowd that clicks on everything, all of it new, while learning rates are far too small",
                 {"calibration-off": {"task": "click"}},
                 wrong.at_once(wrong.not_learning(found.demo), crowd))  # fmt: skip


CHAPTERS = (
    [Watched.quiet],
    [_stopped_trainer], [_killed_replica], [_slow_trainer], [_no_time], [_no_snapshots], [_flood, _full_disk],
    [_garbage, _overload], [_not_learning], [_crowd],  # in this order: what a crowd is like must not be known yet
    [Watched.quiet],
)  # fmt: skip
OF_RANKS = ([_stopped_rank],)
