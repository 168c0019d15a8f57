"""The image, the compose file and the chart: valid, in step with the settings and the command, and no door open.

There is no container runtime and no cluster here: they are held to their schemas and to what this code really has.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from deploy.broker import KAFKA_VERSION
from deploy.cli import app
from deploy.dashboards.panels import JOBS
from tests.deploy.deployment_files import (
    ALL,
    CHART,
    COMPOSE,
    DOCKERFILE,
    KUBERNETES,
    LEAST,
    ROOT,
    accepted,
    compose,
    pods,
    rendered,
    run,
    template,
    yaml,
)

VALUES = pytest.mark.parametrize("values", [LEAST, ALL], ids=["least", "all"])


def is_command(arguments: list[str]) -> None:
    """That these words are a command of ours, with options that it has."""
    group: Any = typer.main.get_command(app)
    words = list(map(str, arguments))
    while words and (inner := getattr(group, "commands", {}).get(words[0])):
        group, words = inner, words[1:]
    assert not hasattr(group, "commands"), f"{arguments} is not a whole command"
    known = {option for parameter in group.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, arguments


def ours() -> dict[str, Any]:
    return {name: s for name, s in compose()["services"].items() if s["image"].startswith("headrace:")}


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    done = run("hadolint", str(DOCKERFILE))
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_hashed_and_nobody_s_root() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-\S+$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    installs = [line for line in re.split(r"&&|\n", text.replace("\\\n", " ")) if "pip install" in line]
    assert installs
    for line in installs:
        assert re.search(r"--require-hashes|--no-deps /dist|\"uv==", line), line
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "10001:10001"
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied), copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        allowed = f"!{name.rstrip('/')}"
        assert any(line == allowed or line.startswith(f"{allowed}/") for line in ignored), f"{name} is not sent along"


def test_the_image_s_environment_are_settings(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("")
    accepted(dict(re.findall(r"\b(HEADRACE_\w+)=(\S+)", DOCKERFILE.read_text())), tmp_path)


# --- compose ----------------------------------------------------------------------------------------------------------


def test_compose_fits_the_schema_of_its_specification() -> None:
    found = find_spec("check_jsonschema")  # not imported: it wants a newer click than Faust allows
    assert found is not None
    assert found.origin is not None
    schema = Path(found.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(yaml.safe_load(COMPOSE.read_text()), json.loads(schema.read_text()))


def test_compose_opens_no_door() -> None:
    told = compose()
    for name, service in told["services"].items():
        assert re.search(r":v?\d+\.\d+|:\$\{HEADRACE_VERSION:-\d", service["image"]), f"{name}: {service['image']}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["user"].split(":")[0]) > 0, name
        assert {"cpus", "memory"} == set(service["deploy"]["resources"]["limits"]), name
        assert "privileged" not in service, name
        assert set(service["networks"]) <= set(told["networks"]), name
        for variable, value in service.get("environment", {}).items():
            secret = re.search(r"PASSWORD|TOKEN|SECRET", variable)
            assert not secret or value.startswith("/run/secrets/"), f"{name}: {variable} is not a file"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in told["volumes"] or (COMPOSE.parent / source).exists(), volume
        if name not in ("topics", "player"):
            assert service["healthcheck"]["test"][0] == "CMD", name
    assert told["services"]["kafka"]["networks"] == ["inside"]
    assert "ports" not in told["services"]["kafka"]
    assert told["networks"]["inside"]["internal"] is True
    for name, secret in told["secrets"].items():
        assert secret["file"].startswith("${HEADRACE_SECRETS:?"), f"{name} has a default"


def test_compose_runs_the_kafka_that_the_tests_run() -> None:
    assert compose()["services"]["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"


def test_compose_says_what_commands_and_settings_there_are(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("")
    assert len(ours()) >= 6
    for service in ours().values():
        is_command(service["command"])
        environment = {k: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", v) for k, v in service["environment"].items()}
        accepted(environment, tmp_path)


def test_what_compose_reads_of_a_shell_breaks_no_command_there(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("")
    read = set(re.findall(r"\$\{(HEADRACE_\w+)", COMPOSE.read_text()))
    assert {"HEADRACE_SECRETS", "HEADRACE_VERSION", "HEADRACE_EXTRA"} <= read
    accepted(dict.fromkeys(read, "1"), tmp_path)


def metrics_ports(command: list[str]) -> set[int]:
    """Those that are set by the command, and not by the environment."""
    return {int(port) for option, port in pairwise(command) if option == "--metrics-port"}


def test_compose_asks_and_scrapes_the_ports_that_it_sets() -> None:
    listening = {}
    for name, service in ours().items():
        ports = [v for k, v in service["environment"].items() if k.endswith("_PORT")]
        listening[name] = set(map(int, ports)) | metrics_ports(service["command"])
        test = " ".join(service.get("healthcheck", {}).get("test", []))
        asked = set(map(int, re.findall(r"127\.0\.0\.1:(\d+)", test)))
        published = {int(port.split(":")[-1]) for port in service.get("ports", [])}
        assert asked | published <= listening[name], name
    told = yaml.safe_load((COMPOSE.parent / "prometheus" / "prometheus.yml").read_text())
    targets = [t for job in told["scrape_configs"] for s in job["static_configs"] for t in s["targets"]]
    scraped = {tuple(target.split(":")) for target in targets if not target.startswith("127.")}
    assert scraped == {(name, str(port)) for name, ports in listening.items() for port in ports if port != 8080}
    (source,) = yaml.safe_load((COMPOSE.parent / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"


# --- the chart --------------------------------------------------------------------------------------------------------


@VALUES
def test_the_chart_is_sound_to_helm_and_what_it_makes_to_kubernetes(values: tuple[str, ...], tmp_path: Path) -> None:
    given = [part for value in values for part in ("--set", value)]
    linted = run("helm", "lint", str(CHART), "--strict", "--kube-version", f"{KUBERNETES}.0", *given)
    assert linted.returncode == 0, linted.stdout
    core = [d for d in rendered(values) if d["apiVersion"].split("/")[0] not in ("keda.sh", "monitoring.coreos.com")]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(core))
    done = run("kubernetes-validate", "--strict", "-k", KUBERNETES, str(tmp_path / "all.yaml"))
    assert done.returncode == 0, done.stdout
    assert f"{done.stdout}{done.stderr}".count(" passed for ") == len(core)


@VALUES
def test_every_pod_is_hardened_and_asked_how_it_is(values: tuple[str, ...]) -> None:
    for name, pod in pods(values):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, f"{name}: a Service headrace-x would be HEADRACE_X_…, no setting"
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert {"requests", "limits"} == set(container["resources"]), name
            assert re.search(r":\d+\.\d+|@sha256:", container["image"]), container["image"]
            ports = {port["name"] for port in container.get("ports", [])}
            if not name.startswith("Job/"):
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    assert container[probe]["httpGet"]["port"] in ports, f"{name} {probe}"
                    tls = any(variable["name"] == "HEADRACE_HTTP_TLS_CERT" for variable in container["env"])
                    assert container[probe]["httpGet"]["scheme"] == ("HTTPS" if tls else "HTTP"), f"{name} {probe}"
                    assert tls == (values == ALL)
            volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


@VALUES
def test_the_chart_says_what_commands_and_settings_there_are(values: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("")
    for name, pod in pods(values):
        for container in pod["containers"]:
            is_command(container["args"])
            environment = {variable["name"]: variable["value"] for variable in container["env"]}
            settings = accepted(environment, tmp_path)
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            expected = {
                "join": {"metrics": settings.join.metrics_port}, "train": {"metrics": settings.train.metrics_port},
                "serve": {"http": settings.serve.port, "metrics": settings.serve.admin_port},
                "monitor": {"metrics": max(metrics_ports(container["args"]), default=0)},
            }  # fmt: skip
            assert ports == expected.get(container["name"], {}), name
            assert settings.bootstrap == "kafka:9092"


@VALUES
def test_what_selects_pods_finds_them_and_ports_have_names_that_are_there(values: tuple[str, ...]) -> None:
    documents = rendered(values)
    made = {}
    for document in documents:
        pod = document.get("spec", {}).get("template")
        if pod:
            made[document["metadata"]["name"]] = pod
    for document in documents:
        spec, name = document.get("spec", {}), f"{document['kind']}/{document['metadata']['name']}"
        selector = spec.get("podSelector", spec.get("selector"))
        if document["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            wanted = selector.get("matchLabels", selector)
            found = [p for p in made.values() if wanted.items() <= p["metadata"]["labels"].items()]
            assert found, name
            for port in spec.get("ports", []):
                names = {p["name"] for pod in found for c in pod["spec"]["containers"] for p in c["ports"]}
                assert port["targetPort"] in names, name
        if "scaleTargetRef" in spec:
            assert spec["scaleTargetRef"]["name"] in made, name
    budgets = [d for d in documents if d["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == 3


@VALUES
def test_nobody_talks_to_anybody_but_as_said(values: tuple[str, ...]) -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in rendered(values) if d["kind"] == "NetworkPolicy"}
    deny = policies.pop("shop-deny")
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule["from"], f"{name} lets everybody in"
            assert rule["ports"], name
        for rule in spec.get("egress", []):
            assert rule["ports"], f"{name} lets everything out"
    assert policies["shop-clients"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "serve"
    assert ("shop-metrics" in policies) == (values == ALL)


def test_prometheus_knows_the_pods_by_the_jobs_that_alerts_and_dashboards_ask_for() -> None:
    monitors = [d["spec"]["endpoints"] for d in rendered(ALL) if d["kind"] == "ServiceMonitor"]
    said = [rule["replacement"] for (endpoint,) in monitors for rule in endpoint["relabelings"]]
    assert said == ["join", "train", "serve", "monitor"]
    assert set(said) <= set(JOBS.split("|"))


def test_replicas_answer_while_no_version_comes() -> None:
    (serve,) = [pod for name, pod in pods(LEAST) if name.endswith("/shop-serve")]
    (told,) = [v["value"] for v in serve["containers"][0]["env"] if v["name"] == "HEADRACE_SERVE_MAX_AGE_MS"]
    assert told == str(24 * 3_600_000)


def test_there_are_no_secrets_of_its_own_and_no_default() -> None:
    assert "Secret" not in {document["kind"] for document in rendered(ALL)}
    for missing in LEAST:
        done = template(*(value for value in LEAST if value != missing))
        assert done.returncode != 0
        assert missing.split("=")[0] in done.stderr


@pytest.mark.parametrize(
    "wrong",
    ["image.tag=latest", "join.replicas=9", "train.replicas=2", "kafka.bootstrap=kafka", "train.volume.size=much",
     "serve.token=x"],
)  # fmt: skip
def test_values_that_are_wrong_are_refused(wrong: str) -> None:
    assert template(*LEAST).returncode == 0
    assert template(*LEAST, wrong).returncode != 0


def test_every_value_has_a_schema() -> None:
    def walk(value: Any, schema: dict[str, Any], path: str) -> None:
        if isinstance(value, dict) and "properties" in schema:
            assert schema["additionalProperties"] is False, path
            for name, inner in value.items():
                assert name in schema["properties"], f"{path}.{name}"
                walk(inner, schema["properties"][name], f"{path}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    walk(values, json.loads((CHART / "values.schema.json").read_text()), "")
