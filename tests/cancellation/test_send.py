"""A send that is cancelled, anywhere, ends its request with an abort record, and leaves nothing."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from brokers import Topics
from splitferry_producer import ConnectionSettings, MemorySource, Producer, StreamSource
from splitferry_protocol.records import Abort, Split
from splits_log import first_split, logged

Create = Callable[..., Awaitable[Topics]]


def producer_of(servers: str, names: Topics, state: Path, **options: Any) -> Producer:
    return Producer(
        ConnectionSettings(servers),
        splits_topic=names.splits,
        results_topic=names.results,
        state_dir=state,
        **options,
    )


async def stalling(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("wait", "ended"),
    [(True, True), (True, False), (False, False)],
    ids=["waiting", "reading", "reading, not to wait"],
)
async def test_a_cancelled_send_aborts_its_request(
    bootstrap_servers: str, topics: Create, tmp_path: Path, wait: bool, ended: bool
) -> None:
    names = await topics()
    async with producer_of(bootstrap_servers, names, tmp_path, split_size=1000) as producer:
        source = MemorySource(bytes(1000)) if ended else StreamSource(stalling(bytes(1500)))
        sending = asyncio.create_task(producer.send(source, unique_id="x", wait=wait))
        split = await first_split(bootstrap_servers, names)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        # The record was confirmed before the exception went on.
        (first, _), (partition, abort) = await logged(bootstrap_servers, names)
        assert abort == Abort(split.request, "the producer was interrupted")
        assert partition == first
        assert "0 waiting" in repr(producer)
        assert producer._budget.used == 0
        assert not producer._open


async def test_nothing_is_aborted_when_nothing_was_sent(
    bootstrap_servers: str, topics: Create, tmp_path: Path
) -> None:
    names = await topics()
    asked = asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        asked.set()
        await asyncio.Event().wait()
        yield b""

    async with producer_of(bootstrap_servers, names, tmp_path) as producer:
        sending = asyncio.create_task(producer.send(StreamSource(silent()), unique_id="x"))
        await asked.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert await logged(bootstrap_servers, names) == []


async def test_a_second_cancellation_does_not_stop_the_abort(
    bootstrap_servers: str, topics: Create, tmp_path: Path
) -> None:
    names = await topics()
    async with producer_of(bootstrap_servers, names, tmp_path) as producer:
        sending = asyncio.create_task(producer.send(MemorySource(b"x"), unique_id="x"))
        await first_split(bootstrap_servers, names)
        while not sending.done():
            sending.cancel()
            await asyncio.sleep(0)
        assert sending.cancelled()
    _, (_, abort) = await logged(bootstrap_servers, names)
    assert isinstance(abort, Abort)


@pytest.mark.parametrize("turns", range(0, 60, 4))
async def test_cancelled_at_any_turn_others_go_on(
    bootstrap_servers: str, topics: Create, tmp_path: Path, turns: int
) -> None:
    names = await topics(partitions=1)
    async with producer_of(
        bootstrap_servers, names, tmp_path, split_size=1000, memory=2000
    ) as producer:
        cancelled = [
            asyncio.create_task(
                producer.send(MemorySource(bytes(9000)), unique_id=f"c{number}", wait=False)
            )
            for number in range(4)
        ]
        kept = asyncio.create_task(
            producer.send(MemorySource(bytes(9000)), unique_id="kept", wait=False)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in cancelled:
            task.cancel()
        ends = await asyncio.gather(*cancelled, return_exceptions=True)
        await kept
        assert producer._budget.used == 0
    found = [record for _, record in await logged(bootstrap_servers, names)]
    opened = {record.request for record in found if isinstance(record, Split)}
    complete = {record.request for record in found if isinstance(record, Split) and record.sha256}
    aborted = {record.request for record in found if isinstance(record, Abort)}
    assert len(complete) >= 1 + sum(not isinstance(end, BaseException) for end in ends)
    # Whatever was begun has its end on the topic; whatever was only half sent is aborted.
    assert opened <= complete | aborted
    assert len([record for record in found if isinstance(record, Abort)]) == len(aborted)


PROGRAM = """
import asyncio, pathlib, signal, sys
from splitferry_producer import ConnectionSettings, Producer, StreamSource

# A shell starts what goes on in the background with SIGINT ignored, and tests inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    servers, splits, results, state = sys.argv[1:]
    async with Producer(
        ConnectionSettings(servers), splits_topic=splits, results_topic=results,
        state_dir=pathlib.Path(state), split_size=4,
    ) as producer:
        await producer.send(StreamSource(sys.stdin.buffer), unique_id="x")

asyncio.run(main())
"""


async def test_control_c_aborts_although_standard_input_goes_on(
    bootstrap_servers: str, topics: Create, tmp_path: Path
) -> None:
    names = await topics()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, bootstrap_servers, names.splits, names.results, tmp_path],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(b"12345")
        process.stdin.flush()
        split = await first_split(bootstrap_servers, names)
        process.send_signal(signal.SIGINT)
        # Its standard input stays open: a thread blocked in a read would keep the process.
        assert await asyncio.to_thread(process.wait, 30) in (130, -signal.SIGINT)
    _, (_, abort) = await logged(bootstrap_servers, names)
    assert abort == Abort(split.request, "the producer was interrupted")
