"""Transactions that hang, owners that lose theirs while they live, producers that are killed."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from scene import RESUMED, Scene, scene, side_by_side
from splitferry_cli.options import ENVIRONMENT_PREFIX
from splitferry_protocol.records import Status
from stage import Consumer, until
from workload import MIB, message

TIMED_OUT = 45.0
"""Seconds in which the broker ends a transaction: after its time-out of 20 s, at its next look."""


@pytest.mark.timeout(240)
async def test_transactions(bootstrap_servers: str, tmp_path: Path) -> None:
    await side_by_side(
        bootstrap_servers,
        tmp_path,
        splits_hidden_by_a_transaction,
        results_hidden_by_a_transaction,
        transaction_timed_out_while_alive,
        second_producer_with_the_same_id,
        producer_killed_in_the_middle,
    )


def stranger(play: Scene) -> AIOKafkaProducer:
    return AIOKafkaProducer(
        bootstrap_servers=play.servers, transactional_id=f"stranger to {play.run.group}"
    )


async def splits_hidden_by_a_transaction(servers: str, directory: Path) -> None:
    """Somebody's transaction on a splits partition is not ended.

    Every 15 s the log warns from which offset on records are hidden, and what to do. Open requests
    do not expire meanwhile, since what they wait for may be there. Other partitions go on. When
    the transaction ends, one way or the other, all goes on.
    """
    async with scene(servers, directory) as play, stranger(play) as other:
        consumer = await play.consumer(IDLE_TIMEOUT="3")
        held, left = await play.begin(0)
        await until(lambda: writes(play), "the request is open")
        await other.begin_transaction()
        record = message(left[0], 1)
        await other.send_and_wait(
            play.names.splits, b"?", key=record.key, partition=0, headers=[*record.headers]
        )
        await play.send(left, 0)
        behind, beside = await play.item(0), await play.item(1)
        await play.told(beside)
        line = await play.said(consumer, HIDDEN)
        assert (line["level"], line["partition"], line["offset"]) == ("warning", 0, 1)
        assert not {held, behind} & {*play.run.results}
        await other.abort_transaction()
        await play.told(held, behind)
        assert play.run.results[held].status is Status.COMPLETED
        await play.sound()


HIDDEN = "records are hidden by an open transaction of a producer: end it, or wait for its time-out"


def writes(play: Scene) -> bool:
    return any(not path.endswith("/lock") for path in play.run.look().temporary)


async def results_hidden_by_a_transaction(servers: str, directory: Path) -> None:
    """Somebody's transaction on a results partition is not ended when a consumer starts.

    The partition is refused, and tried again: the log tells where the results cannot be read,
    and what to do. Other partitions go on.
    """
    async with scene(servers, directory) as play, stranger(play) as other:
        first = await play.consumer()
        await play.told(await play.item(0))
        await play.run.settle()
        await first.stop()
        await other.begin_transaction()
        await other.send_and_wait(play.names.results, b"?", key=b"?", partition=0)
        consumer = await play.run.consumer()
        behind, beside = await play.item(0), await play.item(1)
        await play.told(beside)
        line = await play.said(consumer, "partition refused", "another producer is open")
        assert (line["level"], line["partition"]) == ("error", 0)
        assert consumer.heard("partition taken") == 1
        await other.abort_transaction()
        await play.told(behind)
        await play.run.settle()
        await play.run.stop()
        assert len(await play.results()) == 3


async def transaction_timed_out_while_alive(servers: str, directory: Path) -> None:
    """A consumer is frozen inside a transaction for longer than its time-out, and its group
    session lasts longer still: it is the owner when it wakes, and its transaction is gone.

    The log warns that the transaction was given up, as no answer came in time (that bound is
    shorter than the time-out), and the partition is taken again. The results of the lost
    transaction are told, once.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer(SESSION_TIMEOUT="60")
        await caught_in_a_transaction(play, consumer)

        async def ended() -> bool:
            return not await play.run.transaction_open()

        await until(ended, "the broker has ended the transaction", TIMED_OUT, every=0.5)
        consumer.thaw()
        late = await play.item()
        await play.told(late)
        assert consumer.heard("partition is taken again") > 0
        assert consumer.heard("partitions assigned") == 1, "a member all the time"
        await play.sound()
        assert play.run.errors() == []


async def caught_in_a_transaction(play: Scene, consumer: Consumer) -> None:
    """Freeze it while results are sent and not committed.

    That lasts some ms of a transaction. Under a stream of items they follow each other closely,
    so a moment chosen blindly is in one of them often enough.
    """
    for attempt in range(200):
        await asyncio.gather(*(play.item(size=4) for _ in range(20)))
        await asyncio.sleep(attempt % 10 * 0.01)
        consumer.freeze()
        await asyncio.sleep(0.2)  # what it had sent before has arrived by now
        if await play.run.transaction_open() and not play.run.catalogue_locked():
            return
        consumer.thaw()
    raise AssertionError("no transaction could be caught")


async def second_producer_with_the_same_id(servers: str, directory: Path) -> None:
    """Somebody starts a producer with a partition's transactional id.

    The owner is fenced, which the log warns of; the group still counts it in, so it takes the
    partition again after a pause of 3 s, and fences the other.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        await play.told(await play.item())
        async with AIOKafkaProducer(
            bootstrap_servers=servers,
            transactional_id=f"{play.run.group}/{play.names.splits}/0",
        ):
            await play.told(await play.item())
        assert consumer.heard("partition was fenced") == 1
        assert consumer.heard("partitions assigned") == 1
        await play.sound()
        assert play.run.errors() == []


async def producer_killed_in_the_middle(servers: str, directory: Path) -> None:
    """`splitferry send` is killed by SIGKILL in the middle of an item.

    Its request stays open and holds W. After --idle-timeout it has its one result, `expired`, and
    nothing of it stays behind. The same item sent again is a new request, and completes.
    """
    data = os.urandom(8 * MIB)
    async with scene(servers, directory, partitions=1) as play:
        await play.consumer(IDLE_TIMEOUT="4")
        killed = await sending_command(play)
        assert killed.stdin is not None
        killed.stdin.write(data[: 4 * MIB])
        await until(lambda: writes(play), "the request is open")
        killed.kill()
        await killed.wait()
        await until(lambda: len(play.run.results) == 1, "it expires", RESUMED)
        (expired,) = play.run.results.values()
        assert expired.status is Status.EXPIRED
        again = await sending_command(play)
        await again.communicate(data)
        assert again.returncode == 0
        await until(lambda: len(play.run.results) == 2, "the second one completes", RESUMED)
        (result,) = (r for r in play.run.results.values() if r.request != expired.request)
        assert (result.status, result.unique_id) == (Status.COMPLETED, expired.unique_id)
        await play.sound(excused={expired.request: (Status.EXPIRED, "BatchTransferFailed")})


async def sending_command(play: Scene) -> asyncio.subprocess.Process:
    """`splitferry send` of its standard input."""
    settings = {
        "BOOTSTRAP_SERVERS": play.servers,
        "SPLITS_TOPIC": play.names.splits,
        "RESULTS_TOPIC": play.names.results,
        "GROUP": play.run.group,
        "UNIQUE_ID": "items/large",
        "SPLIT_SIZE": "256KiB",
    }
    environment = {ENVIRONMENT_PREFIX + name: value for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "splitferry_cli", "send", "-"),
        env={**os.environ, **environment, "XDG_STATE_HOME": str(play.run.logs)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
