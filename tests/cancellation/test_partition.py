"""A partition that is lost at any of its await points leaves nothing, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_none

from memory_transport import Fate, broken
from owners import announced, results, temporaries, told
from splitferry_consumer import group as group_module
from splitferry_consumer import partition as partition_module
from splitferry_consumer.partition import Partition
from splitferry_protocol.records import Block, Status
from stepping import stepped
from test_partition import Place, open_place
from world import split


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_module, "TICK", 0.005)
    monkeypatch.setattr(partition_module, "COMMIT_INTERVAL", 0.005)
    monkeypatch.setattr(partition_module, "RETAKE_PAUSES", (0.001,) * 5)
    monkeypatch.setattr(group_module, "PAUSES", wait_none())


def fill(place: Place) -> None:
    """Two requests, one open, a record that nobody can read; and trouble at each step."""
    kafka = place.kafka
    for offset, payload in ((0, b"abc"), (2, b"cdef"), (0, b"a")):
        kafka.send(split(1, offset, payload, total=6, block=Block.FILE, reply=payload))
    kafka.send_raw(None, b"garbage")
    kafka.send(split(2, 0, b"in memory", total=9))
    kafka.send(split(3, 0, b"ab", total=4, block=Block.FILE))
    kafka.faults["writer"].append(broken())
    kafka.faults["commit"].append(Fate.COMMITTED_LATER)


async def lost_at(place: Place, number: int, patch: pytest.MonkeyPatch) -> bool:
    """Lose a partition when its task waits for the time `number`; False if all was done by then."""
    here = asyncio.Event()
    hold = Partition._hold

    def stopping(partition: Partition) -> Coroutine[Any, Any, None]:
        def reached(step: int) -> None:
            if step == number:
                here.set()

        return stepped(hold(partition), reached)

    with patch.context() as patched:
        patched.setattr(Partition, "_hold", stopping)
        owner = place.own(batch=2)
    await here.wait()
    finished = owner.finished
    await owner.lose()
    assert owner.partition.gauge.bytes == 0
    assert temporaries(place.root) == []
    assert not owner.partition.ready
    assert [writer.closed for writer in place.kafka.writers if not writer.closed] == []
    return not finished


async def test_a_partition_lost_at_any_step_leaves_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, under_way = 1, True
    while under_way:
        async with open_place(tmp_path / str(number)) as place:
            fill(place)
            under_way = await lost_at(place, number, monkeypatch)
            place.kafka.faults.clear()
            await place.finish()
            assert {r.request.sequence: r.status for r in results(place.kafka)} == {
                1: Status.COMPLETED,
                2: Status.COMPLETED,
            }
            announced(place.kafka)
            assert told(place.kafka) == {
                ("Accepted", "1-1", b"abc"): 1,
                ("Result", "1-1", b"a"): 1,
                ("dead letter", b"3"): 1,
            }
            assert (place.root / "item-1").read_bytes() == b"abcdef"
        number += 1
    assert number > 10, "taking alone waits at more places"
