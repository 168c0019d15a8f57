"""A running demo under a real Prometheus: things go wrong in it, alerts fire; things are put right, they clear.

    stopped trainer   SIGSTOP of the train worker                        target-down, freshness-stalled
    dead replica      SIGKILL of the replica, which the demo starts anew  target-down
    poisoned model    a crowd that clicks on all it is shown              guard-tripped
    garbage           records that are no events                          dead-letters

The rules are those that users get, with all windows and durations divided by 60 (`SCALE`); bounds are not scaled.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kafka import KafkaProducer

from deploy.dashboards.alerts import ALERTS
from deploy.dashboards.files import RULES, build
from deploy.dashboards.validate import Report, validate
from streams.events import Click, Event, Impression, encode
from tests.deploy.dashboards.prometheus import Prometheus, prometheus
from tests.end_to_end.demos import Demo, demo

SCALE = 1 / 60
ANSWERS_S = 180  # until every series is there
WINDOW_S, RATE = 60, "20s"  # looked back; for $__rate_interval
FIRES_S, CLEARS_S = 120, 240  # at most; a machine that others use takes its time
CROWD_PER_S = 200
SETTINGS = """
[model.guard]
examples = 400
min_calibration = 0.6
max_calibration = 1.7
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
    """The demo and the Prometheus that scrapes it."""

    demo: Demo
    prometheus: Prometheus
    told: list[Told] = field(default_factory=list)

    def firing(self, alert: str, **labels: str) -> list[dict]:
        return self.prometheus.firing(TITLES[alert], **labels)

    def value(self, promql: str) -> float:
        """Of an expression with one series; 0 without."""
        result = self.prometheus.ask("query", query=promql)["result"]
        return float(result[0]["value"][1]) if result else 0.0

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
            self._until(False, alert, labels, CLEARS_S, f"after {cause}")
            self.told.append(Told(alert, cause, fired[alert], time.monotonic() - ended, summaries[alert]))

    def _until(self, fires: bool, alert: str, labels: dict[str, str], timeout_s: float, when: str) -> None:
        what = f"{alert} {'fires' if fires else 'is quiet'}, {when}"
        self.prometheus.until(lambda: bool(self.firing(alert, **labels)) == fires, timeout_s, what)


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """A demo that learns, scraped once a second, with our rules."""
    folder.mkdir(exist_ok=True)
    config = folder / "headrace.toml"
    config.write_text(SETTINGS)
    build(folder / "rules", scale=SCALE)
    home = folder / "demo"
    arguments = ("--config", config, "--seconds", 0, "--rate", 200, "--no-page")
    with demo(home, *arguments) as running, prometheus(
        folder / "prometheus", home / "targets.json", [folder / "rules" / RULES]
    ) as server:
        found = Watched(running, server)
        server.until(lambda: found.value("headrace_train_rows_total") > 1_000, 180, "the demo learns")
        yield found


def answered(found: Watched) -> Report:
    """What `validate` says once every query has an answer, or after ANSWERS_S."""
    def asked() -> Report:
        return validate(found.prometheus.url, WINDOW_S, RATE)

    end = time.monotonic() + ANSWERS_S
    while (report := asked()).empty and time.monotonic() < end:
        time.sleep(1)  # the next scrape
    return report


def story(found: Watched) -> list[Told]:
    """All of it, one after the other."""
    found.caused("the train worker is stopped",
                 {"target-down": {"job": "train"}, "freshness-stalled": {}}, stopped(found, "train"))  # fmt: skip
    found.caused("the replica is killed", {"target-down": {"job": "serve"}}, killed(found, "serve"))
    found.caused("records that are no events", {"dead-letters": {}}, sent(found, lambda n, now: [b"{"]))
    found.caused("a crowd that clicks on everything", {"guard-tripped": {}}, sent(found, clicked))
    return found.told


@contextmanager
def stopped(found: Watched, worker: str) -> Iterator[None]:
    """The worker does not move."""
    process = found.demo.until(lambda: found.demo.worker(worker))
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def killed(found: Watched, worker: str) -> Iterator[None]:
    """The worker dies; the demo starts another, which takes some seconds."""
    found.demo.kill(worker)
    yield


@contextmanager
def sent(found: Watched, records: Callable[[int, int], list[bytes]]) -> Iterator[None]:
    """Into `events`, CROWD_PER_S times a second: what `records` makes of a number and the time (ms UTC)."""
    settings, ended = found.demo.settings, threading.Event()
    topic, partitions = settings["topics"]["prefix"] + "events", settings["topics"]["partitions"]
    producer = KafkaProducer(bootstrap_servers=settings["bootstrap"])

    def send() -> None:
        n = 0
        while not ended.wait(0.1):
            for _ in range(CROWD_PER_S // 10):
                for value in records(n, time.time_ns() // 1_000_000):
                    producer.send(topic, value, partition=n % partitions)
                n += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        producer.close()


def clicked(n: int, now: int) -> list[bytes]:
    """What somebody is shown, and the click on it."""
    shown = {"user": f"crowd-{n % 400}", "request_id": f"crowd-{n}"}
    events: list[Event] = [
        Impression(event_id=f"crowd-{n}-shown", ts=now, items=[n % 50], **shown),
        Click(event_id=f"crowd-{n}-click", ts=now, item=n % 50, **shown),
    ]
    return [encode(event) for event in events]
