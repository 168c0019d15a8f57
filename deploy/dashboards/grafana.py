"""Dashboards and alerts onto a Grafana server: what would change, and doing it.

    data source → folder → dashboards → alert rules → their group's interval → rules that are no longer ours

In this order, since each needs those before it. What is there already, and equal, is left alone; what somebody edited
by hand is put back. Only what has our uids is touched, and, in our rule group, rules that we no longer have.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deploy.dashboards.addresses import checked
from deploy.dashboards.alerts import ALERTS, EVERY_S, FOLDER_UID, GROUP, RUNBOOKS, grafana_rules
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.panels import SOURCE_UID, grafana_json
from embedding_store.errors import HeadraceError

if TYPE_CHECKING:
    from grafana_client import GrafanaApi

MESSAGE = "headrace dashboards push"
TIMEOUT_S = 10
NOT_FOUND = 404
SERVERS_OWN = {"id", "version", "updated", "provenance", "guid"}  # what the server alone says of a thing
Action = Literal["create", "change", "remove", "none"]


@dataclass(frozen=True)
class Change:
    """One thing on the server: what is to be done with it, and the difference as a unified diff ("" for none)."""

    kind: str
    uid: str
    action: Action
    diff: str
    apply: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.action:6} {self.kind} {self.uid}"


@dataclass(frozen=True)
class _Thing:
    """One thing that must be on the server. `read` gives it as it is there, None if it is not."""

    kind: str
    uid: str
    wanted: dict[str, Any]
    read: Callable[[], dict[str, Any] | None]
    create: Callable[[], Any]
    update: Callable[[], Any]

    def change(self) -> Change:
        found = self.read()
        if found is None:
            return Change(self.kind, self.uid, "create", _diff({}, self.wanted), self.create)
        if found == self.wanted:
            return Change(self.kind, self.uid, "none", "", lambda: None)
        return Change(self.kind, self.uid, "change", _diff(found, self.wanted), self.update)


def plan(url: str, token: str, prometheus: str, runbooks: str = RUNBOOKS) -> list[Change]:
    """What is to be done on the server at `url`. Reads only.

    `prometheus`: its address as Grafana reaches it. Raises UsageError for an address that is none, HeadraceError if
    the server cannot be reached or refuses.
    """
    grafana = _api(url, token)
    with _said(url):
        things = [_source(grafana, prometheus), _folder(grafana), *_dashboards(grafana), *_rules(grafana, runbooks)]
        return [thing.change() for thing in things] + [_interval(grafana)] + _obsolete(grafana)


def push(url: str, token: str, prometheus: str, runbooks: str = RUNBOOKS) -> list[Change]:
    """Do what `plan` says, and give it. Raises as `plan`; what was done before an error stays."""
    changes = plan(url, token, prometheus, runbooks)
    with _said(url):
        for change in changes:
            change.apply()
        if any(c.kind == "alert rule" and c.action == "create" for c in changes):
            _interval(_api(url, token)).apply()  # the group came with its first rule, and the server's own interval
    return changes


def _source(grafana: GrafanaApi, prometheus: str) -> _Thing:
    wanted = {
        "uid": SOURCE_UID, "name": "Headrace's Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus,
        "jsonData": {"httpMethod": "POST", "timeInterval": "5s"},
    }  # fmt: skip

    def read() -> dict[str, Any] | None:
        found = _or_none(lambda: grafana.datasource.get_datasource_by_uid(SOURCE_UID))
        return found and _only(found, wanted)

    return _Thing(
        "data source", SOURCE_UID, wanted, read, lambda: grafana.datasource.create_datasource(wanted),
        lambda: grafana.datasource.update_datasource_by_uid(SOURCE_UID, wanted),
    )  # fmt: skip


def _folder(grafana: GrafanaApi) -> _Thing:
    wanted = {"uid": FOLDER_UID, "title": "Headrace"}

    def read() -> dict[str, Any] | None:
        found = _or_none(lambda: grafana.folder.get_folder(FOLDER_UID))
        return found and _only(found, wanted)

    return _Thing(
        "folder", FOLDER_UID, wanted, read, lambda: grafana.folder.create_folder("Headrace", FOLDER_UID),
        lambda: grafana.folder.update_folder(FOLDER_UID, title="Headrace", overwrite=True),
    )  # fmt: skip


def _dashboards(grafana: GrafanaApi) -> Iterator[_Thing]:
    for board in BOARDS:
        wanted = {"folderUid": FOLDER_UID, "dashboard": grafana_json(board)}

        def read(uid: str = board.uid) -> dict[str, Any] | None:
            found = _or_none(lambda: grafana.dashboard.get_dashboard(uid))
            return found and {
                "folderUid": found["meta"].get("folderUid", ""),
                "dashboard": {k: v for k, v in found["dashboard"].items() if k not in SERVERS_OWN},
            }

        def write(wanted: dict[str, Any] = wanted) -> None:
            grafana.dashboard.update_dashboard({**wanted, "overwrite": True, "message": MESSAGE})

        yield _Thing("dashboard", board.uid, wanted, read, write, write)


def _rules(grafana: GrafanaApi, runbooks: str) -> Iterator[_Thing]:
    alerting = grafana.alertingprovisioning
    for rule in grafana_rules(ALERTS, runbooks):

        def read(uid: str = rule["uid"]) -> dict[str, Any] | None:
            found = _or_none(lambda: alerting.get_alertrule(uid))
            return found and {k: v for k, v in found.items() if k not in SERVERS_OWN and v is not None}

        def create(rule: dict[str, Any] = rule) -> None:
            alerting.create_alertrule(rule)

        def update(rule: dict[str, Any] = rule) -> None:
            alerting.update_alertrule(rule["uid"], rule)

        yield _Thing("alert rule", rule["uid"], rule, read, create, update)


def _interval(grafana: GrafanaApi) -> Change:
    """How often the rules are evaluated: a property of their group, which comes into being with its first rule."""
    alerting = grafana.alertingprovisioning
    group = _or_none(lambda: alerting.get_rule_group(FOLDER_UID, GROUP))
    found, wanted = {"interval": (group or {}).get("interval")}, {"interval": EVERY_S}
    if group is None or found == wanted:
        return Change("rule group", GROUP, "none" if group else "create", "", lambda: None)
    return Change(
        "rule group", GROUP, "change", _diff(found, wanted),
        lambda: alerting.update_rule_group(FOLDER_UID, GROUP, {**group, **wanted}),
    )  # fmt: skip


def _obsolete(grafana: GrafanaApi) -> list[Change]:
    """Rules of our group that we no longer have: they would go on waking people."""
    alerting, ours = grafana.alertingprovisioning, {alert.uid for alert in ALERTS}
    return [
        Change("alert rule", rule["uid"], "remove", "", lambda uid=rule["uid"]: alerting.delete_alertrule(uid))  # type: ignore[misc]
        for rule in alerting.get_alertrules_all()
        if (rule["folderUID"], rule["ruleGroup"]) == (FOLDER_UID, GROUP) and rule["uid"] not in ours
    ]


def _api(url: str, token: str) -> GrafanaApi:
    from grafana_client import GrafanaApi, TokenAuth

    return GrafanaApi.from_url(checked(url), credential=TokenAuth(token), timeout=TIMEOUT_S)


@contextmanager
def _said(url: str) -> Iterator[None]:
    """Errors of the client as ours."""
    from grafana_client.client import GrafanaException

    try:
        yield
    except GrafanaException as error:
        raise HeadraceError(
            f"Grafana at {url} refuses (HTTP {error.status_code}: {error.message}); the token must be that of a service"
            " account that may write data sources, folders, dashboards and alert rules"
        ) from None
    except OSError as error:
        raise HeadraceError(f"no Grafana answers at {url} ({type(error).__name__}); check --url") from None


def _or_none(read: Callable[[], Any]) -> Any:
    """What is read; None if the server does not have it. Raises HeadraceError where it answers as Grafana does not."""
    from grafana_client.client import GrafanaClientError

    try:
        found = read()
    except GrafanaClientError as error:
        if error.status_code != NOT_FOUND:
            raise
        return None
    if not isinstance(found, dict):
        raise HeadraceError("what answers there is no Grafana: check --url")
    return found


def _only(found: Any, wanted: Any) -> Any:
    """Of what the server says, what we say too: it adds much of its own to data sources and folders."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: _only(found[key], value) for key, value in wanted.items() if key in found}
    return found


def _diff(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Unified diff of the two as JSON with keys in order."""
    before, after = (
        json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).splitlines() if value else []
        for value in (found, wanted)
    )
    return "\n".join(difflib.unified_diff(before, after, "on the server", "from code", lineterm="", n=2))
