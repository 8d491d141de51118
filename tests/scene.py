"""A consumer process on topics of its own, for one fault: what is sent, told and said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from brokers import Topics, administrator, configure, make_topics
from checker import Outcome, read_outcomes, violations
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result, Split
from stage import Consumer, Stage, stage, until, whole_lines
from workload import cut, message, send, sending

RESUMED = 30.0
"""Seconds after healing (rule 8)."""


class Scene:
    """Made by `scene`."""

    def __init__(
        self, run: Stage, partitions: int, producer: AIOKafkaProducer, admin: AIOKafkaAdminClient
    ) -> None:
        self.run = run
        self.names: Topics = run.names
        self.servers = run.servers
        self.admin = admin
        self._partitions = partitions
        self._producer = producer
        self._numbers = count(1)

    async def consumer(self, **options: str) -> Consumer:
        """Start a consumer, and wait until it has taken all partitions."""
        made = await self.run.consumer(**options)
        await until(lambda: made.heard("partition taken") >= self._partitions, "a start")
        return made

    async def begin(self, partition: int = 0, size: int = 1000) -> tuple[RequestId, list[Split]]:
        """Send the first split of an item; those that are left are the caller's to `send`."""
        number = next(self._numbers)
        request = RequestId(5, number)
        splits = cut(request, number.to_bytes(4) * (size // 4), max(1, size // 2))
        await self.send(splits[:1], partition)
        return request, splits[1:]

    async def item(self, partition: int = 0, size: int = 1000) -> RequestId:
        request, left = await self.begin(partition, size)
        await self.send(left, partition)
        return request

    async def send(self, splits: Sequence[Split], partition: int = 0) -> None:
        messages = [replace(message(s, 1), partition=partition) for s in splits]
        await send(self._producer, self.names.splits, messages)

    # ---- what is told and said

    async def told(self, *requests: RequestId, bound: float = RESUMED) -> None:
        """Wait for their results."""

        def have() -> bool:
            return all(request in self.run.results for request in requests)

        await until(have, f"results of {[str(r) for r in requests]}", bound)

    def lines(self, consumer: Consumer) -> list[dict[str, Any]]:
        return [json.loads(line) for line in whole_lines(consumer.log)]

    async def said(
        self, consumer: Consumer, event: str, text: str = "", bound: float = RESUMED
    ) -> dict[str, Any]:
        """Wait until the log has a line of `event` that holds `text`; returns it."""
        found: list[dict[str, Any]] = []

        def have() -> bool:
            lines = self.lines(consumer)
            found[:] = [x for x in lines if x["event"] == event and text in json.dumps(x)]
            return bool(found)

        await until(have, f"{event!r} with {text!r}", bound)
        return found[0]

    async def outcomes(self) -> list[Outcome]:
        return await read_outcomes(self.servers, self.names.results)

    async def results(self) -> list[RequestId]:
        """The requests of all results that are in the topic now, in order of the requests."""
        told = [outcome.told for outcome in await self.outcomes()]
        return sorted(o.request for o in told if isinstance(o, Result) and not o.repeat)

    # ---- topics

    async def configure(self, topic: str, **configs: str) -> None:
        """Set a topic's configs, named with `_` for `.`."""
        named = {name.replace("_", "."): value for name, value in configs.items()}
        await configure(self.admin, topic, named)

    async def delete(self, topic: str) -> None:
        await self.admin.delete_topics([topic])

    async def create(self, topic: str, partitions: int) -> None:
        async def created() -> bool:
            answer: Any = await self.admin.create_topics([NewTopic(topic, partitions, 1)])
            return bool(answer.topic_errors[0][1] == 0)

        await until(created, f"{topic} made anew")

    async def grow(self, topic: str, partitions: int) -> None:
        """Add partitions to a topic, and let our own producer know."""
        await self.admin.create_partitions({topic: NewPartitions(partitions)})

        async def known() -> bool:
            await self._producer.client.force_metadata_update()
            found = await self._producer.partitions_for(self.names.splits)
            return topic != self.names.splits or len(found) == partitions

        await until(known, f"{partitions} partitions of {topic}")

    # ---- the end

    async def sound(self, held: int = 0, **more: Any) -> None:
        """Stop; nothing of what must never happen has happened."""
        await self.run.settle(held)
        await self.run.stop()
        assert violations(await self.run.history(**more)) == []


@asynccontextmanager
async def scene(servers: str, directory: Path, partitions: int = 2) -> AsyncIterator[Scene]:
    names = await make_topics(servers, partitions)
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(stage(servers, names, directory))
        producer = await stack.enter_async_context(sending(servers))
        admin = await stack.enter_async_context(administrator(servers))
        yield Scene(run, partitions, producer, admin)


Act = Callable[[str, Path], Awaitable[None]]
"""One fault from its beginning to its end, given the broker and a directory."""


async def side_by_side(servers: str, directory: Path, *acts: Act) -> None:
    """Most of their time is waiting."""
    async with asyncio.TaskGroup() as group:
        for act in acts:
            group.create_task(_named(act, servers, directory / act.__name__))


async def _named(act: Act, servers: str, directory: Path) -> None:
    try:
        await act(servers, directory)
    except Exception as error:
        error.add_note(f"in {act.__name__}")
        raise
