"""The brokers that tests can have, and what they make there. Fixtures: `conftest.py`."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from proxy import HOST, Proxy
from splitferry_cli import broker as broker_module
from splitferry_cli.broker import LocalBroker, answers
from splitferry_cli.kafka_jars import KAFKA_VERSION
from splitferry_cli.kafka_process import SETTINGS, free_ports, node
from splitferry_cli.topic_rules import BY_BROKER

T = TypeVar("T")

broker_module._START_SECONDS = 240
"""A start may take long on a busy machine; what is too long is for the tests' limits to say."""

SPLITS_BYTES = 17 * 2**20
"""max.message.bytes of a splits topic: a payload of 16 MiB and its header."""
DEAD_LETTERS_BYTES = SPLITS_BYTES + 64 * 2**10

if Path("/.dockerenv").exists():
    # Else testcontainers, which reads this at its import, looks for the broker at the
    # address that a sibling container would have; our broker is told to be on loopback.
    os.environ.setdefault("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
    os.environ.setdefault("TC_HOST", "127.0.0.1")
# The reaper is one more image to pull; the fixture removes its container itself.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")


@dataclass(frozen=True)
class Topics:
    splits: str
    results: str
    dead_letters: str


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` without touching the loop of the test that goes on (asyncio.run would)."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)


@asynccontextmanager
async def administrator(servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=servers)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def configure(client: AIOKafkaAdminClient, topic: str, configs: dict[str, str]) -> None:
    """Set a topic's configs. The controller has them at once; the broker learns of them later."""
    await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])
    async with asyncio.timeout(60):
        while not configs.items() <= (await _configs(client, topic)).items():
            await asyncio.sleep(0.02)


async def _configs(client: AIOKafkaAdminClient, topic: str) -> dict[str, str]:
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic)]
    answers: list[Any] = await client.describe_configs(asked)
    ((code, _, _, _, entries),) = answers[0].resources
    assert code == 0
    return {entry[0]: entry[1] for entry in entries}


async def make_topics(servers: str, partitions: int = 4) -> Topics:
    """New topics that nobody else uses."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    made = Topics(f"{name}.splits", f"{name}.results", f"{name}.dead-letters")
    new = [
        _topic(made.splits, partitions, {"max.message.bytes": str(SPLITS_BYTES)}),
        _topic(made.results, partitions, {}),
        _topic(made.dead_letters, 1, {"max.message.bytes": str(DEAD_LETTERS_BYTES)}),
    ]
    async with administrator(servers) as admin:
        answer: Any = await admin.create_topics(new)
        # The client does not raise what the broker answers.
        assert [error[1] for error in answer.topic_errors] == [0, 0, 0], answer
        # The controller has them; the broker learns of them a little later.
        async with asyncio.timeout(60):
            while any(t["error_code"] for t in await admin.describe_topics([t.name for t in new])):
                await asyncio.sleep(0.05)
    return made


def _topic(name: str, partitions: int, configs: dict[str, str]) -> NewTopic:
    configs = {"message.timestamp.type": BY_BROKER, **configs}
    return NewTopic(name, partitions, replication_factor=1, topic_configs=configs)


def docker_answers() -> bool:
    from docker import DockerClient  # type: ignore[import-untyped]
    from docker.errors import DockerException  # type: ignore[import-untyped]

    try:
        client = DockerClient.from_env(timeout=5)
    except DockerException:
        return False
    try:
        return bool(client.ping())
    except (DockerException, OSError):
        return False
    finally:
        client.close()


@contextmanager
def broker_in_docker() -> Iterator[str]:
    """Apache Kafka's own image, reached at 127.0.0.1 on a port that is free now."""
    from testcontainers.core.container import DockerContainer

    port, controller = free_ports(0)
    servers = f"127.0.0.1:{port}"
    # One port inside and outside: the broker, too, reaches itself at the advertised address.
    settings = SETTINGS | node(f"0.0.0.0:{port}", servers, f"127.0.0.1:{controller}")
    container = DockerContainer(f"apache/kafka:{KAFKA_VERSION}")
    # Any one of these makes the image forget all its defaults, so it is given all of them.
    for name, value in settings.items():
        container.with_env("KAFKA_" + name.upper().replace(".", "_"), value)
    ports: dict[Any, Any] = container.ports
    ports[port] = ("127.0.0.1", port)  # with_bind_ports() takes no address
    with container:
        run(_until_answers(servers))
        yield servers


async def _until_answers(servers: str) -> None:
    async with asyncio.timeout(60):
        while not await answers(servers):
            await asyncio.sleep(0.2)


class KillableBroker(LocalBroker):
    """A broker to be killed, frozen and started again, with the same data on the same ports.

    `bootstrap_servers` leads to it directly, and each of its `proxies` through a network of its
    own: a client goes on with the address that the listener advertises which it came to.
    """

    def __init__(self, data: Path, proxies: int = 1) -> None:
        direct, *ports = quiet_ports(1 + 2 * proxies)
        self._proxied = list(zip(ports[::2], ports[1::2], strict=True))
        super().__init__(data, direct)

    def proxy(self, number: int = 0) -> Proxy:
        """One object at a time for each number: its port is the one that the broker advertises."""
        return Proxy(*self._proxied[number])

    async def kill(self) -> None:
        """SIGKILL. `start` begins it again, `stop` ends it gracefully."""
        self._signal(signal.SIGKILL)
        await self.stop()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, the kernel takes new ones, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.pid is not None, "not started"
        os.kill(self.pid, number)

    def _settings(self, clients: str, controller: str) -> dict[str, str]:
        settings = super()._settings(clients, controller)
        for number, (before, behind) in enumerate(self._proxied):
            settings["listeners"] += f",PROXIED{number}://{HOST}:{behind}"
            settings["advertised.listeners"] += f",PROXIED{number}://{HOST}:{before}"
            settings["listener.security.protocol.map"] += f",PROXIED{number}:PLAINTEXT"
        # A killed broker may register again only when the one before counts as gone.
        settings["broker.session.timeout.ms"] = "3000"
        return settings


def quiet_ports(count: int) -> list[int]:
    """Free ports that nobody takes before we do, or while a broker is down: the kernel gives those
    from 32768 upwards to connections, `free_ports` takes from 20,000 upwards, and each process of
    pytest-xdist has some of its own."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + 1000 * (process % 10)
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(first, first + 1000)
        with suppress(OSError), socket.create_server((HOST, port)):
            if port not in found:
                found.append(port)
    return found
