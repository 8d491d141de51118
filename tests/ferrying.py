"""A stage, a producer, and items that go through while a test breaks something and heals it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

from aiokafka import AIOKafkaProducer

from brokers import Topics
from checker import violations
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Block, Split, Status
from stage import Stage, stage, until
from workload import KIB, cut, message, send, sending

RESUMED = 30.0
"""Seconds: rule 8."""
Excused = Mapping[RequestId, tuple[Status, str]]


class Ferrying:
    """Sends items into `partitions` partitions of the stage `run`. Made by `ferrying`."""

    def __init__(self, run: Stage, producer: AIOKafkaProducer, partitions: int) -> None:
        self.run = run
        self._producer = producer
        self._partitions = partitions
        self._numbers = count(1)
        self._rng = random.Random(7)

    def item(
        self,
        size: int = 200 * KIB,
        *,
        unique_id: str | None = None,
        version: int = 1,
        block: Block = Block.FILE,
    ) -> list[Split]:
        """The splits of a new item of so many bytes, the first one last: so the digest has to
        read back what was written."""
        request = RequestId(1, next(self._numbers))
        data = self._rng.randbytes(size)
        splits = cut(request, data, 64 * KIB, unique_id=unique_id, version=version, block=block)
        return [*splits[1:], splits[0]]

    async def send(self, *splits: Split | Abort) -> RequestId:
        """The request of the splits that were sent."""
        messages = [message(split, self._partitions) for split in splits]
        await send(self._producer, self.run.names.splits, messages)
        return splits[0].request

    def told(self, request: RequestId) -> str | None:
        """How the result reads: its status, or the code of its error."""
        result = self.run.results.get(request)
        if result is None:
            return None
        return result.status.value if result.error is None else result.error.code

    async def ends(self, request: RequestId, as_told: str = "completed", why: str = "") -> None:
        """Wait for the result, as long as rule 8 allows."""
        await until(lambda: self.told(request) is not None, f"{request} {why}", RESUMED)
        assert self.told(request) == as_told, (why, self.run.results[request])

    async def goes_on(self, why: str = "", block: Block = Block.MEM) -> None:
        """Small items of the block type go through, in every partition."""
        splits = [self.item(KIB, block=block) for _ in range(4 * self._partitions)]
        for request in [await self.send(*one) for one in splits]:
            await self.ends(request, why=f"others go on: {why}")

    async def finish(self, excused: Excused | None = None) -> None:
        """Stop the consumers, and have the checker look at everything."""
        await self.run.settle()
        await self.run.stop()
        assert violations(await self.run.history(excused=excused or {})) == []


@asynccontextmanager
async def ferrying(
    servers: str,
    topics: Callable[..., Awaitable[Topics]],
    directory: Path,
    partitions: int = 1,
) -> AsyncIterator[Ferrying]:
    names = await topics(partitions=partitions)
    async with stage(servers, names, directory) as run, sending(servers) as producer:
        yield Ferrying(run, producer, partitions)
