"""What people and Prometheus see of a real consumer, and that it suffices to act on."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from command import command, topics_of
from scene import Scene, scene
from splitferry_consumer.web.app import TOKEN_HEADER
from splitferry_protocol.records import Status
from watching import ANSWERED, page_of, samples

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMED = 10.0
"""Seconds in which a request that was left half-sent is named."""
PROMTOOL = shutil.which("promtool")


@asynccontextmanager
async def watched(
    servers: str, directory: Path, **options: str
) -> AsyncIterator[tuple[Scene, httpx.AsyncClient]]:
    async with scene(servers, directory) as made:
        consumer = await made.consumer(WEB="127.0.0.1:0", WEB_ACTIONS="true", **options)
        async with page_of(made, consumer) as client:
            yield made, client


async def test_a_request_left_half_sent_is_named_and_can_be_ended(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    async with watched(bootstrap_servers, tmp_path) as (made, client):
        done = await made.item(1)
        request, _ = await made.begin(0)
        later = await made.item(0)
        began = time.monotonic()
        await made.told(done, later)

        async def holder() -> Any:
            status = (await client.get("status")).json()
            return status["partitions"][0]["holder"]

        held = await holder()
        assert (held["request"], held["missing"], held["gaps"]) == (str(request), [[500, 1000]], 1)
        assert time.time() * 1000 - held["since"] < 1000 * NAMED
        # What the alert of a stuck W waits for, as Prometheus would see it with its next scrape.
        labels = f'{{partition="0",request="{request}"}}'
        stuck = alerts()["SplitferryWatermarkStuck"]["expr"]
        (age,) = re.findall(r"splitferry_watermark_[a-z_]+", stuck)
        metrics: dict[str, float] = {}
        while age + labels not in metrics:
            assert time.monotonic() - began < NAMED
            await asyncio.sleep(0.2)
            metrics = samples((await client.get("metrics")).text)
        assert metrics['splitferry_watermark{partition="0"}'] == held["first"] == 0
        assert not any(series.startswith(age + '{partition="1"') for series in metrics)

        environment = {
            "SPLITFERRY_BOOTSTRAP_SERVERS": made.servers,
            "SPLITFERRY_GROUP": made.run.group,
            **topics_of(made.names),
        }
        outcome = await command(environment, "abort", str(request), "--reason", "left half-sent")
        assert outcome.code == 0, outcome
        await made.told(request)
        assert made.run.results[request].status is Status.ABORTED
        assert await holder() is None
        metrics = samples((await client.get("metrics")).text)
        assert metrics['splitferry_watermark{partition="0"}'] > 0
        assert not any("request=" in series for series in metrics)
        await made.sound()


async def test_the_page_aborts_a_request(bootstrap_servers: str, tmp_path: Path) -> None:
    async with watched(bootstrap_servers, tmp_path) as (made, client):
        request, _ = await made.begin(1)
        status: Any = {"requests": {"shown": []}}
        while not status["requests"]["shown"]:
            await asyncio.sleep(0.05)
            status = (await client.get("status")).json()
        headers = {TOKEN_HEADER: status["token"], "Origin": str(client.base_url).rstrip("/")}
        answer = await client.post(
            f"requests/{request}/abort", json={"reason": "not wanted"}, headers=headers
        )
        assert answer.status_code == 202, answer.text
        await made.told(request)
        error = made.run.results[request].error
        assert error is not None
        assert error.message.endswith("aborted: not wanted")
        too_long = {"reason": "x" * 1025}
        request, _ = await made.begin(1)
        while (await client.get(f"requests/{request}")).status_code == 404:
            await asyncio.sleep(0.05)
        answer = await client.post(f"requests/{request}/abort", json=too_long, headers=headers)
        assert answer.status_code == 400
        assert "1024" in answer.text
        await made.sound(held=1)


async def test_it_ends_with_the_consumer_whoever_is_watching(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    async with watched(bootstrap_servers, tmp_path) as (made, client):
        consumer = made.run.consumers[0]
        async with asyncio.timeout(ANSWERED):
            while (await client.get("readyz")).status_code != 200:
                await asyncio.sleep(0.1)
        async with client.stream("GET", "events", timeout=30) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == "event: status"
            began = time.monotonic()
            assert await consumer.stop() == 0
            assert time.monotonic() - began < 15
        assert made.run.errors() == []


async def test_an_address_in_use_is_told_before_anything_is_taken(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:{1}".format(*taken.getsockname())
        environment = {"SPLITFERRY_BOOTSTRAP_SERVERS": bootstrap_servers}
        outcome = await command(
            environment, "consume", "--root", tmp_path / "root", "--web", address
        )
    assert outcome.code == 1
    assert f"{address} (Address already in use)" in outcome.error
    assert "--web HOST:PORT" in outcome.error
    assert not (tmp_path / "root").exists()


# ---- what deploy/ has for Prometheus and Grafana


def alerts() -> dict[str, Any]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def expressions(value: Any) -> Iterator[str]:
    """What a dashboard asks of Prometheus."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in {"expr", "query"} and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


async def test_alerts_dashboard_and_guide_name_metrics_that_exist(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    async with watched(bootstrap_servers, tmp_path, WORKERS="2") as (made, client):
        await made.told(await made.item(1))
        await made.begin(0)
        while "request=" not in (text := (await client.get("metrics")).text):
            await asyncio.sleep(0.05)
    there = {series.partition("{")[0]: series for series in samples(text)}
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    asked = [rule["expr"] for rule in alerts().values()] + list(expressions(dashboard))
    named = {name for one in asked for name in re.findall(r"\bsplitferry_\w+", one)}
    assert len(named) > 15
    assert named - there.keys() == set()
    labels = {name for series in samples(text) for name in re.findall(r'([a-z]+)="', series)}
    used = {
        name
        for one in asked
        for group in re.findall(r"(?:by|on) \(([^)]*)\)", one)
        for name in re.split(r",\s*", group)
    }
    assert used - labels <= {"job", "instance"}, "which Prometheus adds"
    guide = (DEPLOY.parent / "docs" / "OPERATIONS.md").read_text()
    described = set(re.findall(r"^\| `(splitferry_\w+)", guide, re.MULTILINE))
    made_of = re.compile(r"_(bucket|sum|count)$")
    families = {made_of.sub("", name) for name in there}
    assert described == families
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)), "no panel covers another"


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_alerts_and_their_tests() -> None:
    assert PROMTOOL is not None
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        checked = subprocess.run(
            [PROMTOOL, *arguments],
            cwd=DEPLOY / "prometheus",
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_amiss_with_the_metrics(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    assert PROMTOOL is not None
    async with watched(bootstrap_servers, tmp_path, WORKERS="2") as (_, client):
        text = (await client.get("metrics")).text
    checked = await asyncio.to_thread(
        subprocess.run,
        [PROMTOOL, "check", "metrics"],
        input=text.encode(),
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
