"""`splitferry replay` on a real broker: reports, exit codes, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete

from brokers import Topics, administrator
from checker import look
from command import Outcome, command, topics_of
from place import Place
from replays import replayed
from splitferry_consumer.log_reader import LogReader
from splitferry_consumer.rebuilding import Bounds, Source
from splitferry_consumer.replay import Outcome as Found
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort
from workload import MIB, Message, cut, damaged, message

MakePlace = Callable[..., Awaitable[Place]]
DATA = os.urandom(1000)
ONE, TWO, THREE, FOUR = (RequestId(7, number) for number in (1, 2, 3, 4))


@pytest.fixture
def make_place(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> MakePlace:
    async def make(partitions: int = 1) -> Place:
        root = tmp_path / "sandbox" / "root"
        root.mkdir(parents=True)
        return Place(bootstrap_servers, await topics(partitions=partitions), root, tmp_path)

    return make


def item(request: RequestId, data: bytes = DATA, size: int = 250) -> list[Message]:
    return [message(split, 1) for split in cut(request, data, size)]


def environment(place: Place) -> dict[str, str]:
    return {
        "SPLITFERRY_BOOTSTRAP_SERVERS": place.servers,
        "SPLITFERRY_GROUP": place.group,
        **topics_of(place.names),
    }


async def run(place: Place, *args: str | Path) -> Outcome:
    return await command(environment(place), "replay", *args)


def rows(done: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@asynccontextmanager
async def reading(place: Place) -> AsyncIterator[tuple[LogReader, Source]]:
    async with LogReader({"bootstrap_servers": place.servers}) as log:
        yield log, Source(place.names.splits, place.names.results, place.group)


async def delete_before(place: Place, offset: int) -> None:
    async with administrator(place.servers) as admin:
        await admin.delete_records({TopicPartition(place.names.splits, 0): RecordsToDelete(offset)})


async def test_each_request_is_reported_and_the_exit_code_says_whether_all_is_there(
    make_place: MakePlace, tmp_path: Path
) -> None:
    place = await make_place()
    sound, gone = item(TWO), item(THREE)
    async with place.serving():
        await place.send([*item(ONE), *sound[:2], message(Abort(TWO, "not wanted"), 1)])
        await place.settled()
    rebuilt = tmp_path / "rebuilt"
    done = await run(place, "--to", rebuilt)
    assert done.code == 0, done
    one, two, summed = done.stdout.splitlines()
    assert one.split()[:4] == ["aborted", "7-2", f"items/{TWO}", "v1"]
    assert "BatchTransferFailed: request 7-2 failed: aborted: not wanted" in one
    assert two.split()[:6] == ["complete", "7-1", f"items/{ONE}", "v1", "1000", "B"]
    assert summed.startswith("1 aborted, 1 complete; ")
    assert look(rebuilt).files == {f"items/{ONE}": look(place.root).files[f"items/{ONE}"]}

    # By its id, what was aborted is not there.
    named = await run(place, "--dry-run", "--request", str(TWO))
    assert (named.code, named.error) == (1, "Error: 1 request is not there")

    await place.send([*gone[:1], *gone[3:], *item(FOUR)[:1], damaged(item(FOUR)[1])])
    done = await run(place, "--dry-run", "--json", "--from-offset", "0:7")
    assert (done.code, done.error) == (1, "Error: 2 requests are not there")
    *reports, total = rows(done)
    found = {report["request"]: report for report in reports}
    assert found.keys() == {str(THREE), str(FOUR)}
    assert found[str(THREE)]["outcome"] == "incomplete"
    assert found[str(THREE)]["missing"] == [[250, 750]]
    assert found[str(FOUR)]["outcome"] == "damaged"
    assert found[str(FOUR)]["last"] == 10
    assert "(at offset 10)" in found[str(FOUR)]["reason"]
    assert total["outcomes"] == {"incomplete": 1, "damaged": 1}


async def test_what_is_deleted_or_hidden_is_told_and_the_rest_is_rebuilt(
    make_place: MakePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitferry_consumer.log_reader.STALL_BOUND", 1.0)
    place = await make_place()
    async with place.serving():
        await place.send([*item(ONE), *item(TWO), *item(THREE)])
        await place.settled()
    await delete_before(place, 6)
    hanging = AIOKafkaProducer(
        bootstrap_servers=place.servers, transactional_id=f"hanging in {place.group}"
    )
    await hanging.start()
    try:
        await hanging.begin_transaction()
        await hanging.send_and_wait(place.names.splits, b"?", partition=0)
        async with reading(place) as (log, source):
            told = await replayed(log, source, to=tmp_path / "rebuilt")
            assert told.outcomes() == {TWO: Found.DELETED, THREE: Found.COMPLETE}
            assert told.of(TWO).missing == [(0, 500)]
            ((_, hidden),) = told.troubles
            assert "from offset 12 to 13" in hidden
            assert "a transaction of another producer is open there" in hidden
            ((_, note),) = told.notes
            assert note.startswith("the log begins at offset 6: the records of 1 requests")
            named = await replayed(log, source, ids=[ONE, TWO, THREE])
            assert named.outcomes() == {
                ONE: Found.DELETED, TWO: Found.DELETED, THREE: Found.COMPLETE
            }  # fmt: skip
            assert named.troubles == []
    finally:
        await hanging.stop()
    assert look(tmp_path / "rebuilt").files.keys() == {f"items/{THREE}"}


async def test_ranges_by_time_and_by_offset_and_ids_that_nobody_knows(
    make_place: MakePlace, tmp_path: Path
) -> None:
    place = await make_place(partitions=2)
    async with place.serving():
        await place.send(item(ONE))
        await place.settled()
        await asyncio.sleep(0.01)
        await place.send([replace(one, partition=1) for one in item(TWO)])
        await place.settled()
        async with reading(place) as (log, source):
            times = [
                record.timestamp
                async for record in log.records(TopicPartition(place.names.splits, 1), 0, 4)
            ]
            since = Bounds(since=times[0])
            assert (await replayed(log, source, bounds=since)).outcomes() == {TWO: Found.COMPLETE}
            until = Bounds(until=times[0])
            assert (await replayed(log, source, bounds=until)).outcomes() == {ONE: Found.COMPLETE}
            named = await replayed(log, source, bounds=Bounds(ends={1: 10}))
            assert named.outcomes() == {TWO: Found.COMPLETE}
            assert named.troubles == []
            nobody = await replayed(log, source, ids=[TWO, THREE])
            assert nobody.outcomes() == {TWO: Found.COMPLETE, THREE: Found.UNKNOWN}
        # The root of a consumer that runs is no place for a replay.
        refused = await run(place, "--to", place.root)
        assert refused.code == 1
        assert f"{place.root} is in use by a consumer or another replay" in refused.error
    assert (await run(place, "--to", place.root)).code == 0


async def test_an_interrupted_replay_leaves_whole_files_and_the_next_goes_on(
    make_place: MakePlace, tmp_path: Path
) -> None:
    place = await make_place()
    count, rebuilt = 24, tmp_path / "rebuilt"
    async with place.serving():
        for number in range(count):
            await place.send(item(RequestId(7, number), os.urandom(4 * MIB), MIB))
        await place.settled()
    received = look(place.root).files
    assert len(received) == count
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "splitferry_cli", "replay", "--json", "--to", rebuilt,
        env={**os.environ, **environment(place)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert b'"complete"' in await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = await process.communicate()
    assert (process.returncode, stderr.split()) == (130, [b"Interrupted."])
    left = look(rebuilt)
    assert 0 < len(left.files) < count
    assert left.files.items() <= received.items()
    assert left.temporary == []
    done = await run(place, "--json", "--to", rebuilt)
    assert done.code == 0, done
    outcomes = rows(done)[-1]["outcomes"]
    assert outcomes == {"present": len(left.files), "complete": count - len(left.files)}
    assert look(rebuilt).files == received
