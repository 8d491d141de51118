"""Transactions that hang, owners that lose theirs while they live, producers that are killed."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import OffsetAndMetadata

from checker import read_committed
from scene import RESUMED, Scene, scene, side_by_side
from splitferry_cli.options import ENVIRONMENT_PREFIX
from splitferry_consumer.kafka import stop_producer
from splitferry_protocol.codec import encode_result
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Input, Result, Status
from stage import PATIENT, Consumer, until
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
        left_open_by_kafka,
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
        # Shorter than records are hidden before the log warns of it, and longer than it takes to
        # hide them.
        consumer = await play.consumer(IDLE_TIMEOUT="10")
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
        consumer = await play.run.consumer(SESSION_TIMEOUT=PATIENT)
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
        consumer = await play.consumer(SESSION_TIMEOUT=PATIENT)
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


async def left_open_by_kafka(servers: str, directory: Path) -> None:
    """Kafka takes a transaction for complete that it has not ended everywhere (KAFKA-20734: a
    partition without a leader is passed over, as while its broker shuts down).

    Its offset stays pending, its results hidden, and no new owner's epoch ends them. The log warns
    that the partition is taken again, and tells the reason; each request has its one result. A
    pending offset counts for nothing, as the results that it rests on may have been aborted.
    Results alone become visible, as the offset beside them may have been committed.
    """
    async with scene(servers, directory, partitions=3) as play:
        first = await play.consumer()
        await play.told(*[await play.item(partition) for partition in range(3)])
        await play.run.settle()
        await first.stop()
        pending, hidden, both = [await play.item(partition) for partition in range(3)]
        async with unverified(play):
            await leave_open(play, 0, pending, offset=True)
            await leave_open(play, 1, hidden, results=True)
            await leave_open(play, 2, both, offset=True, results=True)
        consumer = await play.consumer(SESSION_TIMEOUT="60")
        await play.told(pending, hidden, both)
        for partition in range(3):
            line = await play.said(consumer, AGAIN, f'"partition": {partition},')
            assert line["error"] == "a transaction that Kafka had left open is ended now"

        # While its owner lives, and has nothing more to tell. That one is fenced by what stands in
        # for its own transaction here.
        last = await play.item(0)
        await play.told(last)
        consumer.freeze()
        async with unverified(play):
            await leave_open(play, 0, last, offset=True)
        consumer.thaw()
        await until(lambda: consumer.heard("partition taken") > 3, "it looks by itself")
        await play.sound(excused={hidden: (Status.EXPIRED, "BatchTransferFailed")})
        told = {request: result.status for request, result in play.run.results.items()}
        assert told[pending] is told[both] is Status.COMPLETED
        assert len(await play.results()) == 7
        assert play.run.errors() == []


AGAIN = "partition is taken again"


@asynccontextmanager
async def unverified(play: Scene) -> AsyncIterator[None]:
    """The broker takes records and offsets of transactions that it does not know of."""

    async def configure(**configs: str) -> None:
        named = {name.replace("_", "."): value for name, value in configs.items()}
        await play.admin.alter_configs([ConfigResource(ConfigResourceType.BROKER, "1", named)])

    await configure(transaction_partition_verification_enable="false")
    try:
        yield
    finally:
        await configure()


async def leave_open(
    play: Scene, partition: int, request: RequestId, *, offset: bool = False, results: bool = False
) -> None:
    """What is `True` is left open of a transaction of the partition's owner that has told that
    `request` expired, and has committed an offset behind it; the rest is ended."""
    source = TopicPartition(play.names.splits, partition)
    told = TopicPartition(play.names.results, partition)
    offsets = await read_committed(play.servers, play.run.group, play.names.splits)
    committed, metadata = offsets[partition]
    told_below = re.sub(r"P=\d+", f"P={committed + 2}", metadata)
    result = Result(
        request, f"items/{request}", 1, Block.FILE, None, play.run.group, Status.EXPIRED,
        BatchTransferFailed(request, "as the test wants it"), 1000, None, None, 1, 0,
        Input(*source, committed, committed + 1), None, False, 1,
    )  # fmt: skip
    owner = AIOKafkaProducer(
        bootstrap_servers=play.servers,
        transactional_id=f"{play.run.group}/{play.names.splits}/{partition}",
    )
    await owner.start()
    manager = owner._txn_manager
    await owner.begin_transaction()
    # Taken for known to the broker, it is not told, and ends nothing there.
    if results:
        manager._txn_partitions.add(told)
        await owner.send_and_wait(*told[:1], encode_result(result), request.key, partition)
    if offset:
        manager._txn_consumer_group = play.run.group
    await owner.send_offsets_to_transaction(
        {source: OffsetAndMetadata(committed + 2, told_below)}, play.run.group
    )
    if not offset:
        await owner.commit_transaction()
    await stop_producer(owner)


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
