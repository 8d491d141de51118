"""What a benchmark runs on: a broker, topics, and items in them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import random
import secrets
import shutil
import tempfile
import time
from asyncio import Future, gather
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from splitferry_cli.broker import LocalBroker
from splitferry_cli.cluster import administration
from splitferry_cli.topic_rules import Names
from splitferry_cli.topics import create_topics
from splitferry_protocol.codec import crc_header, encode_split
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import PAYLOAD_MAX, Block, Split

KIB, MIB, GIB = 2**10, 2**20, 2**30
PARTITIONS = 8
_NODE = 1
_IN_FLIGHT = 16
"""Batches handed to the client and not yet confirmed."""
_BATCH = MIB
"""Bytes, as the producer of this project has it."""
_NOISE = 16 * MIB


@dataclass(frozen=True, slots=True)
class Load:
    """Items of equal size, one after the other in each of the partitions 0, 1, 2 and so on.

    With one item there is one partition with anything in it.

    Attributes:
        total: bytes of all items.
        block: where they go.
        together: items that are open at once, a split of each in turn; None: all.
        shuffled: the splits of an item come in a random order.
        open: the last split of each item is kept back.
        first: sequence of the first item's request.
    """

    names: Names
    partitions: int
    items: int
    total: int
    split_size: int
    block: Block = Block.FILE
    together: int | None = None
    shuffled: bool = False
    open: bool = False
    first: int = 0

    @property
    def size(self) -> int:
        """Bytes of an item."""
        return self.total // self.items

    @property
    def splits(self) -> int:
        """Of one item."""
        return -(-self.size // self.split_size)

    @property
    def records(self) -> int:
        return self.items * (self.splits - self.open)

    @property
    def used(self) -> list[int]:
        """The partitions with anything in them."""
        return list(range(min(self.items, self.partitions)))

    def order(self) -> Iterator[tuple[int, int]]:
        """Item and index of every split, as they are sent."""
        indices = list(range(self.splits - self.open))
        if self.shuffled:
            random.Random(0).shuffle(indices)
        step = self.together or self.items
        for first in range(0, self.items, step):
            for index in indices:
                for item in range(first, min(first + step, self.items)):
                    yield item, index

    def payload(self, item: int, index: int) -> memoryview:
        offset = index * self.split_size
        length = min(self.split_size, self.size - offset)
        begin = (offset + item * 4099) % _NOISE
        return memoryview(_noise())[begin : begin + length]

    def split(self, item: int, index: int) -> Split:
        return Split(
            RequestId(_NODE, self.first + item),
            f"bench/{self.first + item}",
            1,
            self.block,
            index,
            index * self.split_size,
            self.size,
            self.payload(item, index),
            self._digest(item) if index == self.splits - 1 else None,
        )

    def _digest(self, item: int) -> bytes:
        digest = hashlib.sha256()
        for index in range(self.splits):
            digest.update(self.payload(item, index))
        return digest.digest()


@cache
def _noise() -> bytes:
    """Incompressible, with room for the largest payload at its end."""
    return random.Random(0).randbytes(_NOISE + PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Stage:
    servers: str
    directory: Path
    """For logs and for what is received; removed at the end."""

    @property
    def connection(self) -> ConnectionSettings:
        return ConnectionSettings(self.servers)

    @contextlib.asynccontextmanager
    async def topics(self, partitions: int = PARTITIONS) -> AsyncIterator[Names]:
        """Empty topics, deleted at the end."""
        name = f"splitferry-bench-{secrets.token_hex(4)}"
        names = Names(f"{name}.splits", f"{name}.results", f"{name}.dead-letters")
        async with administration(self.connection) as cluster:
            await create_topics(cluster, names, partitions, 1, PAYLOAD_MAX)
        try:
            yield names
        finally:
            async with administration(self.connection) as cluster:
                await cluster.delete(list(dataclasses.astuple(names)))

    @contextlib.asynccontextmanager
    async def loaded(
        self, items: int, total: int, split_size: int, partitions: int = PARTITIONS, **how: Any
    ) -> AsyncIterator[Load]:
        """Topics with a load, deleted at the end."""
        async with self.topics(partitions) as names:
            load = Load(names, partitions, items, total, split_size, **how)
            started = time.monotonic()
            await self.send(load)
            seconds = time.monotonic() - started
            print(
                f"{load.total / MIB:.0f} MiB sent as {load.items} items in {load.records} splits "
                f"({seconds:.1f} s with the sync of the disk)",
                flush=True,
            )
            yield load

    async def send(self, load: Load) -> None:
        """Send its splits in full batches, and let the disk come to rest."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self.servers,
            enable_idempotence=True,
            max_batch_size=max(_BATCH, load.split_size + 64 * KIB),
            max_request_size=2 * PAYLOAD_MAX,
        )
        due: deque[Future[Any]] = deque()
        filling = {number: producer.create_batch() for number in load.used}

        async def send(number: int) -> None:
            batch, filling[number] = filling[number], producer.create_batch()
            due.append(await producer.send_batch(batch, load.names.splits, partition=number))
            if len(due) > _IN_FLIGHT:
                await due.popleft()

        async with producer:
            for item, index in load.order():
                split = load.split(item, index)
                value = encode_split(split)
                record: dict[str, Any] = {
                    "key": split.request.key,
                    "value": value,
                    "timestamp": None,
                    "headers": [crc_header(value)],
                }
                number = item % load.partitions
                if filling[number].append(**record) is None:
                    await send(number)
                    filling[number].append(**record)
            for number in load.used:
                if filling[number].record_count():
                    await send(number)
            await gather(*due)
        os.sync()


class _Broker(LocalBroker):
    def _settings(self, clients: str, controller: str) -> dict[str, str]:
        """Deleted topics leave the disk at once, not after a minute: runs of a GiB each add up."""
        soon = {"log.segment.delete.delay.ms": "1000"}
        return super()._settings(clients, controller) | soon


def options(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """What every benchmark can be told; `rounds` is the default where it has any."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--bootstrap-servers",
        metavar="HOST:PORT",
        help="a broker that is there; without it a real one is started for the run",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="on the disk to be measured; the broker's log goes there, too",
    )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="in which all sides run")
    return parser


@contextlib.asynccontextmanager
async def stage(told: argparse.Namespace, space: int) -> AsyncIterator[Stage]:
    """Raises SystemExit when fewer than `space` bytes are free."""
    free = shutil.disk_usage(told.directory).free
    if free < space:
        raise SystemExit(
            f"{told.directory} has {free / GIB:.1f} GiB free, this needs {space / GIB:.1f}: "
            "choose another one with --directory"
        )
    with _directory(told.directory) as directory:
        if told.bootstrap_servers:
            yield Stage(told.bootstrap_servers, directory)
            return
        async with _Broker(directory / "broker") as broker:
            yield Stage(broker.bootstrap_servers, directory)


@contextlib.contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="splitferry-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
