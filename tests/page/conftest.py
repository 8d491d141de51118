"""One consumer with its page, and one browser, for each file of tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright

from browsing import BROWSERS, CHROMIUM, Ferry, launch
from scene import scene
from splitferry_cli.kafka_process import free_ports


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is installed")
    async with async_playwright() as playwright:
        made = await launch(playwright)
        yield made
        await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ferry(
    browser: Browser, bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Ferry]:
    directory = tmp_path_factory.mktemp("page")
    async with scene(bootstrap_servers, directory) as made:
        port, _ = await asyncio.to_thread(free_ports, 0)
        ferry = Ferry(made, port, browser)
        await ferry.restart(actions=True)
        yield ferry
