"""`splitferry dead-letters` on a real broker, with a real consumer behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from brokers import Topics, administrator, configure
from checker import read_topic
from command import Outcome, command, topics_of
from splitferry_cli import requeue as requeuing
from splitferry_cli.failures import Failure
from splitferry_cli.requeue import Handled, requeue
from splitferry_cli.topic_rules import Names
from splitferry_consumer.dead_letters import Position
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Split
from splits_log import logged
from stage import stage, until
from workload import Message, cut, damaged, message, origin, send, sending

MakeTopics = Callable[..., Awaitable[Topics]]

pytestmark = pytest.mark.timeout(240)  # many commands, each a start of Python


class Desk:
    """The command with topics of one test."""

    def __init__(self, servers: str, names: Topics) -> None:
        self.servers = servers
        self.names = names
        self.environment = {"SPLITFERRY_BOOTSTRAP_SERVERS": servers, **topics_of(names)}

    async def __call__(self, *args: str) -> Outcome:
        return await command(self.environment, "dead-letters", *args)

    async def rows(self, *args: str, code: int = 0) -> list[dict[str, Any]]:
        outcome = await self(*args, "--json")
        assert outcome.code == code, outcome
        return [json.loads(line) for line in outcome.stdout.splitlines()]

    async def requeue(
        self, *wanted: Position, group: str = "g", force: bool = False
    ) -> list[Handled]:
        """In this process."""
        names = Names(self.names.splits, self.names.results, self.names.dead_letters)
        connection = ConnectionSettings(self.servers)
        return [told async for told in requeue(connection, names, group, wanted, force)]

    async def splits(self) -> list[tuple[int, Any]]:
        return await logged(self.servers, self.names)

    async def put(self, *split: Split, partition: int = 0) -> list[Position]:
        """Dead letters of sound records, as a consumer that did not know their version leaves."""
        async with sending(self.servers) as producer:
            for number, one in enumerate(split):
                sound = message(one, 1)
                headers = [*sound.headers, *origin(self.names.splits, partition, number)]
                dead = replace(sound, headers=headers)
                await send(producer, self.names.dead_letters, [dead])
        return [Position(0, number) for number in range(len(split))]


@pytest.fixture
async def desk(bootstrap_servers: str, topics: MakeTopics) -> Desk:
    return Desk(bootstrap_servers, await topics(partitions=2))


HOSTILE = Message(None, b"\xc1\x1b[2J\x07", [("\x1b]0;x\x07", b"\x1b[31m")], partition=1)


async def test_damaged_records_are_listed_shown_and_sent_again(desk: Desk, tmp_path: Path) -> None:
    names = desk.names
    async with stage(desk.servers, names, tmp_path) as run, sending(desk.servers) as producer:
        assert "No dead letters." in (await desk("list")).stdout
        await run.consumer()
        first, second = cut(RequestId(7, 1), b"x" * 100, 50)
        messages = [message(first, 1), damaged(message(second, 1)), HOSTILE]
        await send(producer, names.splits, messages)
        await until(lambda: RequestId(7, 1) in run.results, "the result")

        async def told() -> bool:
            return len(await desk.rows("list")) == 2

        await until(told, "both dead letters")
        rows = {row["partition"]: row for row in await desk.rows("list", "--since", "1h")}
        assert rows[0]["request"] == "7-1"
        assert rows[0]["code"] == "SplitTaskFailed"
        assert (rows[0]["topic"], rows[0]["offset"]) == (names.splits, 1)
        assert rows[1]["request"] is None
        assert await desk.rows("list", "--limit", "1") == [
            max(rows.values(), key=lambda row: (row["written_at"], row["dead_letter"]))
        ]
        assert await desk.rows("list", "--since", "2100-01-01") == []

        (shown,) = await desk.rows("show", rows[0]["dead_letter"])
        assert "CRC-32C" in shown["problem"]
        assert shown["header"]["index"] == 1
        assert bytes.fromhex(shown["value"]) == messages[1].value
        for args in (("list",), ("show", rows[1]["dead_letter"])):
            text = (await desk(*args)).stdout
            assert "\x1b" not in text
            assert "\x07" not in text
        assert "|..[2J.|" in text

        dead = rows[0]["dead_letter"]
        (refused,) = await desk.rows("requeue", dead, code=1)
        assert refused["outcome"] == "refused"
        assert "CRC-32C" in refused["reason"]
        (sent,) = await desk.rows("requeue", dead, "--force")
        assert sent["outcome"] == "requeued"
        again = await desk.rows("requeue", dead, "--force")
        assert [(row["outcome"], row["to"]) for row in again] == [("requeued before", sent["to"])]
        # It died once more, as was said, and the list tells what was done with the first one.
        await run.settle()
        rows = {row["dead_letter"]: row for row in await desk.rows("list")}
        assert rows[dead]["requeued"]["to"] == sent["to"]
        assert [row["offset"] for row in rows.values()].count(int(sent["to"].split(":")[1])) == 1
        assert len(rows) == 3
        await run.stop()


async def test_a_record_that_a_newer_version_knows_is_received(desk: Desk, tmp_path: Path) -> None:
    first, second = cut(RequestId(7, 1), b"x" * 100, 50)
    (letter,) = await desk.put(second, partition=1)
    async with stage(desk.servers, desk.names, tmp_path) as run:
        async with sending(desk.servers) as producer:
            await send(producer, desk.names.splits, [replace(message(first, 1), partition=1)])
        (told,) = await desk.requeue(letter, group=run.group)
        assert told.to == Position(1, 1)
        await run.consumer()
        await until(lambda: RequestId(7, 1) in run.results, "the result")
        assert run.results[RequestId(7, 1)].success
        await run.stop()
        # Once it has ended, another record of it is worth nothing.
        (other,) = (await desk.put(first, first, partition=1))[1:]
        (late,) = await desk.requeue(Position(0, other.offset + 2), group=run.group)
        assert "has ended as completed" in (late.reason or "")


async def test_what_is_not_there_is_told_for_each(desk: Desk) -> None:
    (letter,) = await desk.put(*cut(RequestId(7, 1), b"", 1))
    asked = (str(letter), "0:99", "9:0", str(letter))
    outcome = await desk("requeue", *asked)
    assert outcome.code == 1
    told = [line.split("  ")[0] for line in outcome.stdout.splitlines()]
    assert told == ["requeued", "not found", "not found"], outcome
    assert "2 dead letters were not sent" in outcome.error
    missing = await desk("show", "0:99")
    assert missing.code == 1
    assert "0:99" in missing.error
    # The offset of a note is no dead letter.
    assert "no dead letter lies there" in (await desk("show", "0:1")).error


async def test_two_at_once_send_each_record_once(desk: Desk) -> None:
    count = 8
    wanted = await desk.put(*(cut(RequestId(7, n), b"x", 1)[0] for n in range(count)))
    attempts = await asyncio.gather(
        *(desk.requeue(*wanted) for _ in range(3)), return_exceptions=True
    )
    fenced = [one for one in attempts if isinstance(one, BaseException)]
    assert all("somebody else began" in str(one) for one in fenced), fenced
    told = await desk.requeue(*wanted)
    assert {one.outcome for one in told} <= {"requeued", "requeued before"}
    requests = [split.request for _, split in await desk.splits()]
    assert sorted(requests) == [RequestId(7, n) for n in range(count)]


async def test_a_crash_between_record_and_note_leaves_neither(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (letter,) = await desk.put(*cut(RequestId(7, 1), b"x", 1))
    written = requeuing._written
    reached = asyncio.Event()

    async def dies(producer: AIOKafkaProducer, record: Any) -> int:
        offset = await written(producer, record)
        reached.set()
        await asyncio.Event().wait()
        return offset

    monkeypatch.setattr(requeuing, "_written", dies)
    # As a crash leaves it: nobody ends its transaction.
    monkeypatch.setattr(AIOKafkaProducer, "abort_transaction", _nothing)
    dying = asyncio.create_task(desk.requeue(letter))
    await reached.wait()
    dying.cancel()
    await asyncio.wait([dying])
    monkeypatch.undo()
    (told,) = await desk.requeue(letter)
    assert told.outcome == "requeued"
    assert told.to == Position(0, 2)  # behind the aborted one and its marker
    committed, _ = await read_topic(desk.servers, desk.names.splits)
    assert [len(records) for records in committed.values()] == [1, 0]


async def _nothing(producer: AIOKafkaProducer) -> None:
    pass


async def test_brokers_that_are_away_do_not_hold_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (letter,) = await desk.put(*cut(RequestId(7, 1), b"x", 1))
    monkeypatch.setattr(requeuing, "SEND_BOUND", 0.5)
    monkeypatch.setattr(requeuing, "_written", _for_ever)
    monkeypatch.setattr(AIOKafkaProducer, "abort_transaction", _for_ever)
    async with asyncio.timeout(30):
        with pytest.raises(Failure, match="did not confirm it within"):
            await desk.requeue(letter)


async def _for_ever(*_: object) -> None:
    await asyncio.Event().wait()


async def test_a_record_that_is_too_large_by_now_is_refused_alone(desk: Desk) -> None:
    small, large = cut(RequestId(7, 1), b"x", 1)[0], cut(RequestId(7, 2), bytes(50_000), 50_000)[0]
    wanted = await desk.put(small, large, large, small)
    async with administrator(desk.servers) as admin:
        await configure(admin, desk.names.splits, {"max.message.bytes": "10000"})
    told = await desk.requeue(*wanted)
    assert [one.outcome for one in told] == ["requeued", "refused", "refused", "requeued"], told
    assert "raise its max.message.bytes" in (told[1].reason or "")
    assert [split for _, split in await desk.splits()] == [small, small]
