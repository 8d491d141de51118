"""Every login that the options offer works end to end; what is wrong with one is told in a line."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trustme

from brokers import make_topics
from command import command, topics_of
from proxy import Proxy
from secured_broker import EVERYTHING, REAUTH_MS, SecuredBroker, environment
from splitferry_protocol.connection import SASL_MECHANISMS, ConnectionSettings
from splitferry_protocol.ids import RequestId
from stage import Consumer, Stage, stage, until
from workload import cut, message, sending
from workload import send as write

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

AT_A_TIME = 4
HEALED = 30.0
"""Seconds (RELIABILITY, rule 8)."""
LIFETIMES = (8.0, 32.0, 128.0)
"""Seconds that a certificate lasts which is to run out under a consumer that has joined by then:
one after the other, until the machine is quick enough."""
REFUSED_WITHIN = 40.0
"""Seconds that a command may take to say that it cannot connect, on a busy machine."""


@pytest.fixture
async def alice(secured: SecuredBroker) -> str:
    """A user of the broker who may do everything to the topics of tests."""
    await secured.add_user("alice")
    await secured.grant("alice", *EVERYTHING)
    return "alice"


@dataclass
class Client:
    """The command with one login, on topics of its own."""

    stage: Stage
    environment: dict[str, str]
    _sent: set[RequestId] = field(default_factory=set)

    async def consumer(self) -> Consumer:
        options = {k.removeprefix("SPLITFERRY_"): v for k, v in self.environment.items()}
        return await self.stage.consumer(**options)

    async def sends(self, item: Path) -> None:
        """Send a file, and find its result again."""
        sent = await command(self.environment, "send", "--json", item)
        assert sent.code == 0, sent
        (row,) = map(json.loads, sent.stdout.splitlines())
        assert row["status"] == "completed"
        assert (self.stage.root / item.name).read_bytes() == item.read_bytes()
        found = await command(self.environment, "result", "--json", row["request"])
        assert found.code == 0, found
        assert json.loads(found.stdout)["sha256"] == row["sha256"]

    async def sent(self, number: int) -> None:
        """A request is on the topic."""
        request = RequestId(1, number)
        self._sent.add(request)
        splits = cut(request, b"bytes", 5)
        async with sending(self.stage.servers) as producer:
            await write(producer, self.stage.names.splits, [message(s, 1) for s in splits])

    async def receives(self, number: int) -> None:
        """That request, or a new one, gets its result."""
        request = RequestId(1, number)
        if request not in self._sent:
            await self.sent(number)
        await until(lambda: request in self.stage.results, f"the result of {request}", HEALED)

    async def joins(self, consumer: Consumer) -> None:
        await until(lambda: consumer.heard("partition taken") > 0, "it has joined")

    async def says(self, consumer: Consumer, what: str) -> None:
        await until(lambda: what in consumer.log.read_text(), what)


@asynccontextmanager
async def client(
    secured: SecuredBroker, connection: ConnectionSettings, directory: Path
) -> AsyncIterator[Client]:
    directory.mkdir()
    names = await make_topics(secured.bootstrap_servers, partitions=1)
    async with stage(secured.bootstrap_servers, names, directory) as made:
        options = {
            **topics_of(names),
            **environment(connection, directory / "password"),
            "XDG_STATE_HOME": str(directory / "state"),
        }
        yield Client(made, options)


async def test_each_login_works_end_to_end(
    secured: SecuredBroker, alice: str, tmp_path: Path
) -> None:
    turn = asyncio.Semaphore(AT_A_TIME)
    logins = [
        secured.login(alice, mechanism, listener)
        for mechanism in SASL_MECHANISMS
        for listener in ("PASSWORD", "PASSWORDTLS")
    ]
    logins.append(secured.certified(secured.identity(alice)))
    item = tmp_path / "item"
    item.write_bytes(os.urandom(1_000_000))

    async def works(number: int, login: ConnectionSettings) -> None:
        async with turn, client(secured, login, tmp_path / str(number)) as here:
            await here.consumer()
            await here.sends(item)
            await here.stage.stop()

    async with asyncio.TaskGroup() as tasks:
        for number, login in enumerate(logins):
            tasks.create_task(works(number, login))


COMMANDS = [("send", __file__), ("consume", "--root", "root"), ("topics", "check")]


async def test_what_is_wrong_with_a_login_is_one_line_with_its_remedy(
    secured: SecuredBroker, alice: str, tmp_path: Path
) -> None:
    password = secured.login(alice)
    scram = secured.login(alice, "SCRAM-SHA-512")
    tls = secured.login(alice, listener="PASSWORDTLS")
    certified = secured.certified(secured.identity(alice))
    stranger = trustme.CA()
    strangers = tmp_path / "strangers.pem"
    strangers.write_bytes(stranger.cert_pem.bytes())
    unknown = secured.identity(alice, ca=stranger)
    expired = secured.identity(alice, lifetime=-60)
    open_port, there = secured.bootstrap_servers, ConnectionSettings
    cases: list[tuple[ConnectionSettings, str, str]] = [
        *(
            (replace(login, sasl_password="wrong"), "refuses the login of 'alice'", "the password")
            for login in (password, scram, tls)
        ),
        (replace(password, sasl_username="bob"), "refuses the login of 'bob'", "sasl_username"),
        (replace(scram, sasl_username="bob"), "refuses the login of 'bob'", "sasl_username"),
        (replace(tls, ssl_cafile=str(strangers)), "is not trusted", "check ssl_cafile"),
        (
            replace(tls, bootstrap_servers=f"localhost:{secured.ports['PASSWORDTLS']}"),
            "another host",
            "connect by a name",
        ),
        (secured.certified(expired), "refuses the certificate", "has not expired"),
        (secured.certified(unknown), "refuses the certificate", "trusts who signed it"),
        (
            replace(certified, ssl_certfile=None, ssl_keyfile=None),
            "wants a certificate",
            "ssl_certfile and ssl_keyfile",
        ),
        (there(secured.address("CERTIFICATE")), "speaks TLS", "security_protocol to SSL"),
        (
            replace(password, bootstrap_servers=secured.address("PASSWORDTLS")),
            "speaks TLS",
            "security_protocol to SASL_SSL",
        ),
        (
            replace(certified, bootstrap_servers=open_port),
            "speak no TLS",
            "security_protocol to PLAINTEXT",
        ),
        (
            replace(tls, bootstrap_servers=secured.address("PASSWORD")),
            "speak no TLS",
            "security_protocol to SASL_PLAINTEXT",
        ),
        (
            there(secured.address("PASSWORD")),
            "at the first question",
            "security_protocol to SASL_PLAINTEXT",
        ),
        (
            replace(certified, bootstrap_servers=secured.address("PASSWORDTLS")),
            "at the first question",
            "security_protocol to SASL_SSL",
        ),
        (
            replace(password, bootstrap_servers=open_port),
            "takes no login",
            "security_protocol to PLAINTEXT",
        ),
    ]
    turn = asyncio.Semaphore(AT_A_TIME)

    async def refused(number: int, login: ConnectionSettings, cause: str, remedy: str) -> None:
        args = COMMANDS[number % len(COMMANDS)]
        args = tuple(str(tmp_path / arg) if arg == "root" else arg for arg in args)
        async with turn:
            began = time.monotonic()
            outcome = await command(environment(login, tmp_path / f"password-{number}"), *args)
            took = time.monotonic() - began
        assert outcome.code == 1, (args, outcome)
        assert cause in outcome.error, (args, cause)
        assert remedy in outcome.error, (args, remedy)
        assert took < REFUSED_WITHIN

    async with asyncio.TaskGroup() as tasks:
        for number, case in enumerate(cases):
            tasks.create_task(refused(number, *case))


async def test_a_consumer_outlives_its_login_and_says_what_it_waits_for(
    secured: SecuredBroker, tmp_path: Path
) -> None:
    """A user who is removed and made again, and a certificate that runs out and is renewed."""
    for user in ("passing", "expiring"):
        await secured.grant(user, *EVERYTHING)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_removed(secured, tmp_path / "removed"))
        tasks.create_task(_expired(secured, tmp_path / "expired"))


async def _removed(secured: SecuredBroker, directory: Path) -> None:
    await secured.add_user("passing")
    login = secured.login("passing", "SCRAM-SHA-512", "RELOGIN")
    async with client(secured, login, directory) as here:
        consumer = await here.consumer()
        await here.receives(1)
        await asyncio.sleep(REAUTH_MS / 1000)
        await here.receives(2)  # with another login than the first
        await secured.remove_user("passing")
        await here.says(consumer, "it refuses the login of 'passing'")
        await here.sent(3)
        await secured.add_user("passing")
        await here.receives(3)
        await here.stage.stop()


async def _expired(secured: SecuredBroker, directory: Path) -> None:
    async with Proxy(secured.ports["RELAYED"], secured.relayed) as proxy:
        own = secured.identity("expiring")
        async with client(secured, secured.certified(own, "RELAYED"), directory) as here:
            for lifetime in LIFETIMES:
                ends = time.monotonic() + lifetime
                secured.identity("expiring", lifetime=lifetime).replace(own)
                consumer = await here.consumer()
                await here.joins(consumer)
                if time.monotonic() < ends:
                    break
                await consumer.stop()
            await here.receives(1)
            await asyncio.sleep(max(0.0, ends - time.monotonic()))
            proxy.reset()
            await here.says(consumer, "the broker refuses the certificate of this user")
            await here.sent(2)
            secured.identity("expiring").replace(own)
            await here.receives(2)
            await here.stage.stop()
