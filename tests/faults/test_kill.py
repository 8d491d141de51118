"""SIGKILL at random moments: whatever a consumer was doing, the next one makes it good.

SPLITFERRY_FAULT_ROUNDS sets the number of kills, SPLITFERRY_FAULT_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from brokers import Topics
from checker import Outcome, violations
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Result, Split
from stage import Stage, stage, until
from workload import KIB, MIB, Message, cut, make_load, message, send, send_slowly, sending

ROUNDS = int(os.environ.get("SPLITFERRY_FAULT_ROUNDS", "50"))
SEED = int(os.environ.get("SPLITFERRY_FAULT_SEED", random.SystemRandom().randrange(2**32)))
REQUESTS = 100
SIZES = [0, 1, 700, 20 * KIB, 300 * KIB, MIB, 4 * MIB]
HELD = [RequestId(1, 1), RequestId(1, 2)]
RESUMED = 30.0
"""Seconds: rule 8."""


@pytest.mark.timeout(300 + 10 * ROUNDS)
async def test_kills(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    """Half of them plainly, half while two requests are held open from the beginning to the end.

    Several groups side by side, since most of the time goes by until Kafka takes a dead member
    for dead.
    """
    print(f"SPLITFERRY_FAULT_SEED={SEED} SPLITFERRY_FAULT_ROUNDS={ROUNDS}")
    found_by = {False: Counter[str](), True: Counter[str]()}

    async def group(hold: bool, number: int) -> None:
        place = tmp_path / f"{'held' if hold else 'plain'}-{number}"
        seed = SEED + 2 * number + hold
        found_by[hold] += await kill_often(bootstrap_servers, topics, place, hold, seed)

    async with asyncio.TaskGroup() as groups:
        for hold, number in itertools.product((False, True), range(2)):
            groups.create_task(group(hold, number))
    for found in found_by.values():
        # Most kills found the consumer at work, and each kind of work was met.
        assert found["at work"] > ROUNDS // 2, found
        assert found["writing"] > ROUNDS // 10, found
        assert found["decided, not told"] + found["in a transaction"] > ROUNDS // 25, found


async def kill_often(
    servers: str,
    topics: Callable[..., Awaitable[Topics]],
    directory: Path,
    hold: bool,
    seed: int,
) -> Counter[str]:
    """Half of the rounds; returns what the kills have interrupted."""
    rounds = max(1, ROUNDS // 2)
    rng = random.Random(seed)
    # With one partition a request that is held open holds W back for all the others.
    partitions = 1 if hold else 3
    load = make_load(rng, REQUESTS, partitions, SIZES)
    held = [cut(request, rng.randbytes(5 * KIB), KIB) for request in HELD] if hold else []
    names = await topics(partitions=partitions)
    async with stage(servers, names, directory) as run, sending(run.servers) as producer:
        await send(producer, names.splits, [message(s, partitions) for ss in held for s in ss[:2]])
        kills = Kills(run, len(held))
        for number in range(rounds):
            share = load[len(load) * number // rounds : len(load) * (number + 1) // rounds]
            await one_round(run, producer, rng, share, partitions, len(held))
            await kills.look()
        before = len(run.results)
        await run.consumer()
        extra = cut(RequestId(2, 1), b"after the last kill", 100)
        await send(producer, names.splits, [message(extra[0], partitions)])
        await until(lambda: len(run.results) > before, "progress after the last kill", RESUMED)
        if hold:
            completed, aborted = held
            ends: list[Split | Abort] = [*completed[2:], Abort(aborted[0].request, "enough")]
            await send(producer, names.splits, [message(content, partitions) for content in ends])
        await run.settle()
        await run.stop()
        history = await run.history()
        found = kills.count(history.outcomes)
        print(f"{directory.name}: {rounds} kills, {dict(found)}")
        assert violations(history) == [], f"seed {SEED}, {directory.name}"
        assert run.errors() == []
        return found


async def one_round(
    run: Stage,
    producer: AIOKafkaProducer,
    rng: random.Random,
    share: list[Message],
    partitions: int,
    held: int,
) -> None:
    """A consumer's life: it takes the partitions, is sent its share, and dies.

    Mostly that is counted from when it is seen at work, which a busy machine puts off. Some kills
    are aimed at a transaction, which lasts too short for chance to meet it often.
    """
    told = len(run.results)
    consumer = await run.consumer()
    await until(lambda: consumer.heard("partitions assigned") > 0, "assigned", RESUMED)
    if taken := rng.random() < 0.85:
        await until(lambda: consumer.heard("partition taken") >= partitions, "taken", RESUMED)
    life = rng.uniform(0.05, 1.5)
    await send(producer, run.names.splits, share[:1])
    if taken:
        with suppress(AssertionError):  # of one record nothing may be seen
            await until(lambda: run.writing() > held or len(run.results) > told, "work", bound=3)
    feeding = asyncio.create_task(send_slowly(producer, run.names.splits, share[1:], life))
    aimed = rng.random() < 0.4
    await asyncio.sleep(life / 2 if aimed else life)
    if aimed:
        with suppress(AssertionError):
            await until(run.transaction_open, "a transaction", bound=2)
    await consumer.kill()
    await feeding


class Kills:
    """What each kill has interrupted, told by what it left."""

    def __init__(self, run: Stage, held: int) -> None:
        self._run = run
        self._held = held
        self._found: Counter[str] = Counter()
        self._decided: list[tuple[dict[int, int], set[RequestId]]] = []

    async def look(self) -> None:
        run = self._run
        files = [path for path in run.look().temporary if not path.endswith("/lock")]
        verdicts = run.verdicts()
        ends = {tp.partition: end for tp, end in (await run.results_ends()).items()}
        self._decided.append((ends, {*verdicts}))
        in_a_transaction = await run.transaction_open()
        writing = len(files) > self._held
        # W says nothing while a request is held open.
        at_work = writing or in_a_transaction or (not self._held and await run.behind() > 0)
        self._found["at work"] += at_work
        self._found["writing"] += writing
        self._found["before a rename"] += any(verdicts.values())
        self._found["in a transaction"] += in_a_transaction

    def count(self, outcomes: Sequence[Outcome]) -> Counter[str]:
        for ends, decided in self._decided:
            told = {
                outcome.told.request
                for outcome in outcomes
                if isinstance(outcome.told, Result) and outcome.offset < ends[outcome.partition]
            }
            self._found["decided, not told"] += not decided <= told
        return self._found
