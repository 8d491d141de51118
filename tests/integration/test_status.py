"""`splitferry status` on a real broker: what it tells, and that it leaves no trace."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from brokers import Topics, administrator
from checker import read_committed
from command import Outcome, command, topics_of
from splitferry_consumer.inquiry import TopicView
from splitferry_consumer.log_reader import LogReader
from splitferry_consumer.onlooker import Onlooker, SurveyedPartition
from splitferry_consumer.transport import Record, TransportError
from splitferry_protocol.ids import RequestId
from stage import stage, until
from workload import Message, cut, message, send, sending

MakeTopics = Callable[..., Awaitable[Topics]]


class Board:
    """The command with topics of one test."""

    def __init__(self, servers: str, names: Topics, group: str) -> None:
        self.servers = servers
        self.names = names
        self.group = group
        self.environment = {
            "SPLITFERRY_BOOTSTRAP_SERVERS": servers,
            "SPLITFERRY_GROUP": group,
            **topics_of(names),
        }

    async def __call__(self, *args: str) -> Outcome:
        return await command(self.environment, *args)

    async def rows(self, *args: str) -> dict[int, dict[str, Any]]:
        outcome = await self("status", "--json", *args)
        assert outcome.code == 0, outcome
        found = map(json.loads, outcome.stdout.splitlines())
        return {row["partition"]: row for row in found}

    async def traces(self) -> tuple[Mapping[int, Any], Mapping[int, int]]:
        """What looking could have changed: the commits, and the ends of the logs."""
        topics = [self.names.splits, self.names.results, self.names.dead_letters]
        async with AIOKafkaConsumer(*topics, bootstrap_servers=self.servers) as reader:
            ends = await reader.end_offsets(reader.assignment())
        return await read_committed(self.servers, self.group, self.names.splits), ends


@pytest.fixture
async def names(topics: MakeTopics) -> Topics:
    return await topics(partitions=2)


async def test_a_request_left_half_sent_is_named_until_it_is_aborted(
    bootstrap_servers: str, names: Topics, tmp_path: Path
) -> None:
    async with (
        stage(bootstrap_servers, names, tmp_path) as run,
        sending(bootstrap_servers) as producer,
    ):
        board = Board(bootstrap_servers, names, run.group)
        await run.consumer()
        done, half = cut(RequestId(7, 1), b"x" * 30, 10), cut(RequestId(7, 2), b"y" * 40, 10)
        began = time.time() * 1000
        await send(producer, names.splits, [message(s, 1) for s in (*done, half[0], half[2])])
        await until(lambda: RequestId(7, 1) in run.results, "the result")
        row = (await board.rows())[0]
        holder = row["holder"]
        assert holder is not None, "at the first look"
        assert (holder["request"], holder["first"]) == ("7-2", 3)
        assert holder["missing"] == [[10, 20], [30, 40]]
        assert (holder["received"], holder["size"]) == (20, 40)
        assert began - 1 <= holder["since"] <= time.time() * 1000
        assert (row["open"], row["lag"]) == (1, 2)
        ip_address(row["owner"])  # as the broker sees it
        assert f"splitferry abort 7-2 --group {run.group}" in row["advice"]

        before = await board.traces()
        text = (await board("status")).stdout
        assert "W is held by 7-2 since" in text
        assert "missing 10 to 20, 30 to 40" in text
        assert await board.traces() == before

        ended = await board("abort", "7-2", "--reason", "left half-sent")
        assert ended.code == 0, ended
        await run.settle()
        row = (await board.rows())[0]
        assert row["holder"] is None
        assert row["requests"] == []
        assert (row["lag"], row["committed"]) == (0, row["end"])
        await run.stop()
        assert (await board.rows())[0]["owner"] is None


async def test_a_group_that_was_never_there_begins_at_the_start(
    bootstrap_servers: str, names: Topics
) -> None:
    board = Board(bootstrap_servers, names, f"{names.splits}-nobody")
    assert [row["committed"] for row in (await board.rows()).values()] == [None, None]
    whole, half = cut(RequestId(7, 1), b"x" * 30, 30), cut(RequestId(7, 2), b"y" * 40, 10)
    async with sending(bootstrap_servers) as producer:
        await send(producer, names.splits, [message(s, 1) for s in (*whole, *half[:3])])
        open_too = replace(message(half[0], 1), partition=1)
        await send(producer, names.splits, [open_too] * 3)
    rows = await board.rows("--limit", "1")
    assert rows[0]["holder"]["state"] == "ended"
    assert rows[0]["holder"]["status"] == "completed"
    assert "splitferry consume" in rows[0]["advice"]
    assert (rows[0]["open"], rows[0]["unsettled"], len(rows[0]["requests"])) == (1, 1, 1)
    assert rows[1]["requests"][0]["received"] == 10
    assert (await board.rows("--max-records", "1"))[1]["position"] == 1
    text = (await board("status", "--max-records", "1")).stdout
    assert "read up to 1 only" in text
    assert "W never committed" in text


async def test_topics_that_are_not_there_are_named(bootstrap_servers: str, names: Topics) -> None:
    board = Board(bootstrap_servers, names, "g")
    for option in ("--splits-topic", "--results-topic"):
        outcome = await board("status", option, "not-there")
        assert outcome.code == 1
        said = outcome.stdout + outcome.error
        assert "topic not-there does not exist" in said
        assert "splitferry topics create" in said


async def test_a_partition_without_a_leader_disturbs_no_other(
    bootstrap_servers: str, names: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with LogReader({"bootstrap_servers": bootstrap_servers}) as log:
        inquiry = log._inquiry
        asked = inquiry.topic

        async def leaderless(name: str) -> TopicView:
            view = await asked(name)
            return replace(view, leaders={**view.leaders, 0: -1})

        monkeypatch.setattr(inquiry, "topic", leaderless)
        assert await log.bounds(TopicPartition(names.splits, 1)) == (0, 0)
        connected = inquiry._client
        with pytest.raises(TransportError, match=f"partition 0 of topic {names.splits} has no le"):
            await log.bounds(TopicPartition(names.splits, 0))
        assert inquiry._client is connected


class Sight:
    """One partition watched in this process, with what was read for it."""

    def __init__(self, log: LogReader, names: Topics, group: str) -> None:
        self.log = log
        self.read: list[tuple[str, int]] = []
        records = log.records

        async def counted(partition: TopicPartition, start: int, end: int) -> AsyncIterator[Record]:
            async for record in records(partition, start, end):
                self.read.append((partition.topic, record.offset))
                yield record

        log.records = counted  # type: ignore[method-assign,assignment]
        splits = TopicPartition(names.splits, 0)
        self._onlooker = Onlooker(log, group, splits, names.results)

    async def look(self) -> tuple[SurveyedPartition, list[tuple[str, int]]]:
        """The view, and what was read for it."""
        self.read.clear()
        return await self._onlooker.look(10), list(self.read)


@asynccontextmanager
async def watching(servers: str, names: Topics, group: str) -> AsyncIterator[Sight]:
    async with LogReader({"bootstrap_servers": servers}) as log:
        yield Sight(log, names, group)


async def commit(servers: str, group: str, names: Topics, offset: int, metadata: str = "") -> None:
    """Set W by hand, as Kafka's tools do."""
    where = TopicPartition(names.splits, 0)
    async with AIOKafkaConsumer(
        bootstrap_servers=servers, group_id=group, enable_auto_commit=False
    ) as member:
        member.assign([where])
        await member.commit({where: OffsetAndMetadata(offset, metadata)})


