"""The page of several workers: what it says while one of them gives no answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from splitferry_consumer.service import Settings
from splitferry_consumer.web import workers as workers_module
from splitferry_consumer.web.app import Pages
from splitferry_consumer.web.workers import Workers
from splitferry_protocol.connection import ConnectionSettings


@dataclass
class Worker:
    number: int
    socket: Path
    trouble: str | None = None
    restarts: int = 0


async def test_a_request_that_a_silent_worker_may_have_is_not_told_to_be_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "ASK_BOUND", 0.2)
    settings = Settings(ConnectionSettings("127.0.0.1:1"), tmp_path)
    source = Workers([Worker(n, tmp_path / f"{n}") for n in (1, 2)], settings)
    silent = True

    async def first(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, text="the request is not open in this consumer")

    async def second(request: httpx.Request) -> httpx.Response:
        if silent:
            await asyncio.Event().wait()
        return httpx.Response(404)

    for asked, answer in zip(source._asked, (first, second), strict=True):
        await asked._client.aclose()
        transport = httpx.MockTransport(answer)
        asked._client = httpx.AsyncClient(transport=transport, base_url="http://worker")
        asked._silent = False
    pages = httpx.ASGITransport(Pages(source, asyncio.Event(), None, None).app)
    async with httpx.AsyncClient(transport=pages, base_url="http://localhost") as client:
        told = await client.get("requests/1-1")
        assert told.status_code == 503
        assert "worker 2 may have it, and does not answer" in told.text
        silent = source._asked[1]._silent = False
        assert (await client.get("requests/1-1")).status_code == 404
    for asked in source._asked:
        await asked._client.aclose()
