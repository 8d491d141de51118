"""SIGSTOP beyond the session time-out, then SIGCONT: the old owner wakes and finds a new one."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from brokers import Topics
from checker import violations
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Status
from stage import Consumer, Stage, stage, until
from workload import KIB, MIB, cut, make_load, message, send, send_slowly, sending

SEED = int(os.environ.get("SPLITFERRY_FAULT_SEED", random.SystemRandom().randrange(2**32)))
PARTITIONS = 2
SIZES = [0, 1, 700, 20 * KIB, 300 * KIB, 2 * MIB]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wakes", ["early", "late"])
@pytest.mark.parametrize("caught", ["writing", "in a transaction"])
async def test_a_zombie_changes_nothing_and_comes_back(
    bootstrap_servers: str,
    topics: Callable[..., Awaitable[Topics]],
    tmp_path: Path,
    caught: str,
    wakes: str,
) -> None:
    """It wakes while the new owner is at work on the same requests, or after all is done."""
    print(f"SPLITFERRY_FAULT_SEED={SEED}")
    rng = random.Random(f"{SEED} {caught} {wakes}")
    load = make_load(rng, 60, PARTITIONS, SIZES)
    names = await topics(partitions=PARTITIONS)
    async with stage(bootstrap_servers, names, tmp_path) as run, sending(run.servers) as producer:
        zombie = await run.consumer()
        await until(lambda: zombie.heard("partition taken") >= PARTITIONS, "a start")
        early, late = load[: len(load) // 2], load[len(load) // 2 :]
        feeding = asyncio.create_task(send_slowly(producer, names.splits, early, 2))
        if caught == "writing":
            await catch_writing(run, zombie)
        else:
            await feeding
            await catch_in_a_transaction(run, producer, zombie)
        await feeding
        successor = await run.consumer()
        await send(producer, names.splits, late[: len(late) // 2])
        await until(lambda: successor.heard("partition taken") >= PARTITIONS, "a new owner")
        if wakes == "early":
            await wake(run, zombie)
        await send(producer, names.splits, late[len(late) // 2 :])
        if wakes == "late":
            await until(run.caught_up, "the successor does all the work")
            await wake(run, zombie)
        # It holds one of the partitions again, and receives as any other.
        more = make_load(rng, 24, PARTITIONS, SIZES, node=8)
        await send(producer, names.splits, more)
        await run.settle()
        await run.stop()
        assert violations(await run.history()) == [], f"seed {SEED}"
        assert run.errors() == []


@pytest.mark.timeout(200)
async def test_what_was_sent_while_it_was_frozen_counts(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    """Frozen for longer than a request may be idle, and shorter than its session. What came
    meanwhile lies in the log, behind much that was fetched before, when it wakes."""
    names = await topics(partitions=1)
    slow = [message(split, 1) for split in cut(RequestId(7, 1), b"slow" * 100, 200)]
    large = [message(split, 1) for split in cut(RequestId(7, 2), bytes(24 * MIB), 512 * KIB)]
    async with stage(bootstrap_servers, names, tmp_path) as run, sending(run.servers) as producer:
        consumer = await run.consumer(IDLE_TIMEOUT="5", SESSION_TIMEOUT="30")
        await until(lambda: consumer.heard("partition taken") == 1, "a start")
        await send(producer, names.splits, slow[:1])
        await until(lambda: writes(run) == 1, "the request is open")
        consumer.freeze()
        await send(producer, names.splits, large + slow[1:])
        await asyncio.sleep(8)
        consumer.thaw()
        await until(lambda: len(run.results) == 2, "both results")
        await run.stop()
        told = {request.sequence: result.status for request, result in run.results.items()}
        assert told == {1: Status.COMPLETED, 2: Status.COMPLETED}


async def wake(run: Stage, zombie: Consumer) -> None:
    before = zombie.heard("partition taken")
    run.look()
    zombie.thaw()
    await until(lambda: zombie.heard("partition taken") > before, "the zombie is a member again")
    run.look()


async def catch_writing(run: Stage, consumer: Consumer) -> None:
    """Stop it with some requests half written, and some results told."""
    while True:
        await until(lambda: len(run.results) > 3 and writes(run) > 0, "requests half written")
        consumer.freeze()
        if writes(run) and not run.catalogue_locked():
            return
        consumer.thaw()


def writes(run: Stage) -> int:
    return sum(not path.endswith("/lock") for path in run.look().temporary)


async def catch_in_a_transaction(
    run: Stage, producer: AIOKafkaProducer, consumer: Consumer
) -> None:
    """Stop it while results are sent and not committed; many tries, as that lasts some 20 ms."""
    for number in count(1):
        assert number < 200, "no transaction could be caught"
        one = cut(RequestId(9, number), b"small", 5)
        await send(producer, run.names.splits, [message(one[0], PARTITIONS)])
        for _ in range(20):
            if await run.transaction_open():
                consumer.freeze()
                # What it had sent before it froze has arrived by now.
                await asyncio.sleep(0.2)
                if await run.transaction_open() and not run.catalogue_locked():
                    return
                consumer.thaw()
                break
