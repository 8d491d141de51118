"""Pictures of the live page during a real transfer: `make screenshots`.

A broker, a consumer and what it is sent are real, and take some three minutes. The pictures go to
docs/screenshots/. Wants Chromium; the fonts that the page prefers are Debian's fonts-inter and
fonts-jetbrains-mono.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path

from aiokafka import AIOKafkaProducer
from playwright.async_api import Browser, async_playwright

from browsing import PHONE, WIDE, launch
from command import command
from splitferry_cli.broker import LocalBroker
from splitferry_cli.consumer_process import ConsumerProcess
from splitferry_cli.kafka_process import HOST, free_ports
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Split
from workload import Message, cut, damaged, message, send, sending

MIB = 1024 * 1024
HERE = Path(__file__).parents[2] / "docs" / "screenshots"
PARTITIONS = 4
RUN = 150
"""Seconds of transfer before the pictures are taken."""

requests = (RequestId(7, number) for number in count(41))
rng = random.Random(5)


def item(unique_id: str, size: int, block: Block = Block.FILE) -> list[Split]:
    """Splits of MiBs, with labels in the first."""
    splits = cut(next(requests), rng.randbytes(size), MIB, unique_id=unique_id, block=block)
    return [splits[0]._replace(labels={"run": "2026-11", "team": "vision"}), *splits[1:]]


class Sender:
    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer

    async def __call__(self, messages: Sequence[Message]) -> None:
        await send(self._producer, "splitferry.splits", messages)

    async def paced(self, splits: Sequence[Split], seconds: float) -> None:
        """Evenly over so long."""
        for split in splits:
            await self([message(split, PARTITIONS)])
            await asyncio.sleep(seconds / len(splits) * rng.uniform(0.7, 1.3))

    async def steady(self) -> None:
        """One small item after the other."""
        for number in count():
            splits = item(f"recordings/line-2/{number:04}.mkv", rng.randint(6, 14) * MIB)
            await self.paced(splits, 4)


def with_gaps(splits: list[Split]) -> list[Split]:
    """Each fifth split, and a stretch in the middle, come last."""
    third = len(splits) // 3
    late = [s for n, s in enumerate(splits) if n % 9 == 4 or third < n < third + 8]
    return [s for s in splits if s not in late] + late


async def transfer(to: Sender) -> None:
    """Everything that the page has a place for; goes on until it is cancelled."""
    wrong = item("models/resnet/weights.bin", 4 * MIB)
    wrong[-1] = wrong[-1]._replace(sha256=bytes(32))
    await to([message(split, PARTITIONS) for split in wrong])
    older = item("models/vit-large/shard-00001-of-00004.safetensors", 2 * MIB)
    await to([message(split, PARTITIONS) for split in older])
    await to([message(s._replace(request=RequestId(8, 3)), PARTITIONS) for s in older])
    await to([damaged(message(older[0], PARTITIONS))])
    half = item("recordings/line-1/2026-11-24T10.mkv", 24 * MIB)
    await to([message(split, PARTITIONS) for split in half[:9] + half[12:15]])
    async with asyncio.TaskGroup() as group:
        for number in range(2, 5):
            splits = item(f"models/vit-large/shard-{number:05}-of-00004.safetensors", 150 * MIB)
            group.create_task(to.paced(with_gaps(splits), RUN * (0.9 + number / 4)))
        splits = item("embeddings/epoch-12", 40 * MIB, Block.MEM)
        group.create_task(to.paced(splits, RUN * 2))
        stream = [s._replace(total=None, sha256=None) for s in item("logs/ingest.log", 90 * MIB)]
        group.create_task(to.paced(stream, RUN * 1.6))
        group.create_task(to.steady())


async def take(browser: Browser, url: str) -> None:
    for theme in ("light", "dark"):
        context = await browser.new_context(color_scheme=theme, viewport=WIDE)
        page = await context.new_page()
        await page.goto(url)
        await page.locator("#requests > *").first.wait_for()
        await page.wait_for_timeout(1500)
        await page.screenshot(path=HERE / f"page-{theme}.png", full_page=True)
        if theme == "light":
            await page.locator("#requests").get_by_text("shard-00003").click()
            await page.get_by_role("dialog").get_by_text("Label team").wait_for()
            await page.screenshot(path=HERE / "details.png")
        await context.close()
    context = await browser.new_context(color_scheme="light", device_scale_factor=2, viewport=PHONE)
    page = await context.new_page()
    await page.goto(url)
    await page.locator("#requests > *").first.wait_for()
    await page.screenshot(path=HERE / "page-phone.png")
    await page.locator("#requests-heading").scroll_into_view_if_needed()
    await page.evaluate("document.getElementById('requests-heading').scrollIntoView()")
    await page.screenshot(path=HERE / "page-phone-requests.png")
    await context.close()


async def main() -> None:
    HERE.mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="splitferry-")))
        broker = await stack.enter_async_context(LocalBroker(directory / "broker"))
        environment = {"SPLITFERRY_BOOTSTRAP_SERVERS": broker.bootstrap_servers}
        made = await command(environment, "topics", "create", "--partitions", str(PARTITIONS))
        if made.code:
            sys.exit(made.stderr)
        port, _ = free_ports(0)
        consumer = ConsumerProcess(
            [f"--root={directory / 'received'}", f"--web={HOST}:{port}", "--web-actions"],
            environment,
            directory / "consumer.log",
        )
        stack.push_async_callback(consumer.stop)
        await consumer.start()
        playwright = await stack.enter_async_context(async_playwright())
        browser = await launch(playwright)
        stack.push_async_callback(browser.close)
        producer = await stack.enter_async_context(sending(broker.bootstrap_servers))
        sent = asyncio.create_task(transfer(Sender(producer)))
        await asyncio.sleep(RUN)
        await take(browser, f"http://{HOST}:{port}/")
        sent.cancel()
        await asyncio.wait([sent])


if __name__ == "__main__":
    asyncio.run(main())
