"""A consumer in the process of the test, on a real broker, with topics and a root of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brokers import Topics
from checker import History, read_history
from splitferry_cli.checks import lag
from splitferry_consumer import Consumer, Handler, Settings
from splitferry_producer import Producer
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Result
from workload import Message, send, sending

BOUND = 60.0
"""Seconds after which what should happen counts as not happening."""


@dataclass(frozen=True)
class Place:
    servers: str
    names: Topics
    root: Path
    state: Path

    @property
    def group(self) -> str:
        return self.names.splits.removesuffix(".splits")

    @property
    def connection(self) -> ConnectionSettings:
        return ConnectionSettings(self.servers)

    @asynccontextmanager
    async def serving(
        self, handler: Handler | None = None, **changes: Any
    ) -> AsyncIterator[Consumer]:
        """A consumer that runs meanwhile, and then stops in its phases."""
        settings = Settings(
            self.connection,
            splits_topic=self.names.splits,
            results_topic=self.names.results,
            dead_letters_topic=self.names.dead_letters,
            **{"root": self.root, "group": self.group, "session_timeout": 2.0, **changes},
        )
        async with Consumer(settings, handler) as consumer:
            yield consumer

    def producer(self, **options: Any) -> Producer:
        return Producer(
            self.connection,
            splits_topic=self.names.splits,
            results_topic=self.names.results,
            state_dir=self.state,
            group=self.group,
            **options,
        )

    async def send(self, messages: Sequence[Message]) -> None:
        async with sending(self.servers) as producer:
            await send(producer, self.names.splits, messages)

    async def settled(self) -> None:
        """Wait until W is at the end of the log."""
        async with asyncio.timeout(BOUND):
            while await self.lag():
                await asyncio.sleep(0.05)

    async def lag(self) -> dict[int, int]:
        return await lag(self.connection, self.names.splits, self.group)

    async def history(self, **more: Any) -> History:
        names = (self.names.splits, self.names.results, self.names.dead_letters)
        found = await read_history(self.servers, names, self.group, self.root)
        return History(**{**vars(found), **more})


def results_of(history: History) -> dict[RequestId, Result]:
    """The one result of each request."""
    return {
        outcome.told.request: outcome.told
        for outcome in history.outcomes
        if isinstance(outcome.told, Result) and not outcome.told.repeat
    }
