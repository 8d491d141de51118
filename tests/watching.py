"""Consumers with their web page served, and a client to look at it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_transport import Kafka, MemoryTransport
from scene import Scene
from splitferry_consumer import membership as membership_module
from splitferry_consumer import service as service_module
from splitferry_consumer.service import Service, Settings
from splitferry_consumer.web.app import TOKEN_HEADER
from splitferry_consumer.web.server import serving
from splitferry_consumer.web.source import OneProcess
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort
from stage import Consumer

ANSWERED = 30.0
"""Seconds that an answer may take on a busy machine."""


@dataclass
class Watched:
    """Made by `watched`. Aborts go to the Kafka in memory, unless `failing` is set."""

    kafka: Kafka
    member: MemoryTransport
    service: Service
    client: httpx.AsyncClient
    failing: list[Exception] = field(default_factory=list)

    async def json(self, path: str, **query: str | int) -> Any:
        answer = await self.client.get(path, params=query)
        answer.raise_for_status()
        return answer.json()

    async def status(self, **query: str | int) -> Any:
        return await self.json("status", **query)

    async def metrics(self) -> dict[str, float]:
        """By series."""
        return samples((await self.client.get("metrics")).text)

    async def action(self, request: str, reason: object = "enough", **headers: str) -> Any:
        """The page's own request, but for `headers`; an empty one is left out."""
        token = (await self.status())["token"]
        origin = str(self.client.base_url).rstrip("/")
        said = {
            "origin": origin,
            "sec_fetch_site": "same-origin",
            "content_type": "application/json",
        }
        said |= {"token": token or ""} | headers
        names = {name: name.replace("_", "-") for name in said} | {"token": TOKEN_HEADER}
        return await self.client.post(
            f"requests/{request}/abort",
            content=json.dumps({"reason": reason}),
            headers=[(names[k].encode(), v.encode("latin-1")) for k, v in said.items() if v],
        )


@asynccontextmanager
async def watched(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    partitions: int = 2,
    actions: bool = True,
    host: str = "127.0.0.1",
) -> AsyncIterator[Watched]:
    """A consumer on a Kafka in memory, whose topics count as checked. It runs within the block."""
    kafka = Kafka(partitions)
    member = MemoryTransport(kafka)

    async def checked(*arguments: object) -> None:
        pass

    monkeypatch.setattr(service_module, "check_topics", checked)
    monkeypatch.setattr(service_module, "AiokafkaTransport", lambda *options: member)
    monkeypatch.setattr(membership_module, "POLL_WAIT", 0.005)
    service = Service(
        Settings(
            ConnectionSettings("127.0.0.1:1"),
            root,
            group="group",
            splits_topic="splits",
            results_topic="results",
            dead_letters_topic="dead-letters",
        )
    )
    failing: list[Exception] = []

    async def abort(request: RequestId, partition: int, reason: str) -> None:
        if failing:
            raise failing.pop()
        kafka.send(Abort(request, reason), partition)

    async with serving(OneProcess(service), host, 0, abort if actions else None) as address:
        running = asyncio.create_task(service.run())
        try:
            async with httpx.AsyncClient(
                base_url=address, trust_env=False, timeout=ANSWERED
            ) as client:
                yield Watched(kafka, member, service, client, failing)
        finally:
            service.stop()
            await running


@asynccontextmanager
async def page_of(made: Scene, consumer: Consumer) -> AsyncIterator[httpx.AsyncClient]:
    """Of a consumer process."""
    address = (await made.said(consumer, "web page"))["address"]
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=ANSWERED) as client:
        yield client


def samples(text: str) -> dict[str, float]:
    """By series."""
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {series: float(value) for series, _, value in pairs}
