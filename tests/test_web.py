"""What the web page's server answers about a consumer, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from bench import captured_logs
from memory_transport import Kafka
from owners import results, until
from splitferry_consumer.service import Service, Settings, StartError
from splitferry_consumer.targets.file import FileIncoming
from splitferry_consumer.transport import TransportError
from splitferry_consumer.web import app as app_module
from splitferry_consumer.web import health as health_module
from splitferry_consumer.web import metrics as metrics_module
from splitferry_consumer.web import server as server_module
from splitferry_consumer.web import source as source_module
from splitferry_consumer.web.app import ActionFailed
from splitferry_consumer.web.server import serving
from splitferry_consumer.web.source import OneProcess
from splitferry_consumer.web.status import _Clock
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Status
from watching import Watched, watched
from world import split

HOSTILE = '<script>alert(1)</script>"\u202e\u2028\n\x00event: status\r\n\r\ndata: {}é😀'


@pytest.fixture
async def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    async with watched(tmp_path / "root", monkeypatch) as made:
        await until(made.service.assigned.is_set)
        yield made


def half(kafka: Kafka, request: int, partition: int = 0, **more: Any) -> None:
    """The first half of an item of 8 bytes."""
    kafka.send(split(request, 0, b"half", total=8, **{"block": Block.FILE, **more}), partition)


async def opened(page: Watched, count: int) -> Any:
    """The status, once that many requests are open."""

    async def have() -> bool:
        return bool((await page.status())["requests"]["total"] == count)

    async with asyncio.timeout(20):
        while not await have():
            await asyncio.sleep(0.01)
    return await page.status()


# ---- the status


async def test_what_a_status_says_of_an_open_request(page: Watched) -> None:
    half(page.kafka, 1, 1, labels={"team": "blue"})
    status = await opened(page, 1)
    assert (status["phase"], status["group"], status["pid"]) == ("running", "group", os.getpid())
    assert status["topics"] == {
        "splits": "splits",
        "results": "results",
        "dead_letters": "dead-letters",
    }
    (row,) = status["requests"]["shown"]
    opened_at, active_at = row.pop("opened_at"), row.pop("active_at")
    assert (opened_at, active_at) == (1000, 1000), "the log's word"
    assert abs(status["now"] - time.time() * 1000) < 60_000
    assert row.pop("rate") > 0
    assert row.pop("remaining") > 0
    assert row == {
        "request": "1-1",
        "partition": 1,
        "first": 0,
        "unique_id": "item-1",
        "version": "1",
        "block": "file",
        "size": 8,
        "received": 4,
        "ranges": [[0, 4]],
        "exact": True,
        "missing": [[4, 8]],
        "gaps": 1,
        "target": f"{status['root']}/item-1",
        "state": "open",
        "splits": 1,
        "duplicates": 0,
        "labels": {"team": "blue"},
    }
    idle, busy = status["partitions"]
    assert (idle["partition"], idle["holder"], idle["lag"], idle["open"]) == (0, None, 0, 0)
    assert (busy["state"], busy["watermark"], busy["position"], busy["end"]) == ("reading", 0, 1, 1)
    holder = busy["holder"]
    assert (holder["request"], holder["since"], holder["missing"]) == ("1-1", opened_at, [[4, 8]])
    assert status["throughput"] == [{"at": status["throughput"][0]["at"], "bytes": 4, "results": 0}]
    assert status["disk"]["free"] > status["disk"]["reserve"] > 0


async def test_what_has_ended_is_among_the_results_and_failures(page: Watched) -> None:
    page.kafka.send(split(1, 0, b"whole", total=5, block=Block.FILE))
    half(page.kafka, 2)
    half(page.kafka, 2, version=2)
    page.kafka.send_raw(b"no-request", b"value")
    await until(lambda: len(results(page.kafka)) == 2)
    status = await opened(page, 0)
    ended = {row["request"]: row["status"] for row in status["results"]}
    assert ended == {"1-1": "completed", "1-2": "failed"}
    (failure,) = status["failures"]
    assert failure["error"]["code"] == "VersionMismatch"
    assert "version" in failure["error"]["message"]
    await until(lambda: page.service.observer.dead_letters == 2)
    dead = (await page.status())["dead_letters"]
    assert [(d["offset"], d["error"], d["key"]) for d in dead] == [
        (3, "BatchTransferError", "no-request"),
        (2, "VersionMismatch", "1-2"),
    ]
    assert (await page.status())["partitions"][0]["holder"] is None


async def test_of_a_huge_key_only_what_is_shown_is_kept(page: Watched) -> None:
    page.kafka.send_raw(b"k" * 1_000_000, b"value")
    await until(lambda: page.service.observer.dead_letters == 1)
    (died,) = page.service.observer.dead
    assert len(died.key or b"") + len(died.message) < 2000
    assert (await page.status())["dead_letters"][0]["key"] == "k" * 128


async def test_an_item_of_unknown_size(page: Watched) -> None:
    page.kafka.send(split(1, 2, b"half", total=None))
    (row,) = (await opened(page, 1))["requests"]["shown"]
    assert (row["size"], row["remaining"], row["target"]) == (None, None, None)
    assert (row["missing"], row["gaps"]) == ([[0, 2], [6, None]], 2)


async def test_a_window_on_the_open_requests(page: Watched) -> None:
    for number in range(1, 8):
        size = 100 - number
        content = split(number, 0, b"x", total=size, unique_id=f"Item/{number % 2}/{number}")
        page.kafka.send(content, partition=number % 2)
    await opened(page, 7)

    async def window(**query: str | int) -> list[int]:
        shown = (await page.status(**query))["requests"]["shown"]
        return [int(row["request"].partition("-")[2]) for row in shown]

    assert await window() == [2, 1, 4, 3, 6, 5, 7]
    assert await window(offset=2, limit=3) == [4, 3, 6]
    assert await window(offset=7) == []
    assert await window(sort="newest", offset=1, limit=2) == [6, 5]
    assert await window(sort="largest", limit=2) == [1, 2]
    page.kafka.send(split(2, 50, b"x", total=98, unique_id="Item/0/2"), partition=0)
    await until(lambda: page.service.observer.splits == 8)
    assert await window(sort="stalled") == [1, 4, 3, 6, 5, 2, 7]
    assert await window(find="ITEM/0/") == [2, 4, 6]
    assert await window(find="1-7") == [7]
    assert await window(find="<nothing>") == []
    found = (await page.status(find="item/1", limit=1))["requests"]
    assert (found["total"], found["matching"], len(found["shown"])) == (7, 4, 1)


@pytest.mark.parametrize(
    "query",
    [
        {"offset": "-1"},
        {"offset": "٣"},
        {"offset": "9" * 400},
        {"limit": "201"},
        {"limit": "x"},
        {"sort": "random"},
        {"find": "x" * 513},
    ],
)
async def test_a_query_that_cannot_be_is_refused(page: Watched, query: dict[str, str]) -> None:
    for path in ("status", "events"):
        answer = await page.client.get(path, params=query)
        assert answer.status_code == 400
        assert next(iter(query)) in answer.text


async def test_one_request_whole(page: Watched) -> None:
    for offset in range(0, 600, 2):
        page.kafka.send(split(1, offset, b"x", total=1000))
    await until(lambda: page.service.observer.splits == 300)
    (row,) = (await page.status())["requests"]["shown"]
    assert (row["exact"], len(row["ranges"]) <= 128, len(row["missing"])) == (False, True, 16)
    whole = await page.json("requests/1-1")
    assert whole["ranges"] == [[offset, offset + 1] for offset in range(0, 600, 2)]
    assert whole["exact"]
    assert len(whole["missing"]) == whole["gaps"] == row["gaps"] == 300
    assert (await page.client.get("requests/1-2")).status_code == 404
    for hostile in ("x", "1-01", "-1-1", "1-1%0d%0aX: y", "%3Cscript%3E"):
        answer = await page.client.get(f"requests/{hostile}")
        assert answer.status_code == 400
        assert answer.headers["content-type"].startswith("text/plain")


async def test_whatever_a_producer_writes_is_data(page: Watched) -> None:
    labels = {HOSTILE: HOSTILE}
    page.kafka.send(split(1, 0, b"half", total=8, unique_id=HOSTILE, labels=labels))
    page.kafka.send_raw(HOSTILE.encode() + b"\xff", b"value")
    await opened(page, 1)
    answer = await page.client.get("status")
    assert answer.text.isascii()
    assert "\n" not in answer.text
    assert answer.headers["content-type"] == "application/json"
    (row,) = answer.json()["requests"]["shown"]
    assert (row["unique_id"], row["labels"]) == (HOSTILE, labels)
    await until(lambda: page.service.observer.dead_letters == 1)
    (dead,) = (await page.status())["dead_letters"]
    assert dead["key"].startswith("<script>")
    assert HOSTILE.splitlines()[0] not in (await page.client.get("metrics")).text


async def test_a_clock_of_the_log_that_is_ahead_does_not_hide_an_age(page: Watched) -> None:
    half(page.kafka, 1)
    await opened(page, 1)
    ledger = page.service.partitions[0].ledger
    assert ledger is not None
    (state,) = ledger.states.values()
    state.opened_at = state.grown_at = 2**50
    state.active_at -= metrics_module.STANDSTILL
    window = (await page.status())["requests"]
    row = window["shown"][0]
    assert abs(row["opened_at"] - time.time() * 1000) < 60_000
    # The order goes by the log's word, also where several processes are merged by it.
    assert window["keys"] == [[2**50, 0, 0]]
    state.opened_at = 1_000_000
    assert (await page.status())["requests"]["shown"][0]["opened_at"] == 1_000_000
    age = (await page.metrics())['splitferry_watermark_age_seconds{partition="0",request="1-1"}']
    assert age > 1e9


# ---- the page and its stream


async def test_the_page_and_what_guards_it(page: Watched) -> None:
    for path in ("", "static/page.js", "static/page.css"):
        answer = await page.client.get(path)
        assert answer.status_code == 200, path
    for path in (
        "",
        "static/page.js",
        "status",
        "nowhere",
        "requests/x",
        "metrics",
        "static/../app.py",
    ):
        answer = await page.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    assert (await page.client.get("static/%2e%2e/app.py")).status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "127.0.0.2"])
async def test_another_name_for_loopback_is_not_answered(page: Watched, host: str) -> None:
    for path in ("", "status", "events", "metrics"):
        answer = await page.client.get(path, headers={"Host": host})
        assert answer.status_code == 400, (path, answer.text)
    for name in ("localhost", "127.0.0.1:9", "[::1]:80"):
        assert (await page.client.get("healthz", headers={"Host": name})).status_code == 200


async def events(client: httpx.AsyncClient, **query: str) -> AsyncIterator[tuple[str, Any]]:
    """(event, data) of each block of the stream; a comment is an event of that name."""
    async with client.stream("GET", "events", params=query, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event = ""
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                yield event, json.loads(value)
            elif line.startswith(":"):
                yield "comment", None


async def test_a_stream_tells_what_is_new_and_nothing_else(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "STREAM_INTERVAL", 0.02)
    monkeypatch.setattr(app_module, "KEEP_ALIVE", 0.1)
    monkeypatch.setattr(source_module, "SETTLES", 0.0)
    stream = events(page.client, find="item-2")
    try:
        event, first = await anext(stream)
        assert (event, first["requests"]["total"]) == ("status", 0)
        while event == "status":  # the start itself is news
            event, _ = await anext(stream)
        assert event == "comment"
        half(page.kafka, 1)
        half(page.kafka, 2)
        shown: list[Any] = []
        while not shown:
            event, status = await anext(stream)
            shown = status["requests"]["shown"] if event == "status" else []
        assert [row["request"] for row in shown] == ["1-2"]
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def test_bytes_in_flight_that_were_written_are_news(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    write_at = FileIncoming.write_at

    def held_up(self: FileIncoming, offset: int, data: memoryview | bytes) -> None:
        free.wait(60)
        write_at(self, offset, data)

    monkeypatch.setattr(FileIncoming, "write_at", held_up)
    monkeypatch.setattr(source_module, "SETTLES", 0.1)
    monkeypatch.setattr(app_module, "STREAM_INTERVAL", 0.02)
    monkeypatch.setattr(app_module, "KEEP_ALIVE", 0.2)
    stream = events(page.client)

    async def shown(holds: Callable[[int], bool]) -> None:
        async for kind, status in stream:
            if kind == "status" and holds(status["flow"]["in_flight"]):
                return

    try:
        half(page.kafka, 1)
        async with asyncio.timeout(20):
            await shown(lambda count: count > 0)
            while (await anext(stream))[0] == "status":  # until there is no more news
                pass
            free.set()
            await shown(lambda count: count == 0)
    finally:
        free.set()
        await stream.aclose()  # type: ignore[attr-defined]


async def test_streams_are_bounded_and_given_back(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "STREAMS_MAX", 1)
    monkeypatch.setattr(app_module, "STREAM_INTERVAL", 0.02)
    first = events(page.client)
    await anext(first)
    answer = await page.client.get("events")
    assert answer.status_code == 503
    assert "already" in answer.text
    await first.aclose()  # type: ignore[attr-defined]

    async def free() -> bool:
        async with page.client.stream("GET", "events") as again:
            return again.status_code == 200

    async with asyncio.timeout(20):
        while not await free():
            await asyncio.sleep(0.02)


async def test_streams_are_bounded_when_all_ask_at_once(page: Watched) -> None:
    url = page.client.base_url
    with contextlib.ExitStack() as all_asking:
        asking = [
            all_asking.enter_context(socket.create_connection((url.host, url.port or 80)))
            for _ in range(app_module.STREAMS_MAX + 8)
        ]
        for one in asking:
            one.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            one.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            answers = [await loop.sock_recv(one, 12) for one in asking]
        assert answers.count(b"HTTP/1.1 200") == app_module.STREAMS_MAX


async def test_an_open_stream_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        async with watched(tmp_path / "root", monkeypatch) as page:
            client.base_url = page.client.base_url
            stream = events(client)
            await anext(stream)
            began = time.monotonic()
        assert time.monotonic() - began < page.service.settings.grace / 2
        async with asyncio.timeout(20):
            async for _ in stream:
                pass


async def test_who_does_not_read_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "STREAM_INTERVAL", 0.001)
    long = "/".join(["x" * 100] * 5)
    with contextlib.ExitStack() as deaf:
        async with watched(tmp_path / "root", monkeypatch) as page:
            for number in range(100):
                half(page.kafka, 1000 + number, 1, unique_id=f"{long}{number}")
            await opened(page, 100)
            url = page.client.base_url
            for _ in range(8):
                client = deaf.enter_context(socket.create_connection((url.host, url.port or 80)))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(b"GET /events?limit=100 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for number in range(50):
                page.kafka.send(split(number, 0, b"whole", total=5, block=Block.FILE))
                await asyncio.sleep(0.01)
            await until(lambda: len(results(page.kafka)) == 50)
            assert (await page.client.get("healthz")).status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 15


# ---- metrics


async def test_metrics_count_what_happens(page: Watched) -> None:
    page.kafka.send(split(1, 0, b"whole", total=5, block=Block.FILE))
    page.kafka.send(split(1, 0, b"whole", total=5, block=Block.FILE))
    half(page.kafka, 2, 1)
    half(page.kafka, 2, 1)
    page.kafka.send_raw(b"no-request", b"value", partition=1)
    await until(lambda: page.service.observer.requests[Status.COMPLETED] == 1)
    await until(lambda: page.service.observer.dead_letters == 1)
    await until(lambda: page.service.observer.splits == 4)
    await until(lambda: not any(held.gauge.bytes for held in page.service.partitions))
    metrics = await page.metrics()
    expected = {
        'splitferry_received_bytes_total{block="file"}': 18,
        'splitferry_received_bytes_total{block="mem"}': 0,
        "splitferry_splits_total": 4,
        "splitferry_duplicate_splits_total": 1,
        'splitferry_requests_total{status="completed"}': 1,
        'splitferry_requests_total{status="failed"}': 0,
        'splitferry_open_requests{partition="0"}': 0,
        'splitferry_open_requests{partition="1"}': 1,
        'splitferry_unsettled_requests{partition="1"}': 0,
        'splitferry_watermark{partition="0"}': 2,
        'splitferry_watermark{partition="1"}': 0,
        'splitferry_lag_records{partition="1"}': 0,
        'splitferry_partitions{state="reading"}': 2,
        'splitferry_partitions{state="refused"}': 0,
        "splitferry_dead_letters_total": 1,
        "splitferry_partition_retakes_total": 0,
        "splitferry_in_flight_bytes": 0,
    }
    assert {series: metrics.get(series) for series in expected} == expected
    transactions = [v for s, v in metrics.items() if s.startswith("splitferry_transaction_seconds")]
    assert metrics['splitferry_transaction_seconds_bucket{le="+Inf"}'] >= 2
    assert len(transactions) == 14
    assert metrics["splitferry_disk_free_bytes"] > 0


async def test_metrics_name_who_holds_w_where_it_stands_still(page: Watched) -> None:
    half(page.kafka, 1, 1)
    await opened(page, 1)
    assert not any("request=" in series for series in await page.metrics())
    ledger = page.service.partitions[1].ledger
    assert ledger is not None
    ledger.states[RequestId(1, 1)].active_at -= metrics_module.STANDSTILL
    metrics = await page.metrics()
    for kind in ("age", "idle"):
        series = f'splitferry_watermark_{kind}_seconds{{partition="1",request="1-1"}}'
        assert metrics.pop(series) >= metrics_module.STANDSTILL
    assert not any("request=" in series for series in metrics)


async def test_counters_outlive_the_tenancy_of_a_partition(page: Watched) -> None:
    whole = split(1, 0, b"whole", total=5, block=Block.FILE)
    page.kafka.send(whole)
    await until(lambda: len(results(page.kafka)) == 1)
    page.kafka.send(whole)
    await until(lambda: page.service.observer.splits == 2)
    before = await page.metrics()
    assert before["splitferry_duplicate_splits_total"] == 1
    page.kafka.gates["writer"].clear()  # it is not taken again before it was looked at
    page.service.partitions[0].retake(TransportError("something went wrong"))
    await until(lambda: page.service.partitions[0].ledger is None)
    after = await page.metrics()
    assert after["splitferry_duplicate_splits_total"] == 1
    assert after["splitferry_partition_retakes_total"] == 1
    status = (await page.status())["partitions"][0]
    assert (status["state"], status["reason"]) == ("taking", "something went wrong")
    assert (status["watermark"], status["holder"], status["lag"]) == (None, None, None)
    page.kafka.gates["writer"].set()
    await until(lambda: page.service.partitions[0].trouble is None)
    assert (await page.status())["partitions"][0]["state"] == "reading"


# ---- health


async def test_ready_says_what_is_not(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "LOOK_INTERVAL", 0.01)

    async def readiness() -> tuple[int, list[str]]:
        answer = await page.client.get("readyz")
        checks = answer.json()["checks"]
        return answer.status_code, [name for name, check in checks.items() if not check["ok"]]

    async def becomes(code: int, *missing: str) -> None:
        async with asyncio.timeout(20):
            while await readiness() != (code, list(missing)):
                await asyncio.sleep(0.01)

    await becomes(200)
    assert (await page.client.get("healthz")).json() == {"ok": True, "detail": "running"}
    root = page.service.settings.root
    moved = root.rename(root.with_name("moved"))
    await becomes(503, "root")
    assert "cannot be written" in (await page.client.get("readyz")).text
    moved.rename(root)
    await becomes(200)
    page.kafka.gates["topics"].clear()
    monkeypatch.setattr(health_module, "LOOK_BOUND", 0.05)
    await becomes(503, "broker")
    page.kafka.gates["topics"].set()
    await becomes(200)
    # What is in flight holds up the end of the membership, of which no broker is asked any more.
    page.kafka.gates["commit"].clear()
    page.kafka.send(split(1, 0, b"whole", total=5, block=Block.FILE))
    await until(lambda: "commit" in page.kafka.calls)
    page.service.stop()
    await becomes(503, "assigned")
    page.kafka.gates["commit"].set()


async def test_a_disk_that_hangs_is_told_and_holds_up_nobody(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(health_module, "LOOK_BOUND", 0.05)
    answers, asked = threading.Event(), 0
    statvfs = os.statvfs

    def hangs(path: Path) -> os.statvfs_result:
        nonlocal asked
        asked += 1
        answers.wait(20)
        return statvfs(path)

    async def root() -> Any:
        return (await page.client.get("readyz")).json()["checks"]["root"]

    async def becomes(ok: bool) -> None:
        async with asyncio.timeout(10):
            while (await root())["ok"] is not ok:
                await asyncio.sleep(0.01)

    await becomes(True)
    monkeypatch.setattr(os, "statvfs", hangs)
    try:
        await becomes(False)
        assert "does not answer" in (await root())["detail"]
        assert (await page.status())["disk"]["free"] > 0, "the last that was told"
        assert asked == 1, "no second thread joins the first"
    finally:
        answers.set()
    await becomes(True)


async def test_a_member_without_a_partition_is_ready(page: Watched) -> None:
    await page.member.assign([])
    checks = (await page.client.get("readyz")).json()["checks"]
    assert checks["assigned"] == {
        "ok": True,
        "detail": "all partitions are with other members of the group",
    }
    assert (await page.metrics())['splitferry_partitions{state="reading"}'] == 0


async def test_a_consumer_that_asks_kafka_nothing_any_more_is_dead(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.kafka.gates["poll"].clear()
    monkeypatch.setattr(health_module, "STALLED", 0.1)
    async with asyncio.timeout(20):
        while (await page.client.get("healthz")).status_code != 503:
            await asyncio.sleep(0.01)
    assert "nothing was asked" in (await page.client.get("healthz")).json()["detail"]
    page.kafka.gates["poll"].set()


# ---- actions


async def test_abort_ends_a_request(page: Watched) -> None:
    half(page.kafka, 1, 1)
    await opened(page, 1)
    answer = await page.action("1-1", "sent by mistake")
    assert answer.status_code == 202, answer.text
    await until(lambda: len(results(page.kafka, 1)) == 1)
    status = await opened(page, 0)
    assert status["failures"][0]["status"] == "aborted"
    assert "sent by mistake" in status["failures"][0]["error"]["message"]
    assert status["partitions"][1]["holder"] is None
    assert (await page.action("1-1")).status_code == 404


async def test_nobody_else_acts(page: Watched) -> None:
    half(page.kafka, 1)
    await opened(page, 1)
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"token": ""},
        {"token": "guessed"},
        {"token": "é"},
    ):
        answer = await page.action("1-1", **headers)
        assert answer.status_code == 403, headers
    form = {"origin": "http://evil.example", "content_type": "application/x-www-form-urlencoded"}
    assert (await page.action("1-1", **form)).status_code == 403
    assert (await page.action("1-1", content_type="text/plain")).status_code == 415
    assert (await page.client.get("requests/1-1/abort")).status_code == 405
    assert (await page.client.options("requests/1-1/abort")).status_code == 405
    await opened(page, 1)


async def test_actions_are_for_the_own_address_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(tmp_path / "root", monkeypatch, host="0.0.0.0") as page:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[evil]", ":80"):
            answer = await page.action("1-1", host=host, origin=f"http://{host}")
            assert answer.status_code == 403, host
            assert "own address" in answer.text
        own = ("[::1]:8080", "192.0.2.1", "localhost:8080", socket.gethostname())
        for number, host in enumerate(own, 1):
            half(page.kafka, number)
            await opened(page, 1)
            answer = await page.action(f"1-{number}", host=host, origin=f"http://{host}")
            assert answer.status_code == 202, (host, answer.text)
            await opened(page, 0)


async def test_a_reason_that_cannot_be_is_refused(page: Watched) -> None:
    half(page.kafka, 1)
    await opened(page, 1)
    for reason, code in (("", 400), ("  ", 400), (7, 400), (None, 400), ("x" * 9000, 413)):
        assert (await page.action("1-1", reason)).status_code == code, reason
    for hostile in ("x", "1-1'; DROP TABLE", "..%2f1-1"):
        assert (await page.action(hostile)).status_code in {400, 404}, hostile
    page.failing.append(ValueError("reason: up to 1024 bytes"))
    assert (await page.action("1-1")).status_code == 400
    page.failing.append(ActionFailed("no broker answers"))
    answer = await page.action("1-1")
    assert (answer.status_code, answer.text) == (502, "no broker answers")


async def test_actions_are_off_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(tmp_path / "root", monkeypatch, actions=False) as page:
        half(page.kafka, 1)
        status = await opened(page, 1)
        assert (status["actions"], status["token"]) == (False, None)
        answer = await page.action("1-1")
        assert answer.status_code == 403
        assert "--web-actions" in answer.text


# ---- the server


def service_at(root: Path) -> Service:
    return Service(Settings(ConnectionSettings("127.0.0.1:1"), root))


async def test_an_address_that_cannot_be_had_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"127.0.0.1:{port} \(Address already in use\)"):
            async with serving(OneProcess(service_at(tmp_path)), "127.0.0.1", port):
                pytest.fail("served")
    with pytest.raises(StartError, match="choose another address with --web"):
        async with serving(OneProcess(service_at(tmp_path)), "192.0.2.1", 0):
            pytest.fail("served")


def test_a_request_stays_where_it_is_from_look_to_look() -> None:
    """Where its record says another time than ours, its place follows from our two clocks."""
    state: Any = SimpleNamespace(active_at=time.monotonic() - 1)
    looks = set()
    for _ in range(300):
        looks.add(_Clock().of(2**60, state))
        time.sleep(0.0001)
    assert len(looks) == 1


@pytest.mark.parametrize("host", ["..", "x" * 64])
async def test_a_name_that_cannot_be_one_is_told(tmp_path: Path, host: str) -> None:
    with pytest.raises(StartError, match=r"not the name of a host.*with --web"):
        async with serving(OneProcess(service_at(tmp_path)), host, 0):
            pytest.fail("served")


async def test_any_address_of_loopback_is_answered(tmp_path: Path) -> None:
    async with (
        serving(OneProcess(service_at(tmp_path)), "127.0.0.2", 0) as address,
        httpx.AsyncClient(base_url=address, trust_env=False) as client,
    ):
        assert (await client.get("healthz")).status_code == 200
        other = await client.get("healthz", headers={"Host": "evil.example"})
        assert other.status_code == 400


async def test_it_answers_before_the_consumer_has_started(tmp_path: Path) -> None:
    async with (
        serving(OneProcess(service_at(tmp_path / "root")), "127.0.0.1", 0) as address,
        httpx.AsyncClient(base_url=address, trust_env=False) as client,
    ):
        status = (await client.get("status")).json()
        assert (status["phase"], status["partitions"]) == ("starting", [])
        assert status["disk"]["total"] > 0, "of the directory above"
        assert (await client.get("healthz")).status_code == 200
        assert (await client.get("readyz")).status_code == 503
        assert (await client.get("metrics")).status_code == 200


async def test_who_connects_and_asks_nothing_keeps_nobody_out(page: Watched) -> None:
    idle = [
        await asyncio.open_connection("127.0.0.1", page.client.base_url.port)
        for _ in range(server_module.CONNECTIONS_MAX + 50)
    ]
    try:
        assert (await page.client.get("healthz")).status_code == 200
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionResetError):
                assert await idle[0][0].read() == b"", "it is closed"
    finally:
        for _, writer in idle:
            writer.close()


async def test_a_request_that_does_not_become_whole_is_given_up(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REQUEST_BOUND", 0.2)
    half_asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    half_told = b"POST /requests/1-1/abort HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    for sent in (b"", half_asked, half_asked + b"\r\n" + half_asked, half_told):
        reader, writer = await asyncio.open_connection("127.0.0.1", page.client.base_url.port)
        writer.write(sent)
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionResetError):
                while await reader.read(4096):
                    writer.write(b"X")  # a byte now and then is no whole request either
        writer.close()


async def test_what_is_asked_for_may_take_longer_than_asking(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REQUEST_BOUND", 1.0)
    monkeypatch.setattr(app_module, "STREAM_INTERVAL", 0.8)
    stream = events(page.client)
    for _ in range(3):
        await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]


async def test_an_answer_may_take_longer_to_be_read_than_a_request_to_come(
    page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REQUEST_BOUND", 2)
    made = server_module._Connection.connection_made

    def narrow(self: Any, transport: Any) -> None:
        # As on a slow line: the kernel takes little, and the rest stays in the transport.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        made(self, transport)

    monkeypatch.setattr(server_module._Connection, "connection_made", narrow)
    long = "/".join(["x" * 100] * 5)
    for number in range(200):
        half(page.kafka, number, unique_id=f"{long}{number}", labels={"text": "x" * 1000})
    await opened(page, 200)
    url = page.client.base_url
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        slow.connect((url.host, url.port or 80))
        reader, writer = await asyncio.open_connection(sock=slow, limit=4096)
        writer.write(b"GET /status?limit=200 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(4)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert length > 300_000
        assert len(await reader.readexactly(length)) == length
        writer.close()


async def test_what_is_no_http_is_not_logged(
    page: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", page.client.base_url.port)
    writer.write(b"\x16\x03\x01\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400")
    writer.close()
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


async def test_who_opens_it_to_others_is_warned(tmp_path: Path) -> None:
    with captured_logs() as logs:
        async with serving(OneProcess(service_at(tmp_path)), "0.0.0.0", 0) as address:
            port = httpx.URL(address).port
            async with httpx.AsyncClient(trust_env=False) as client:
                answer = await client.get(
                    f"http://127.0.0.1:{port}/healthz", headers={"Host": "consumer.example"}
                )
            assert answer.status_code == 200
    assert [line["log_level"] for line in logs if "no login" in line["event"]] == ["warning"]
