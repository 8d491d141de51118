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
_NODE = 1
_IN_FLIGHT = 64
"""Splits handed to the client and not yet confirmed."""
_BATCH = MIB
"""Bytes, as the producer of this project has it."""


@dataclass(frozen=True, slots=True)
class Load:
    """Items of equal size in the splits topic of `names`, one in each partition.

    With one item there is one partition with anything in it.
    """

    names: Names
    partitions: int
    items: int
    total: int
    """Bytes of all items."""
    split_size: int

    @property
    def size(self) -> int:
        """Bytes of an item."""
        return self.total // self.items

    @property
    def records(self) -> int:
        return self.items * -(-self.size // self.split_size)


@dataclass(frozen=True, slots=True)
class Stage:
    servers: str
    directory: Path
    """For logs and for what is received; removed at the end."""

    @property
    def connection(self) -> ConnectionSettings:
        return ConnectionSettings(self.servers)

    @contextlib.asynccontextmanager
    async def loaded(
        self, items: int, total: int, split_size: int, partitions: int
    ) -> AsyncIterator[Load]:
        """Topics with a load, deleted at the end."""
        name = f"splitferry-bench-{secrets.token_hex(4)}"
        names = Names(f"{name}.splits", f"{name}.results", f"{name}.dead-letters")
        load = Load(names, partitions, items, total, split_size)
        async with administration(self.connection) as cluster:
            await create_topics(cluster, names, partitions, 1, PAYLOAD_MAX)
        try:
            await _fill(self.servers, load)
            yield load
        finally:
            async with administration(self.connection) as cluster:
                await cluster.delete(list(dataclasses.astuple(names)))


def options(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
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
    return parser


@contextlib.asynccontextmanager
async def stage(told: argparse.Namespace) -> AsyncIterator[Stage]:
    with _directory(told.directory) as directory:
        if told.bootstrap_servers:
            yield Stage(told.bootstrap_servers, directory)
            return
        async with LocalBroker(directory / "broker") as broker:
            yield Stage(broker.bootstrap_servers, directory)


def require_space(directory: Path, size: int) -> None:
    """Raises SystemExit when fewer than `size` bytes are free."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise SystemExit(
            f"{directory} has {free / GIB:.1f} GiB free, this needs {size / GIB:.1f}: "
            "choose another one with --directory"
        )


@contextlib.contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="splitferry-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def _fill(servers: str, load: Load) -> None:
    """Send all items, a split of each in turn, and let the disk come to rest."""
    started = time.monotonic()
    producer = AIOKafkaProducer(
        bootstrap_servers=servers,
        enable_idempotence=True,
        max_batch_size=max(_BATCH, load.split_size + 64 * KIB),
        max_request_size=2 * PAYLOAD_MAX,
    )
    due: deque[Future[Any]] = deque()
    digests = [hashlib.sha256() for _ in range(load.items)]
    noise = random.Random(0).randbytes(16 * MIB + load.split_size)  # incompressible
    async with producer:
        for index, offset in enumerate(range(0, load.size, load.split_size)):
            length = min(load.split_size, load.size - offset)
            for item, digest in enumerate(digests):
                begin = (offset + item * MIB) % (16 * MIB)
                payload = memoryview(noise)[begin : begin + length]
                digest.update(payload)
                done = digest.digest() if offset + length == load.size else None
                request = RequestId(_NODE, item)
                split = Split(
                    request,
                    f"bench/{item}",
                    1,
                    Block.FILE,
                    index,
                    offset,
                    load.size,
                    payload,
                    done,
                )
                value = encode_split(split)
                sent = await producer.send(
                    load.names.splits,
                    value,
                    key=request.key,
                    partition=item % load.partitions,
                    headers=[crc_header(value)],
                )
                due.append(sent)
                if len(due) > _IN_FLIGHT:
                    await due.popleft()
        await gather(*due)
    os.sync()
    seconds = time.monotonic() - started
    print(
        f"{load.total / MIB:.0f} MiB sent as {load.items} files in splits of "
        f"{load.split_size / KIB:.0f} KiB ({seconds:.1f} s with the sync of the disk)",
        flush=True,
    )
