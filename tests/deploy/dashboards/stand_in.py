"""A stand-in for Grafana's HTTP API, as far as `headrace dashboards` uses it. It is not Grafana.

It keeps what it is sent, adds what a server adds of its own (ids, versions, times, provenance), and refuses bodies that
Grafana's own models do not know in full: a dashboard or a rule must come back unchanged from the SDK's reading of it,
and a dashboard must be as the published types have it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from grafana_foundation_sdk.models.alerting import Rule
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards.panels import to_json
from tests.deploy.dashboards.grafana_types import faults

TOKEN = "right"
DEFAULT_INTERVAL_S = 60  # of a rule group that comes into being with its first rule
# What Grafana's model ProvisionedAlertRule requires.
RULE_REQUIRED = {"condition", "data", "execErrState", "folderUID", "for", "noDataState", "orgID", "ruleGroup", "title"}
SOURCE_KNOWN = {"uid", "name", "type", "access", "url", "jsonData"}


class Refused(Exception):
    """An answer with a status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Grafana(ThreadingHTTPServer):
    """Everything that is kept, by uid; `writes` are the requests that changed something."""

    def __init__(self) -> None:
        self.sources: dict[str, dict] = {}
        self.folders: dict[str, dict] = {}
        self.dashboards: dict[str, dict] = {}  # uid → {"meta": …, "dashboard": …}
        self.rules: dict[str, dict] = {}
        self.intervals: dict[tuple[str, str], int] = {}
        self.writes: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    # --- data sources and folders ---

    def read_source(self, uid: str) -> dict:
        return _found(self.sources, uid, "Data source not found")

    def write_source(self, body: dict, uid: str | None = None) -> dict:
        _known(body, SOURCE_KNOWN)
        if uid is None and body["uid"] in self.sources:
            raise Refused(409, "data source with the same uid already exists")
        if uid is not None:
            self.read_source(uid)
        version = self.sources.get(body["uid"], {}).get("version", 0) + 1
        own = {"id": 1, "orgId": 1, "version": version, "readOnly": False, "isDefault": False}
        self.sources[body["uid"]] = {**body, **own}
        return {"id": 1, "name": body["name"], "datasource": self.sources[body["uid"]], "message": "Datasource saved"}

    def read_folder(self, uid: str) -> dict:
        return _found(self.folders, uid, "folder not found")

    def create_folder(self, body: dict) -> dict:
        _known(body, {"uid", "title"})
        if body["uid"] in self.folders:
            raise Refused(412, "a folder with the same uid already exists")
        self.folders[body["uid"]] = {**body, "id": 7, "version": 1, "url": f"/dashboards/f/{body['uid']}"}
        return self.folders[body["uid"]]

    def update_folder(self, body: dict, uid: str) -> dict:
        _known(body, {"title", "overwrite"})
        folder = self.read_folder(uid)
        folder |= {"title": body["title"], "version": folder["version"] + 1}
        return folder

    # --- dashboards ---

    def read_dashboard(self, uid: str) -> dict:
        return _found(self.dashboards, uid, "Dashboard not found")

    def write_dashboard(self, body: dict) -> dict:
        _known(body, {"dashboard", "folderUid", "overwrite", "message"})
        sent = body["dashboard"]
        if to_json(Dashboard.from_json(sent)) != sent or faults(sent):
            raise Refused(400, f"not a dashboard as Grafana's types have it: {faults(sent)}")
        self.read_folder(body["folderUid"])
        known = self.dashboards.get(sent["uid"])
        if known and not body.get("overwrite"):
            raise Refused(412, "The dashboard has been changed by someone else")
        version = known["dashboard"]["version"] + 1 if known else 1
        self.dashboards[sent["uid"]] = {
            "meta": {"folderUid": body["folderUid"], "version": version, "type": "db", "canEdit": True},
            "dashboard": {**sent, "id": 40 + len(self.dashboards), "version": version},
        }
        return {"uid": sent["uid"], "version": version, "url": f"/d/{sent['uid']}", "status": "success"}

    # --- alert rules ---

    def all_rules(self) -> list[dict]:
        return list(self.rules.values())

    def read_rule(self, uid: str) -> dict:
        return _found(self.rules, uid, "could not find alert rule")

    def create_rule(self, body: dict) -> dict:
        if body["uid"] in self.rules:
            raise Refused(409, "conflicting alert rule found")
        return self._kept_rule(body)

    def update_rule(self, body: dict, uid: str) -> dict:
        self.read_rule(uid)
        return self._kept_rule(body)

    def _kept_rule(self, body: dict) -> dict:
        if to_json(Rule.from_json(body)) != body or not body.keys() >= RULE_REQUIRED:
            raise Refused(400, "not a rule as Grafana's model has it")
        self.read_folder(body["folderUID"])
        for query in body["data"]:
            if query["datasourceUid"] != "__expr__":
                self.read_source(query["datasourceUid"])
        if body["condition"] not in {query["refId"] for query in body["data"]}:
            raise Refused(400, "the condition is none of the queries")
        self.intervals.setdefault((body["folderUID"], body["ruleGroup"]), DEFAULT_INTERVAL_S)
        self.rules[body["uid"]] = {
            **body, "id": 100 + len(self.rules), "updated": "2026-11-30T06:00:00Z", "provenance": "api",
            "notification_settings": None, "record": None,
        }  # fmt: skip
        return self.rules[body["uid"]]

    def delete_rule(self, uid: str) -> dict:
        self.read_rule(uid)
        del self.rules[uid]
        return {"message": "deleted"}

    def read_group(self, folder: str, group: str) -> dict:
        interval = _found(self.intervals, (folder, group), "rule group not found")
        rules = [r for r in self.rules.values() if (r["folderUID"], r["ruleGroup"]) == (folder, group)]
        return {"title": group, "folderUid": folder, "interval": interval, "rules": rules}

    def write_group(self, body: dict, folder: str, group: str) -> dict:
        _known(body, {"title", "folderUid", "interval", "rules"})
        if {rule["uid"] for rule in body["rules"]} != {r["uid"] for r in self.read_group(folder, group)["rules"]}:
            raise Refused(400, "the stand-in takes groups with the rules that they have")
        self.intervals[folder, group] = body["interval"]
        return self.read_group(folder, group)


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", r"/api/datasources/uid/([\w-]+)", Grafana.read_source),
    ("POST", r"/api/datasources", Grafana.write_source),
    ("PUT", r"/api/datasources/uid/([\w-]+)", Grafana.write_source),
    ("GET", r"/api/folders/([\w-]+)", Grafana.read_folder),
    ("POST", r"/api/folders", Grafana.create_folder),
    ("PUT", r"/api/folders/([\w-]+)", Grafana.update_folder),
    ("GET", r"/api/dashboards/uid/([\w-]+)", Grafana.read_dashboard),
    ("POST", r"/api/dashboards/db", Grafana.write_dashboard),
    ("GET", r"/api/v1/provisioning/alert-rules", Grafana.all_rules),
    ("POST", r"/api/v1/provisioning/alert-rules", Grafana.create_rule),
    ("GET", r"/api/v1/provisioning/alert-rules/([\w-]+)", Grafana.read_rule),
    ("PUT", r"/api/v1/provisioning/alert-rules/([\w-]+)", Grafana.update_rule),
    ("DELETE", r"/api/v1/provisioning/alert-rules/([\w-]+)", Grafana.delete_rule),
    ("GET", r"/api/v1/provisioning/folder/([\w-]+)/rule-groups/([\w-]+)", Grafana.read_group),
    ("PUT", r"/api/v1/provisioning/folder/([\w-]+)/rule-groups/([\w-]+)", Grafana.write_group),
)


class _Handler(BaseHTTPRequestHandler):
    server: Grafana

    def _serve(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                raise Refused(401, "Unauthorized")
            self._answer(200, self._routed(sent))
        except Refused as refused:
            self._answer(refused.status, {"message": str(refused)})

    def _routed(self, sent: bytes) -> Any:
        for method, path, answer in ROUTES:
            matched = re.fullmatch(path, self.path)
            if matched and method == self.command:
                if method != "GET":
                    self.server.writes.append(f"{method} {self.path}")
                body = [json.loads(sent)] if method in ("POST", "PUT") else []
                return answer(self.server, *body, *matched.groups())
        raise Refused(404, f"the stand-in has no {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, status: int, body: Any) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def standing_in() -> Iterator[Grafana]:
    """The stand-in, answering."""
    with Grafana() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))  # seconds between two looks at `shutdown`
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _found(kept: dict, key: Any, message: str) -> Any:
    if key not in kept:
        raise Refused(404, message)
    return kept[key]


def _known(body: dict, names: set[str]) -> None:
    if not body.keys() <= names:
        raise Refused(400, f"unknown fields: {sorted(body.keys() - names)}")
