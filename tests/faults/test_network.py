"""The network between the consumers and the broker fails, and is mended."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import RequestTimedOutError
from aiokafka.protocol.metadata import MetadataRequest

from brokers import KillableBroker, make_topics
from checker import violations
from proxy import Proxy
from splitferry_consumer.fetching import FETCH_MAX, Fetches
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Split
from stage import Consumer, Stage, stage, until
from workload import KIB, MIB, Message, cut, make_load, message, send, sending

SEED = int(os.environ.get("SPLITFERRY_FAULT_SEED", random.SystemRandom().randrange(2**32)))
PARTITIONS = 2
OUTAGE = float(os.environ.get("SPLITFERRY_OUTAGE", "2"))
"""Seconds that a network stays broken. Longer than the session time-out, so that the group
counts every consumer behind it out."""
LONG = "SPLITFERRY_OUTAGE" in os.environ
"""Whether each kind meets each phase. A connection that was forgotten takes 10 to 20 s to be
found out, so by default only two phases meet that."""
RESUMED = 30.0
"""Seconds after healing (rule 8)."""

OUTAGES: dict[str, Callable[[Proxy], None]] = {
    "cut": Proxy.cut,
    "blackhole": Proxy.blackhole,
    "no answers": lambda proxy: proxy.blackhole(requests=False),
    "forgotten": Proxy.forget,
}


@pytest.mark.timeout(300)
async def test_bad_networks(killable_broker: KillableBroker, tmp_path: Path) -> None:
    """Side by side, each behind a network of its own."""
    print(f"SPLITFERRY_FAULT_SEED={SEED}")
    async with asyncio.TaskGroup() as all_networks:
        all_networks.create_task(bad_network(killable_broker, len(OUTAGES), tmp_path / "bad"))
        for number, kind in enumerate(OUTAGES):
            walk = Walk(killable_broker, number, kind, tmp_path / kind.replace(" ", "-"))
            all_networks.create_task(walk.through())


async def bad_network(broker: KillableBroker, number: int, directory: Path) -> None:
    """Answers that are late, a line that is slow, connections that are reset now and then.

    The log names requests that failed, as warnings. All goes on meanwhile, only slower.
    """
    rng = random.Random(SEED)
    servers = broker.bootstrap_servers
    names = await make_topics(servers, PARTITIONS)
    proxy = broker.proxy(number)
    async with proxy, stage(servers, names, directory) as run, sending(servers) as producer:
        consumer = await run.consumer(BOOTSTRAP_SERVERS=proxy.servers)
        await until(lambda: consumer.heard("partition taken") >= PARTITIONS, "a start")
        proxy.delay(0.05, 0.1)
        await all_is_told(run, producer, make_load(rng, 12, PARTITIONS, [1, 20 * KIB], node=1))
        await proxy.heal()
        proxy.throttle(700 * KIB)
        # In each partition more than fits into a response: it has to come before its request
        # times out, else it is asked for again and again.
        large = [cut(RequestId(2, p), rng.randbytes(6 * MIB), 256 * KIB) for p in range(PARTITIONS)]
        backlog = [
            replace(message(split, 1), partition=partition)
            for partition, splits in enumerate(large)
            for split in splits
        ]
        await all_is_told(run, producer, backlog)
        await proxy.heal()
        proxy.reset_at_random(0.01, SEED)
        await all_is_told(run, producer, make_load(rng, 24, PARTITIONS, [1, 300 * KIB], node=3))
        await proxy.heal()
        await run.settle()
        await run.stop()
        assert violations(await run.history()) == [], f"seed {SEED}"
        assert run.errors() == []


async def all_is_told(run: Stage, producer: AIOKafkaProducer, load: list[Message]) -> None:
    await send(producer, run.names.splits, load)
    await until(run.caught_up, "all is told", 3 * RESUMED)


async def test_the_first_connection_without_an_answer_ends_all_that_are_as_silent(
    killable_broker: KillableBroker,
) -> None:
    """A client has several to a broker, and a firewall forgets them together."""
    async with killable_broker.proxy(0) as proxy:
        consumer = AIOKafkaConsumer(bootstrap_servers=proxy.servers, request_timeout_ms=8000)
        Fetches(consumer, FETCH_MAX)
        async with consumer:
            client: Any = consumer._client
            (broker,) = client.cluster.brokers()

            async def ask(connection: str) -> None:
                await client.send(broker.nodeId, MetadataRequest([]), group=connection)

            await ask("asked")
            await ask("idle")
            proxy.forget()
            asking = asyncio.create_task(ask("asked"))
            await asyncio.sleep(0.1)
            await ask("new")
            with pytest.raises(RequestTimedOutError):
                await asking
            alive = {
                name: connection.connected() for (_, name), connection in client._conns.items()
            }
            assert (alive["asked"], alive["idle"], alive["new"]) == (False, False, True)


class Walk:
    """Two consumers behind one network, which breaks down while they join, take, receive,
    publish and stop.

    The log names the requests to Kafka that failed, as warnings. Nothing is lost and nothing
    told twice: results wait. Within 30 s of the healing all that was sent meanwhile has its
    result. A consumer that is stopped meanwhile ends by itself, with code 0.
    """

    def __init__(self, broker: KillableBroker, number: int, kind: str, directory: Path) -> None:
        self._broker = broker
        self._proxy = broker.proxy(number)
        self._kind = kind
        self._directory = directory
        self._rng = random.Random(f"{SEED} {kind}")
        self._sent = 0

    async def through(self) -> None:
        servers = self._broker.bootstrap_servers
        names = await make_topics(servers, PARTITIONS)
        async with (
            self._proxy,
            stage(servers, names, self._directory) as run,
            sending(servers) as self._producer,
        ):
            self._run = run
            first = await self._start()
            await until(lambda: first.heard("partition taken") >= PARTITIONS, "a start")
            second = await self._start()
            await until(lambda: first.heard("partitions revoked") > 0, "a rebalance")
            await self._outage("joining")
            await until(lambda: second.heard("partition taken") > 0, "a member joins", RESUMED)

            before = first.heard("partitions assigned")
            await second.kill()
            await until(lambda: first.heard("partitions assigned") > before, "assigned", RESUMED)
            await self._outage("taking")

            await self._item(4 * MIB, partly=True)
            await until(lambda: bool(self._temporary()), "receiving")
            await self._outage("receiving")

            await self._in_a_transaction()
            await self._outage("publishing")

            await self._item(4 * MIB)
            stopping = asyncio.create_task(first.stop())
            await asyncio.sleep(0.05)
            await self._outage("stopping", stopping)
            await self._finish()

    async def _start(self) -> Consumer:
        return await self._run.consumer(BOOTSTRAP_SERVERS=self._proxy.servers)

    async def _outage(self, phase: str, stopping: asyncio.Task[int] | None = None) -> None:
        """Break the network, send something meanwhile, mend it, and see what was sent done."""
        run = self._run
        if self._kind == "forgotten" and phase in {"joining", "receiving"} and not LONG:
            return
        OUTAGES[self._kind](self._proxy)
        await self._item(100 * KIB)
        await asyncio.sleep(OUTAGE)
        await self._item(100)
        await self._proxy.heal()
        if stopping is not None:
            assert await stopping == 0
            await self._start()
        what, began = f"{self._kind} while {phase}: progress", time.monotonic()
        await until(lambda: len(run.results) == self._sent, what, RESUMED)
        print(f"{what} after {time.monotonic() - began:.1f} s")

    async def _item(self, size: int, *, partly: bool = False) -> None:
        """Send an item, or all of it but the last split, which then comes a little later."""
        self._sent += 1
        data = self._rng.randbytes(size)
        splits = cut(RequestId(3, self._sent), data, max(1, size // 4))
        if partly:
            self._late = asyncio.create_task(self._send_later(splits.pop()))
        await self._send(splits)

    async def _send(self, splits: list[Split]) -> None:
        messages = [message(split, PARTITIONS) for split in splits]
        await send(self._producer, self._run.names.splits, messages)

    async def _send_later(self, split: Split) -> None:
        # Whole before anybody looks, it would not be met on its way in.
        await until(lambda: bool(self._temporary()), "receiving")
        await asyncio.sleep(OUTAGE / 2)
        await self._send([split])

    def _temporary(self) -> list[str]:
        return [path for path in self._run.look().temporary if not path.endswith("/lock")]

    async def _in_a_transaction(self) -> None:
        for _ in range(100):
            await self._item(5)
            with suppress(AssertionError):
                return await until(self._run.transaction_open, "a transaction", bound=0.3)
        raise AssertionError("no transaction was met")

    async def _finish(self) -> None:
        run = self._run
        await run.settle()
        await run.stop()
        assert violations(await run.history()) == [], f"seed {SEED}, {self._kind}"
        assert run.errors() == []
