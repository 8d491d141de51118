"""What the live page shows of a real consumer on a real broker."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator

import psutil
import pytest
from playwright.async_api import expect

from browsing import Ferry, row
from splitferry_producer import Producer, StreamSource
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Result
from workload import cut

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

MIB = 1024 * 1024


async def test_a_row_appears_fills_and_becomes_a_result(ferry: Ferry) -> None:
    more = asyncio.Semaphore(0)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(6):
            await more.acquire()
            yield bytes(MIB // 2)

    names = ferry.scene.names
    async with (
        ferry.page() as page,
        Producer(
            ConnectionSettings(ferry.scene.servers),
            splits_topic=names.splits,
            results_topic=names.results,
            split_size=MIB // 2,
        ) as producer,
    ):
        sending = asyncio.create_task(producer.send(StreamSource(slow()), unique_id="slow/stream"))
        shown = row(page, "slow/stream")
        bar = shown.locator("svg")
        # One piece is held back until the next is there.
        more.release()
        more.release()
        await expect(bar).to_have_attribute(
            "aria-label",
            "512.0 KiB received of an item of unknown size, 1 missing range: from 512.0 KiB on",
        )
        drawn = await bar.locator(".received").get_attribute("d")
        for _ in range(2):
            more.release()
        await expect(shown).to_contain_text("1.5 MiB")
        await expect(shown).to_contain_text("of unknown size")
        assert await bar.locator(".received").get_attribute("d") == drawn  # all that is known of
        for _ in range(2):
            more.release()
        result = await sending
        assert isinstance(result, Result)
        assert result.success
        await expect(shown).to_have_count(0)
        told = row(page, "slow/stream", "results")
        await expect(told).to_contain_text("completed")
        await expect(told).to_contain_text("3.0 MiB")
        chart = page.get_by_role("img", name="Throughput of the last 5 minutes: now ")
        assert not (await chart.get_attribute("aria-label") or "").endswith("most 0 B/s")


async def test_the_bar_shows_which_ranges_are_there(ferry: Ferry) -> None:
    splits = cut(RequestId(6, 1), bytes(8000), 1000, unique_id="ranges")
    async with ferry.page() as page:
        bar = row(page, "ranges").locator("svg")
        await ferry.scene.send([splits[0], splits[3]])
        await expect(bar).to_have_attribute(
            "aria-label",
            "25.0 % received, 2 missing ranges: 1000 B to 2.9 KiB, 3.9 KiB to 7.8 KiB",
        )
        received = bar.locator(".received")
        await expect(received).to_have_attribute("d", "M0 0h32v1h-32zM96 0h32v1h-32z")
        # One byte is missing: its column is not drawn as full, however small its share is.
        short = splits[1]._replace(payload=splits[1].payload[:-1])
        await ferry.scene.send([short, splits[2]])
        await expect(received).to_have_attribute("d", "M0 0h63v1h-63zM64 0h64v1h-64z")
        await expect(bar.locator(".partial")).to_have_attribute("d", "M63 0h1v1h-1z")
        await expect(row(page, "ranges")).to_contain_text("missing 1 B at byte 1,999")
        await ferry.scene.send(splits)
        await expect(row(page, "ranges", "results")).to_contain_text("completed")


async def test_a_failure_shows_its_reason(ferry: Ferry) -> None:
    [split] = cut(RequestId(6, 2), bytes(3000), 3000, unique_id="wrong/digest")
    async with ferry.page() as page:
        await ferry.scene.send([split._replace(sha256=bytes(32))])
        failure = row(page, "wrong/digest", "failures")
        await expect(failure).to_contain_text("failed")
        await ferry.scene.told(split.request)
        [told] = [o.told for o in await ferry.scene.outcomes() if o.told.request == split.request]
        assert isinstance(told, Result)
        assert told.error is not None
        await expect(failure).to_contain_text(f"{told.error.code}: {told.error.message}")
        await expect(page.locator("#said")).to_contain_text(f"Request {split.request} failed")
        await expect(page.locator("#figure-failures")).not_to_have_text("0")


async def test_who_holds_w_is_named_within_10_s(ferry: Ferry) -> None:
    async with ferry.page() as page:
        begun = time.monotonic()
        rest = await ferry.half(3, "half/sent", partition=1)
        holder = page.locator("#partitions tr").nth(1).locator(".holder")
        await expect(holder).to_contain_text("6-3 half/sent", timeout=10_000, use_inner_text=True)
        await expect(holder).to_contain_text("missing 3.9 KiB to 7.8 KiB")
        assert time.monotonic() - begun < 10
        await ferry.scene.send(rest, partition=1)
        await expect(holder).to_have_text("nobody", use_inner_text=True)


async def test_what_a_producer_writes_is_only_ever_text(ferry: Ferry) -> None:
    hostile = {
        "<script>alert(1)</script><img src=x onerror=alert(2)>": None,
        '"><svg onload=alert(3)>&lt;b&gt;': None,
        "report\u202efdp.exe": "reportU+202Efdp.exe",
        "a\x01\x1b[31m\n\u2028\u200bb": "aU+0001U+001B[31mU+000AU+2028U+200Bb",
        "W" * 512: None,
        "Z" + "\u0301" * 200: None,
        "family 👩‍👩‍👧 \u05d0/\u0628": None,
    }
    async with ferry.page() as page:
        sent = [await ferry.half(10 + n, x, block=Block.MEM) for n, x in enumerate(hostile)]
        for number, (name, seen) in enumerate(hostile.items(), 10):
            shown = row(page, f"6-{number} ")
            await expect(shown.locator(".name")).to_have_text(seen or name, use_inner_text=False)
            assert await shown.locator("script, img, b, svg:not(.ranges)").count() == 0
            box = await shown.bounding_box()
            assert box is not None
            assert box["height"] < 130  # three lines of it, and what stands below
        wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        for rest in sent:
            await ferry.scene.send(rest)
        await expect(page.locator("#requests > *")).to_have_count(0)


async def test_focus_stays_while_rows_change(ferry: Ferry) -> None:
    async with ferry.page(query="find=focus&sort=newest") as page:
        first = await ferry.half(20, "focus/first")
        second = await ferry.half(21, "focus/second")
        await row(page, "focus/second").locator("button").focus()
        third = await ferry.half(22, "focus/third")
        await expect(page.locator("#requests .name")).to_have_text(
            ["focus/third", "focus/second", "focus/first"]
        )
        await expect(row(page, "focus/second").locator("button")).to_be_focused()
        await ferry.scene.send([*third, *first])
        await expect(page.locator("#requests .name")).to_have_text(["focus/second"])
        await expect(row(page, "focus/second").locator("button")).to_be_focused()
        await ferry.scene.send(second)
        await expect(page.locator("#requests > *")).to_have_count(0)
        await expect(page.locator("#requests-heading")).to_be_focused()


async def test_an_abort_by_the_keyboard_alone(ferry: Ferry) -> None:
    async with ferry.page("404", query="find=to/abort") as page:
        await ferry.half(30, "to/abort", partition=1)
        await row(page, "to/abort").wait_for()
        await page.locator("#limit").focus()
        await page.keyboard.press("Tab")
        await expect(row(page, "to/abort").locator("button")).to_be_focused()
        await page.keyboard.press("Enter")
        details = page.get_by_role("dialog", name="6-30")
        await expect(details).to_contain_text("4,000 of 8,000 bytes")
        await expect(details).to_contain_text("4,000 to 8,000")
        await details.get_by_role("button", name="Abort …").focus()
        await page.keyboard.press("Enter")
        await expect(details.get_by_label("Reason")).to_be_focused()
        await page.keyboard.press("Enter")  # without a reason nothing is sent
        await expect(details.get_by_label("Reason")).to_be_visible()
        await page.keyboard.type("not <i>wanted</i>")
        await page.keyboard.press("Enter")
        await expect(details.get_by_role("status")).to_contain_text("aborted: not <i>wanted</i>")
        await expect(details.get_by_role("button", name="Abort")).to_have_count(0)
        await page.keyboard.press("Escape")
        await expect(details).to_be_hidden()
        await expect(page.locator("#requests-heading")).to_be_focused()
        await expect(row(page, "to/abort", "failures")).to_contain_text("aborted")
        await expect(page.locator("#partitions tr").nth(1)).to_contain_text("nobody")


async def test_pages_and_search_are_the_consumers(ferry: Ferry) -> None:
    names = [f"paged/{n:02}" for n in range(15)]
    async with ferry.page(query="find=paged&limit=10") as page:
        sent = [await ferry.half(40 + n, name) for n, name in enumerate(names)]
        rows = page.locator("#requests .name")
        await expect(rows).to_have_text(names[:10])
        await expect(page.locator("#pager-text")).to_have_text(re.compile("^1 to 10 of 15 found"))
        await page.get_by_role("button", name="Next").click()
        await expect(rows).to_have_text(names[10:])
        await page.keyboard.press("Enter")  # the button keeps the focus, and leads nowhere
        await expect(page.get_by_role("button", name="Next")).to_be_focused()
        await page.get_by_label("Find").fill("PAGED/07")
        await expect(rows).to_have_text(["paged/07"])
        await expect(page.locator("#said")).to_have_text(re.compile("^1 of [0-9]+ requests found"))
        await page.get_by_label("Find").fill("paged")
        await page.get_by_role("button", name="Last").click()
        await expect(rows).to_have_text(names[10:])
        for rest in sent[8:]:
            await ferry.scene.send(rest)
        # The last page is another one now.
        await expect(rows).to_have_text(names[:8])
        for rest in sent[:8]:
            await ferry.scene.send(rest)
        await expect(rows).to_have_count(0)


async def test_a_hidden_page_does_nothing(ferry: Ferry) -> None:
    async with ferry.page() as page:
        hide = """hidden => {
            Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
        await page.evaluate(hide, True)
        await page.evaluate(
            "window.changes = 0; new MutationObserver(all => changes += all.length)"
            ".observe(document, {subtree: true, childList: true, attributes: true})"
        )
        await ferry.scene.send(await ferry.half(60, "unseen"))
        await ferry.scene.told(RequestId(6, 60))
        await asyncio.sleep(2)
        assert await page.evaluate("changes") == 0
        await page.evaluate(hide, False)
        await expect(row(page, "unseen", "results")).to_contain_text("completed")


async def test_a_stopped_consumer_is_said_plainly(ferry: Ferry) -> None:
    # How the last answer ends depends on when it is cut off.
    cut_off = "ERR_(CONNECTION_(REFUSED|RESET|CLOSED)|INCOMPLETE_CHUNKED|EMPTY_RESPONSE)"
    async with ferry.page(cut_off) as page:
        # Frozen: the kernel takes what is sent to it, and nothing answers.
        ferry.consumer.freeze()
        try:
            await expect(page.locator("#lost")).to_contain_text("does not answer since")
        finally:
            ferry.consumer.thaw()
        await expect(page.locator("#connection")).to_have_attribute("data-state", "live")
        await expect(page.locator("#lost")).to_be_hidden()
        await ferry.consumer.stop()
        await expect(page.locator("#lost")).to_contain_text("it has stopped, cannot be reached, or")
        await expect(page.locator("#said")).to_have_text("The consumer does not answer.")
        await ferry.restart(actions=False)
        await expect(page.locator("#connection-text")).to_have_text("live, running")
        # This one takes no actions, so none is offered.
        await ferry.half(70, "no/actions")
        await row(page, "no/actions").locator("button").click()
        await expect(page.get_by_role("dialog")).to_contain_text("4,000 of 8,000 bytes")
        await expect(page.get_by_role("button", name="Abort")).to_have_count(0)


async def test_a_disk_that_was_not_looked_at_is_no_trouble(ferry: Ferry) -> None:
    async with ferry.page() as page:
        status = await (await page.request.get(f"{ferry.url}status")).json()
        status["disk"]["free"] = None
        body = f"event: status\ndata: {json.dumps(status)}\n\n"
        await page.route(
            "**/events*", lambda route: route.fulfill(content_type="text/event-stream", body=body)
        )
        await page.reload()
        await expect(page.locator("#figure-reserve")).to_contain_text("stay free")
        await expect(page.locator("#figure-disk")).to_have_text("–")  # noqa: RUF001
        await expect(page.locator("#troubles")).not_to_contain_text("The disk")


async def test_a_worker_that_stands_still_is_said_plainly(ferry: Ferry) -> None:
    await ferry.consumer.stop()
    await ferry.restart(actions=False, WORKERS="2")
    async with ferry.page() as page:
        held = page.locator("#partitions > *")
        await expect(held).to_contain_text(["worker", "worker"])
        await expect(held.filter(has_text="worker 2")).to_have_count(1)
        status = await (await page.request.get(f"{ferry.url}status")).json()
        frozen = psutil.Process(status["workers"][1]["pid"])
        frozen.suspend()
        try:
            await expect(page.locator("#troubles")).to_contain_text(
                "Worker 2 is missing: it does not answer"
            )
            await expect(held.filter(has_text="worker 2")).to_contain_text("missing")
            await expect(held.filter(has_text="worker 1")).to_contain_text("reading")
        finally:
            frozen.resume()
        await expect(page.locator("#troubles")).not_to_contain_text("Worker 2")
        await expect(held).to_contain_text(["reading", "reading"])
