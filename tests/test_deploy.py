"""The files of deploy/ are of a valid form, and speak of options and limits that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from console import REPOSITORY, unit_settings
from splitferry_cli.consume import consume
from splitferry_cli.options import ENVIRONMENT_PREFIX, Option
from splitferry_cli.topics import create
from splitferry_cli.values import parse_size
from splitferry_consumer import service

DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "systemd" / "splitferry-consume.service"
KUBERNETES = DEPLOY / "kubernetes"
OPTIONS = {option.variable: option for option in consume.params if isinstance(option, Option)}
KEDA = "github.com/kedacore/keda/v2@v2.16.1"


def documents(*paths: Path) -> list[dict[str, Any]]:
    return [one for path in paths for one in yaml.safe_load_all(path.read_text())]


OBJECTS = [one for one in documents(*KUBERNETES.glob("*.yaml")) if one["kind"] != "Kustomization"]
SCALING = documents(*DEPLOY.glob("keda/*.yaml"))


def the(kind: str) -> dict[str, Any]:
    [found] = [one for one in OBJECTS + SCALING if one["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = the("Deployment")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    [only] = pod()["containers"]
    assert isinstance(only, dict)
    return only


def default(command: click.Command, name: str) -> Any:
    [found] = [param for param in command.params if param.name == name]
    return found.get_default(click.Context(command))


# ---- forms


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: one["kind"])
def test_kubernetes_takes_the_objects(one: dict[str, Any]) -> None:
    kubernetes_validate.validate(one, "1.30", strict=True)


def test_the_kustomization_holds_together() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    built = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, check=True
    )
    kinds = [one["kind"] for one in yaml.safe_load_all(built.stdout)]
    assert sorted(kinds) == sorted(one["kind"] for one in OBJECTS if one["kind"] != "Secret")


@pytest.fixture(scope="module")
def keda() -> Path:
    """KEDA's source, which has the schemas of its kinds; kept by Go once it was fetched."""
    if shutil.which("go") is None:
        pytest.skip("KEDA's schemas are fetched by Go, which is not here")
    fetched = subprocess.run(
        ["go", "mod", "download", "-json", KEDA], capture_output=True, text=True, check=False
    )
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    return Path(json.loads(fetched.stdout)["Dir"])


@pytest.mark.parametrize("kind", ["ScaledObject", "TriggerAuthentication"])
def test_keda_takes_the_objects(keda: Path, kind: str) -> None:
    [definition] = documents(keda / f"config/crd/bases/keda.sh_{kind.lower()}s.yaml")
    [schema] = [
        one["schema"]["openAPIV3Schema"]
        for one in definition["spec"]["versions"]
        if one["name"] == the(kind)["apiVersion"].partition("/")[2]
    ]
    assert the(kind)["apiVersion"].startswith(definition["spec"]["group"])
    jsonschema.validate(the(kind), closed(schema))


def closed(schema: Any) -> Any:
    """The schema, refusing what it does not name: the API server would drop that in silence."""
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    named = schema.get("properties")
    if isinstance(named, dict) and named and "type" in schema and schema["type"] == "object":
        inner.setdefault("additionalProperties", False)
    return inner