async def test_each_look_reads_what_is_new_and_no_more(
    bootstrap_servers: str, names: Topics, tmp_path: Path
) -> None:
    async with (
        stage(bootstrap_servers, names, tmp_path) as run,
        sending(bootstrap_servers) as producer,
        watching(bootstrap_servers, names, run.group) as sight,
    ):
        first, second, third = cut(RequestId(7, 1), b"x" * 30, 10)
        await send(producer, names.splits, [message(first, 1)])
        view, read = await sight.look()
        assert read == [(names.splits, 0)]
        assert (await sight.look())[1] == []
        await send(producer, names.splits, [message(second, 1)])
        view, read = await sight.look()
        assert read == [(names.splits, 1)]
        assert view.holder is not None
        assert view.holder.received == 20
        await run.consumer()
        await send(producer, names.splits, [message(third, 1)])
        await run.settle()
        view, read = await sight.look()
        assert [topic for topic, _ in read] == [names.results, names.splits]
        assert (view.holder, view.unsettled, view.lag) == (None, 0, 0)
        assert (await sight.look())[1] == []
        await run.stop()


async def test_a_result_that_comes_during_a_look_is_no_fault(
    bootstrap_servers: str, names: Topics, tmp_path: Path
) -> None:
    async with (
        stage(bootstrap_servers, names, tmp_path) as run,
        sending(bootstrap_servers) as producer,
        watching(bootstrap_servers, names, run.group) as sight,
    ):
        first, last = cut(RequestId(7, 1), b"x" * 20, 10)
        await send(producer, names.splits, [message(first, 1)])
        await sight.look()
        await run.consumer()
        bounds, asked = sight.log.bounds, 0

        async def meanwhile(partition: TopicPartition) -> tuple[int, int]:
            """As soon as the end of the splits was told, the request ends and is settled."""
            nonlocal asked
            told = await bounds(partition)
            asked += 1
            if asked == 1:
                await send(producer, names.splits, [message(last, 1)])
                await until(lambda: RequestId(7, 1) in run.results, "the result")
            return told

        sight.log.bounds = meanwhile  # type: ignore[method-assign]
        view, _ = await sight.look()
        assert view.problem is None
        assert (view.open, view.unsettled) == (0, 0)
        await run.stop()


