"""The live page in a real browser, which may not complain of anything."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.async_api import Browser, Locator, Page, Playwright, ViewportSize, expect

from scene import Scene
from splitferry_cli.kafka_process import HOST
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Split
from stage import Consumer
from workload import cut

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)

WIDE: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 740}


async def launch(playwright: Playwright) -> Browser:
    """Chromium, without its sandbox where root would not get one."""
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    return await playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=120_000)


PATIENCE = 40_000
"""Milliseconds after which what should be seen counts as missing."""
expect.set_options(timeout=PATIENCE)


@dataclass
class Ferry:
    """A consumer that serves the page, and who sends to it."""

    scene: Scene
    port: int
    browser: Browser
    consumer: Consumer = field(init=False)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/"

    @asynccontextmanager
    async def page(self, *allowed: str, query: str = "", **context: Any) -> AsyncIterator[Page]:
        """The page in a context of its own, once it is live. Whatever the browser has to complain
        of fails the test, a violated content security policy too, but for what matches `allowed`.
        """
        async with await self.browser.new_context(**context) as made:
            page = await made.new_page()
            page.set_default_timeout(PATIENCE)
            complaints: list[str] = []
            page.on("console", lambda m: complaints.append(m.text) if m.type != "log" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
            await page.goto(f"{self.url}?{query}")
            await page.wait_for_selector("#connection[data-state=live]")
            yield page
        assert [c for c in complaints if not any(re.search(a, c) for a in allowed)] == []

    async def restart(self, *, actions: bool, **options: str) -> None:
        """Another consumer at the same address."""
        self.consumer = await self.scene.consumer(
            WEB=f"{HOST}:{self.port}",
            WEB_ACTIONS=str(actions),
            # No rebalance while it is frozen, or busy with thousands of requests.
            SESSION_TIMEOUT="20",
            **options,
        )

    async def half(
        self, number: int, unique_id: str, partition: int = 0, block: Block = Block.FILE
    ) -> Sequence[Split]:
        """Send the first half of an item of 8000 bytes, and return the other one."""
        request, data = RequestId(6, number), number.to_bytes(4) * 2000
        splits = cut(request, data, 4000, unique_id=unique_id, block=block)
        await self.scene.send(splits[:1], partition)
        return splits[1:]


def row(page: Page, text: str, table: str = "requests") -> Locator:
    """The rows of a table or list that hold `text`."""
    return page.locator(f"#{table} > *").filter(has_text=text)
