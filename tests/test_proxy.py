"""The proxy against a server that answers each line with the same in capitals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from brokers import quiet_ports
from proxy import HOST, Proxy

SOON = 0.3
"""Seconds in which what comes has come, and what has not come is held back."""


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def say(self, line: bytes) -> None:
        self._writer.write(line + b"\n")

    async def hear(self) -> bytes:
        async with asyncio.timeout(10):
            return (await self._reader.readuntil())[:-1]

    async def ask(self, line: bytes) -> bytes:
        self.say(line)
        return await self.hear()

    async def silent(self) -> bool:
        try:
            async with asyncio.timeout(SOON):
                return not await self._reader.readuntil()
        except TimeoutError:
            return True

    async def gone(self) -> bool:
        try:
            return not await self._reader.read(1)
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._writer.transport.abort()


class Echo:
    """What was heard, and the proxy before it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.heard: list[bytes] = []
        self.clients: list[Client] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            while line := await reader.readline():
                self.heard.append(line[:-1])
                writer.write(line.upper())
        writer.close()

    async def client(self) -> Client:
        self.clients.append(Client(*await asyncio.open_connection(HOST, self.proxy.port)))
        return self.clients[-1]


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    before, behind = quiet_ports(2)
    made = Echo(Proxy(before, behind))
    server = await asyncio.start_server(made.serve, HOST, behind)
    async with made.proxy:
        yield made
        for client in made.clients:
            client.close()
    server.close()


async def test_cut_connections_are_reset_and_new_ones_refused(echo: Echo) -> None:
    client = await echo.client()
    assert await client.ask(b"a") == b"A"
    echo.proxy.cut()
    assert await client.gone()
    with pytest.raises(ConnectionRefusedError):
        await echo.client()
    await echo.proxy.heal()
    assert await (await echo.client()).ask(b"b") == b"B"


async def test_what_a_blackhole_took_arrives_when_it_is_healed(echo: Echo) -> None:
    client = await echo.client()
    assert await client.ask(b"a") == b"A"
    echo.proxy.blackhole()
    late = await echo.client()
    client.say(b"b")
    late.say(b"c")
    assert await client.silent()
    assert echo.heard == [b"a"]
    await echo.proxy.heal()
    assert (await client.hear(), await late.hear()) == (b"B", b"C")


async def test_a_blackhole_for_answers_lets_requests_through(echo: Echo) -> None:
    client = await echo.client()
    echo.proxy.blackhole(requests=False)
    client.say(b"a")
    assert await client.silent()
    assert echo.heard == [b"a"]
    await echo.proxy.heal()
    assert await client.hear() == b"A"


async def test_a_forgotten_connection_stays_silent(echo: Echo) -> None:
    client = await echo.client()
    assert await client.ask(b"a") == b"A"
    echo.proxy.forget()
    assert await (await echo.client()).ask(b"b") == b"B"
    await echo.proxy.heal()
    client.say(b"c")
    assert await client.silent()
    assert echo.heard == [b"a", b"b"]


async def test_delay_and_throttle_cost_time_and_nothing_else(echo: Echo) -> None:
    client = await echo.client()
    echo.proxy.delay(0.1, 0.05)
    began = time.monotonic()
    assert await client.ask(b"a") == b"A"
    assert time.monotonic() - began >= 0.2
    await echo.proxy.heal()
    echo.proxy.throttle(200_000)
    began = time.monotonic()
    assert await client.ask(b"x" * 40_000) == b"X" * 40_000
    assert time.monotonic() - began >= 0.35


async def test_resets_come_at_random(echo: Echo) -> None:
    echo.proxy.reset_at_random(0.5, seed=1)
    fates = []
    for _ in range(20):
        client = await echo.client()
        client.say(b"a")
        fates.append(await client.gone())
    assert 0 < sum(fates) < 20
    # Some were obeyed, and only the answer was lost.
    assert len(echo.heard) > fates.count(False)


async def test_clients_of_a_broker_that_is_down_are_reset(echo: Echo) -> None:
    before, behind = quiet_ports(2)
    async with Proxy(before, behind) as proxy:
        client = Client(*await asyncio.open_connection(HOST, proxy.port))
        assert await client.gone()
        client.close()
