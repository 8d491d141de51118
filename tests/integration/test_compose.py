"""docker-compose.yml for real: Kafka, the topics, three consumers in one group on one root."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from brokers import docker_answers
from splitferry_cli.kafka_process import free_ports

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
SPLITFERRY = [sys.executable, "-m", "splitferry_cli"]


def run(
    *command: str, env: dict[str, str], seconds: int = 120, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ports and names that no other project has; skips where the image cannot be built."""
    if not docker_answers():
        pytest.skip("no Docker engine answers")
    base = os.environ.get("SPLITFERRY_BASE", "python:3.11-slim")
    env = os.environ | {
        "SPLITFERRY_BASE": base,
        "SPLITFERRY_KAFKA_PORT": str(free_ports(0)[0]),
        "COMPOSE_PROJECT_NAME": f"splitferry-test-{uuid.uuid4().hex[:8]}",
        "XDG_DATA_HOME": str(tmp_path_factory.mktemp("home")),
    }
    if run("docker", "compose", "version", env=env, check=False).returncode:
        pytest.skip("this Docker has no `docker compose`")
    have = run("docker", "image", "inspect", base, env=env, check=False).returncode == 0
    if not have and run("docker", "pull", base, env=env, seconds=600, check=False).returncode:
        pytest.skip(f"the base image {base} cannot be pulled; SPLITFERRY_BASE names another")
    if run("docker", "buildx", "version", env=env, check=False).returncode:
        env["DOCKER_BUILDKIT"] = "0"  # an engine without the plug-in has its older builder
    return env


Compose = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def compose(environment: dict[str, str]) -> Iterator[Compose]:
    def call(*args: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
        return run("docker", "compose", *args, env=environment, seconds=seconds)

    try:
        call("build", seconds=600)
        call("up", "--detach", "--wait", "--scale", "consumer=3", seconds=180)
        yield call
    finally:
        call("down", "--volumes", "--timeout", "5")


def test_three_consumers_receive_a_folder(
    compose: Compose, environment: dict[str, str], tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()
    for number, size in enumerate([0, 1, 1000, 2**20, 5 * 2**20 + 7, 20 * 2**20]):
        (sent / f"file-{number}").write_bytes(random.Random(number).randbytes(size))
    told = run(
        *SPLITFERRY,
        "send",
        str(sent),
        "--json",
        f"--bootstrap-servers=127.0.0.1:{environment['SPLITFERRY_KAFKA_PORT']}",
        "--timeout=60",
        env=environment,
    )
    results = [json.loads(line) for line in told.stdout.splitlines()]
    files = {file.name: file.read_bytes() for file in sent.iterdir()}
    assert {result["unique_id"] for result in results} == set(files)
    assert {result["status"] for result in results} == {"completed"}
    assert len(results) == len(files)

    compose("cp", "consumer:/data/.", str(tmp_path / "received"))
    for name, content in files.items():
        assert (tmp_path / "received" / name).read_bytes() == content


def test_consumers_are_no_root_and_end_cleanly(compose: Compose) -> None:
    assert compose("exec", "-T", "consumer", "id", "-u").stdout.strip() == "10001"
    compose("stop", "consumer")
    listed = compose("ps", "--all", "--format", "json", "consumer").stdout
    assert [json.loads(line)["ExitCode"] for line in listed.splitlines()] == [0, 0, 0]
