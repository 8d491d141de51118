"""Everything that goes wrong in production, as contexts: broken inside, healed behind.

Each fault belongs to a family, of which a storm has one at a time: two of them would undo each
other, or heal each other's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from brokers import KillableBroker, administrator
from proxy import Proxy
from shim import Shim
from small_disk import SmallDisk
from stage import Consumer, Stage

MIB = 2**20
CREW = 2
"""Consumers that are kept going."""
MOST_PARTITIONS = 5


@dataclass
class World:
    """What there is to break."""

    run: Stage
    broker: KillableBroker
    proxy: Proxy
    disk: SmallDisk | None
    shim: Shim
    rng: random.Random
    partitions: int
    crew: list[Consumer] = field(default_factory=list)
    wanted: int = CREW
    counts: Counter[str] = field(default_factory=Counter)
    leaving: set[asyncio.Task[int]] = field(default_factory=set)
    manning: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def man(self) -> None:
        """Start consumers until there are as many as wanted."""
        async with self.manning:
            for consumer in [one for one in self.crew if not one.alive]:
                self.counts["consumers that could not start or go on"] += 1
                self.crew.remove(consumer)
                await consumer.stop()
            while len(self.crew) < self.wanted:
                self.crew.append(await self.run.consumer(BOOTSTRAP_SERVERS=self.proxy.servers))

    async def keep_manned(self) -> None:
        while True:
            await self.man()
            await asyncio.sleep(0.1)

    def someone(self) -> Consumer | None:
        alive = [consumer for consumer in self.crew if consumer.alive]
        return self.rng.choice(alive) if alive else None


Fault = Callable[[World], AbstractAsyncContextManager[None]]
FAULTS: dict[str, tuple[str, Fault]] = {}
"""Name to family and fault."""


def fault(family: str, name: str) -> Callable[[Callable[[World], AsyncIterator[None]]], Fault]:
    def register(broken: Callable[[World], AsyncIterator[None]]) -> Fault:
        made = asynccontextmanager(broken)
        FAULTS[name] = (family, made)
        return made

    return register


# ---- consumers


@fault("consumers", "consumers killed every 0.3 to 2 s")
async def killed(world: World) -> AsyncIterator[None]:
    async def kill() -> None:
        while True:
            await asyncio.sleep(world.rng.uniform(0.3, 2))
            consumer = world.someone()
            if consumer is not None:
                world.crew.remove(consumer)
                await consumer.kill()
                world.counts["SIGKILLs of consumers"] += 1

    killing = asyncio.create_task(kill())
    try:
        yield
    finally:
        killing.cancel()
        await asyncio.wait([killing])


@fault("consumers", "a consumer frozen beyond its session")
async def frozen(world: World) -> AsyncIterator[None]:
    consumer = world.someone()
    if consumer is None:
        yield
        return
    consumer.freeze()
    try:
        # Whatever the storm wants: shorter, and the group would not notice.
        await asyncio.sleep(world.rng.uniform(1.5, 4))
        yield
    finally:
        if consumer.alive:
            consumer.thaw()


@fault("consumers", "consumers join and leave")
async def joining(world: World) -> AsyncIterator[None]:
    world.wanted = CREW + 1
    try:
        yield
    finally:
        world.wanted = CREW
        consumer = world.someone()
        if consumer is not None:
            world.crew.remove(consumer)
            leaving = asyncio.create_task(consumer.stop())
            world.leaving.add(leaving)
            leaving.add_done_callback(world.leaving.discard)


# ---- the broker


@fault("broker", "the broker killed and started again")
async def broker_killed(world: World) -> AsyncIterator[None]:
    await world.broker.kill()
    try:
        yield
    finally:
        await world.broker.start()


@fault("broker", "the broker frozen")
async def broker_frozen(world: World) -> AsyncIterator[None]:
    world.broker.freeze()
    try:
        yield
    finally:
        world.broker.thaw()


@fault("broker", "the results topic takes no records")
async def results_refused(world: World) -> AsyncIterator[None]:
    async def take(size: int) -> None:
        settings = {"max.message.bytes": str(size)}
        topic = ConfigResource(ConfigResourceType.TOPIC, world.run.names.results, configs=settings)
        async with administrator(world.broker.bootstrap_servers) as admin:
            await admin.alter_configs([topic])

    await take(100)
    try:
        yield
    finally:
        await take(MIB)


@fault("broker", "partitions added")
async def partitions_added(world: World) -> AsyncIterator[None]:
    if world.partitions < MOST_PARTITIONS:
        added = world.partitions
        async with administrator(world.broker.bootstrap_servers) as admin:
            for topic in (world.run.names.results, world.run.names.splits):
                await admin.create_partitions({topic: NewPartitions(total_count=added + 1)})
        await asyncio.sleep(1)  # until the broker itself has heard of it
        world.run.watch([TopicPartition(world.run.names.results, added)])
        world.partitions = added + 1
    yield


# ---- other producers


@asynccontextmanager
async def _stranger(world: World, transactional_id: str) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        bootstrap_servers=world.broker.bootstrap_servers,
        transactional_id=transactional_id,
        transaction_timeout_ms=10_000,
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@fault("broker", "a foreign transaction hangs on results and splits")
async def hanging(world: World) -> AsyncIterator[None]:
    partition = world.rng.randrange(world.partitions)
    async with _stranger(world, "a stranger") as producer:
        await producer.begin_transaction()
        for topic in (world.run.names.results, world.run.names.splits):
            await producer.send_and_wait(topic, b"?", key=b"?", partition=partition)
        try:
            yield
        finally:
            await producer.abort_transaction()


@fault("broker", "an owner fenced by a second producer with its id")
async def fenced(world: World) -> AsyncIterator[None]:
    partition = world.rng.randrange(world.partitions)
    identity = f"{world.run.group}/{world.run.names.splits}/{partition}"
    async with _stranger(world, identity):
        yield


@fault("producers", "a producer killed in the middle of a request")
async def producer_killed(world: World) -> AsyncIterator[None]:
    item = world.run.sandbox.parent / "half-sent"
    if not item.exists():
        item.write_bytes(os.urandom(4 * MIB))
    names = world.run.names
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "splitferry_cli", "send", str(item)),
        *("--bootstrap-servers", world.broker.bootstrap_servers, "--split-size", "4KiB"),
        *("--splits-topic", names.splits, "--results-topic", names.results),
        *("--unique-id", f"half-sent/{world.counts['producers killed']}", "--timeout", "600"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await asyncio.sleep(world.rng.uniform(0.5, 2.5))
        yield
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            world.counts["producers killed"] += 1
        await process.wait()


# ---- the network


def network(name: str, spoil: Callable[[World], None]) -> None:
    @fault("network", name)
    async def spoilt(world: World) -> AsyncIterator[None]:
        spoil(world)
        try:
            yield
        finally:
            await world.proxy.heal()


network("connections cut and refused", lambda world: world.proxy.cut())
network("the network swallows everything", lambda world: world.proxy.blackhole())
network("the network swallows answers", lambda world: world.proxy.blackhole(requests=False))
network("connections forgotten by a firewall", lambda world: world.proxy.forget())
network("a slow network", lambda world: world.proxy.delay(0.05, 0.2))
network("a narrow network", lambda world: world.proxy.throttle(2 * MIB))
network("connections reset at random", lambda world: world.proxy.reset_at_random(0.02))


# ---- the disk


@fault("disk", "the disk full")
async def full(world: World) -> AsyncIterator[None]:
    if world.disk is not None:
        world.disk.fill(leave=world.rng.choice([0, 0, MIB]))
    try:
        yield
    finally:
        if world.disk is not None:
            world.disk.free()


def calls(name: str, spoil: Callable[[World, float], None]) -> None:
    @fault("calls", name)
    async def spoilt(world: World) -> AsyncIterator[None]:
        spoil(world, world.rng.choice([0.05, 0.3, 1.0]))
        try:
            yield
        finally:
            world.shim.heal()


calls("writes fail", lambda world, chance: world.shim.fail("write", errno.EIO, chance=chance))
calls("writes are short", lambda world, chance: world.shim.short("write", chance=chance))
calls("reads fail", lambda world, chance: world.shim.fail("read", errno.EIO, chance=chance))
# Not in the catalogue: a page that was synced before is never lost by a later sync, but the shim
# does not know which ones were, and would take away the journal that heals the database.
calls(
    "syncs of items fail and lose a page",
    lambda world, chance: world.shim.lose(chance=chance / 2, where="/.splitferry/incoming/"),
)
calls(
    "syncs of the catalogue fail",
    lambda world, chance: world.shim.fail("fsync", errno.EIO, chance=chance, where="/catalog.db"),
)
calls(
    "syncs of directories fail",
    lambda world, chance: world.shim.fail("fsync directory", errno.EIO, chance=chance / 2),
)
calls("renames fail", lambda world, chance: world.shim.fail("rename", errno.EIO, chance=chance))
calls("opens fail", lambda world, chance: world.shim.fail("open", errno.EMFILE, chance=chance / 2))
calls(
    "reservations fail",
    lambda world, chance: world.shim.fail("fallocate", errno.EDQUOT, chance=chance),
)
calls("syncs take long", lambda world, chance: world.shim.delay("fsync", 0.5, chance=chance))


DEADLY = [
    ("write", "/.splitferry/incoming/"),
    ("fsync", "/.splitferry/incoming/"),
    ("fsync", "/catalog.db"),
    ("write", "/catalog.db"),
    ("rename", "/items/"),
    ("fsync directory", "/items"),
    ("unlink", "/.splitferry/incoming/"),
]


@fault("calls", "consumers killed at chosen calls")
async def killed_at_calls(world: World) -> AsyncIterator[None]:
    call, where = world.rng.choice(DEADLY)
    world.shim.kill(call, times=3, where=where, chance=world.rng.choice([0.1, 1.0]))
    try:
        yield
    finally:
        world.counts["SIGKILLs at calls"] += world.shim.hits(call)
        world.shim.heal()


@fault("catalogue", "the catalogue locked by another process")
async def locked(world: World) -> AsyncIterator[None]:
    path = world.run.root / ".splitferry" / "catalog.db"
    if not path.exists():
        yield
        return
    # In a process of its own, since POSIX locks are a process's.
    hold = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    hold += "while True:\n try: d.execute('BEGIN IMMEDIATE'); break\n"
    hold += " except sqlite3.OperationalError: pass\n"
    hold += "sys.stdin.read(); d.execute('ROLLBACK')"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", hold, str(path), stdin=asyncio.subprocess.PIPE
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


@fault("clock", "the wall clock steps")
async def stepped(world: World) -> AsyncIterator[None]:
    hour = 3600
    world.shim.step_clock(world.rng.choice([-8760, -1, -0.01, 0.01, 1, 8760]) * hour)
    try:
        yield
    finally:
        world.shim.step_clock(0)


def schema_is_sound(root: Path) -> bool:
    """Whether SQLite finds nothing wrong with the catalogue."""
    with closing(sqlite3.connect(root / ".splitferry" / "catalog.db")) as database:
        try:
            answer: list[tuple[str]] = database.execute("PRAGMA integrity_check").fetchall()
        except sqlite3.DatabaseError:
            return False
    return answer == [("ok",)]


IGNORED = (KafkaError, OSError)
"""What a fault's own tools may meet while other faults are at work."""