def test_the_trigger_s_settings_are_known_to_keda(keda: Path) -> None:
    source = (keda / "pkg" / "scalers" / "kafka_scaler.go").read_text()
    settings = re.findall(r'TriggerMetadata\["(\w+)"\]|MetricName += "(\w+)"', source)
    parameters = re.findall(r'AuthParams\["(\w+)"\]', source)
    [trigger] = the("ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"].keys() <= {name for pair in settings for name in pair}
    login = the("TriggerAuthentication")["spec"]
    assert {one["parameter"] for one in login["env"] + login["secretTargetRef"]} <= {*parameters}


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    command = unit_settings(UNIT)["ExecStart"].split()[0]
    here = Path(sys.executable).with_name("splitferry")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(command, str(here)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", copy],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stdout.splitlines()[-1:]


# ---- options


def variables() -> Iterator[tuple[str, str, str]]:
    """Where, name and value of every option that the files set, in comments, too."""
    for path in sorted(DEPLOY.glob("systemd/*")):
        for name, value in re.findall(r"\b(SPLITFERRY_\w+)=(\S+)", path.read_text()):
            yield path.name, name, value
    for name, value in the("ConfigMap")["data"].items():
        yield "ConfigMap", name, value
    for path in (REPOSITORY / "docker-compose.yml", REPOSITORY / "Dockerfile"):
        given = re.findall(r"^ +(SPLITFERRY_\w+): (.+)$", path.read_text(), re.MULTILINE)
        for name, value in given:
            yield path.name, name, value


@pytest.mark.parametrize(("where", "name", "value"), [*variables()])
def test_options_exist_and_take_the_values(where: str, name: str, value: str) -> None:
    assert name.startswith(ENVIRONMENT_PREFIX)
    option = OPTIONS[name]
    if not isinstance(option.type, click.Path):  # those files are not here
        option.type_cast_value(click.Context(consume), value)


def test_commands_exist() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    for arguments in (
        unit_settings(UNIT)["ExecStart"].split()[1:],
        container()["args"],
        compose["services"]["consumer"]["command"],
    ):
        command, *given = arguments
        assert command == consume.name
        consume.make_parser(click.Context(consume)).parse_args([*given])


# ---- what has to fit


def seconds(text: str | int) -> int:
    return int(str(text).removesuffix("s"))


def test_a_stop_has_time_for_the_grace_and_for_closing() -> None:
    needed = default(consume, "grace") + service.CLOSE_BOUND + service.BACKGROUND_BOUND
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    for given in (
        unit_settings(UNIT)["TimeoutStopSec"],
        pod()["terminationGracePeriodSeconds"],
        compose["services"]["consumer"]["stop_grace_period"],
    ):
        assert seconds(given) >= needed


def test_shared_memory_has_room_within_the_pod_s() -> None:
    [shared] = [one for one in pod()["volumes"] if one["name"] == "shared-memory"]
    room = parse_size(shared["emptyDir"]["sizeLimit"] + "B")
    assert parse_size(the("ConfigMap")["data"]["SPLITFERRY_MEMORY_LIMIT"]) < room
    assert room < parse_size(container()["resources"]["limits"]["memory"] + "B")


def test_the_parts_of_the_pod_name_each_other() -> None:
    data: Mapping[str, str] = the("ConfigMap")["data"]
    mounts = {one["mountPath"]: one["name"] for one in container()["volumeMounts"]}
    assert set(mounts.values()) == {one["name"] for one in pod()["volumes"]}
    assert data["SPLITFERRY_ROOT"] in mounts
    files = [Path(data[f"SPLITFERRY_{name}"]) for name in ("SASL_PASSWORD_FILE", "SSL_CAFILE")]
    assert {mounts[str(file.parent)] for file in files} == {"login"}
    assert {file.name for file in files} == the("Secret")["stringData"].keys()
    [port] = container()["ports"]
    assert data["SPLITFERRY_WEB"] == f"0.0.0.0:{port['containerPort']}"
    assert container()["image"] == f"splitferry:{version('splitferry')}"
    user = re.search(r"--uid (\d+)", (REPOSITORY / "Dockerfile").read_text())
    assert user is not None
    assert pod()["securityContext"]["runAsUser"] == int(user[1])


def test_everything_selects_the_pods() -> None:
    labels = the("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert the("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert the("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert the("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert the("Service")["spec"]["selector"] == labels


def test_the_scaling_follows_the_group_of_the_deployment() -> None:
    data = the("ConfigMap")["data"]
    spec = the("ScaledObject")["spec"]
    [trigger] = spec["triggers"]
    assert spec["scaleTargetRef"]["name"] == the("Deployment")["metadata"]["name"]
    assert spec["maxReplicaCount"] == default(create, "partitions")
    assert trigger["metadata"]["topic"] == default(consume, "splits_topic")
    assert trigger["metadata"]["consumerGroup"] == data["SPLITFERRY_GROUP"]
    assert trigger["metadata"]["bootstrapServers"] == data["SPLITFERRY_BOOTSTRAP_SERVERS"]
    assert trigger["authenticationRef"]["name"] == the("TriggerAuthentication")["metadata"]["name"]
    login = the("TriggerAuthentication")["spec"]
    assert {one["name"] for one in login["env"]} <= data.keys()
    assert {one["key"] for one in login["secretTargetRef"]} == the("Secret")["stringData"].keys()