async def test_a_commit_set_by_hand_is_followed_both_ways(
    bootstrap_servers: str, names: Topics
) -> None:
    group = f"{names.splits}-hand"
    async with (
        sending(bootstrap_servers) as producer,
        watching(bootstrap_servers, names, group) as sight,
    ):
        opened = [cut(RequestId(7, n), b"x" * 20, 10)[0] for n in (1, 2)]
        await send(producer, names.splits, [message(split, 1) for split in opened])
        for offset, held in ((None, 1), (1, 2), (2, None), (0, 1)):
            if offset is not None:
                await commit(bootstrap_servers, group, names, offset)
            view, _ = await sight.look()
            assert (view.holder and view.holder.request.sequence) == held, offset


async def test_what_no_consumer_could_take_is_told_in_the_same_words(
    bootstrap_servers: str, names: Topics
) -> None:
    group = f"{names.splits}-unfit"
    async with watching(bootstrap_servers, names, group) as sight:
        await commit(bootstrap_servers, group, names, 5)
        view, _ = await sight.look()
        assert "the splits end at 0: the topic was truncated or made anew" in (view.problem or "")
        assert "--accept-loss" in (view.problem or "")
        await commit(bootstrap_servers, group, names, 0, "splitferry/99 X")
        view, _ = await sight.look()
        assert "newer splitferry" in (view.problem or "")
        await commit(bootstrap_servers, group, names, 0)
        assert (await sight.look())[0].problem is None
    board = Board(bootstrap_servers, names, group)
    await commit(bootstrap_servers, group, names, 5)
    outcome = await board("status")
    assert "no consumer can take it: the group has read up to 5" in outcome.stdout


async def test_an_open_transaction_hides_what_follows_it(
    bootstrap_servers: str, names: Topics
) -> None:
    group = f"{names.splits}-hidden"
    first, second = cut(RequestId(7, 1), b"x" * 20, 10)
    async with (
        AIOKafkaProducer(bootstrap_servers=bootstrap_servers, transactional_id=group) as open_one,
        sending(bootstrap_servers) as producer,
        watching(bootstrap_servers, names, group) as sight,
    ):
        await send(producer, names.splits, [message(first, 1)])
        hiding = message(second, 1)
        async with open_one.transaction():
            await open_one.send_and_wait(
                names.splits, hiding.value, hiding.key, 0, headers=list(hiding.headers)
            )
            view, _ = await sight.look()
            assert (view.readable, view.end) == (1, 2)
            assert view.open == 1

        async def ended() -> bool:
            nonlocal view
            view, _ = await sight.look()
            return view.readable == view.end

        await until(ended, "the marker")
        assert (view.open, view.unsettled) == (0, 1)


async def test_retention_that_passes_by_and_a_topic_made_anew_begin_again(
    bootstrap_servers: str, names: Topics, tmp_path: Path
) -> None:
    group = f"{names.splits}-anew"
    halves = [message(cut(RequestId(7, n), b"xy", 1)[0], 1) for n in range(3)]
    where = TopicPartition(names.splits, 0)
    async with (
        sending(bootstrap_servers) as producer,
        administrator(bootstrap_servers) as admin,
        watching(bootstrap_servers, names, group) as sight,
    ):
        # Records that open nothing, so that only the position tells what retention did.
        await send(producer, names.splits, [Message(None, b"\xc1")] * 2)
        assert (await sight.look())[0].position == 2
        await send(producer, names.splits, halves)
        await admin.delete_records({where: RecordsToDelete(3)})
        view, _ = await sight.look()
        assert view.start == 3
        assert [one.first for one in view.requests] == [3, 4]
        assert view.holder is not None
        assert view.holder.request == RequestId(7, 1)
        await admin.delete_topics([names.splits])

        async def made() -> bool:
            answer: Any = await admin.create_topics([NewTopic(names.splits, 2, 1)])
            return bool(answer.topic_errors[0][1] == 0)

        await until(made, "the topic made anew")
    async with sending(bootstrap_servers) as producer:
        # As long as the one before, so that only its id tells.
        await send(producer, names.splits, [halves[2]] * 5)
        async with watching(bootstrap_servers, names, group) as sight:
            view, _ = await sight.look()
            assert [(one.request.sequence, one.first) for one in view.requests] == [(2, 0)]


async def test_watching_tells_again_and_again(bootstrap_servers: str, names: Topics) -> None:
    board = Board(bootstrap_servers, names, "g")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "splitferry_cli", "status", "--json", "--watch", "0.2"),
        env={**os.environ, **board.environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        looks = [json.loads(await process.stdout.readline()) for _ in range(4)]
        assert [look["partition"] for look in looks] == [0, 1, 0, 1]
        async with sending(bootstrap_servers) as producer:
            half = cut(RequestId(7, 1), b"xy", 1)[0]
            await send(producer, names.splits, [message(half, 1)])
        while (look := json.loads(await process.stdout.readline()))["holder"] is None:
            pass
        assert look["holder"]["request"] == "7-1"
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
        assert process.returncode == 130
        assert b"Traceback" not in errors
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
