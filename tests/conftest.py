"""What all tests share: a real broker, topics of their own, and no blocking calls in the loop."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from blockbuster import BlockBuster, blockbuster_ctx

from splitferry_cli.broker import LocalBroker, answers
from splitferry_cli.kafka_jars import KAFKA_VERSION
from splitferry_cli.kafka_process import SETTINGS, free_ports, node

T = TypeVar("T")

PACKAGES = ["splitferry_protocol", "splitferry_producer", "splitferry_consumer", "splitferry_cli"]
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "bootstrap_servers" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.kafka)


@pytest.fixture(autouse=True, scope="session")
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A call below our own code that blocks the event loop raises BlockingError."""
    with blockbuster_ctx(PACKAGES) as detection:
        yield detection


@pytest.fixture(scope="session")
def bootstrap_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real broker: SPLITFERRY_TEST_BOOTSTRAP, else in Docker, else a local one.

    SPLITFERRY_TEST_BROKER=docker or =local leaves no choice between the last two.
    """
    wanted = os.environ.get("SPLITFERRY_TEST_BROKER", "")
    assert wanted in {"", "docker", "local"}, "SPLITFERRY_TEST_BROKER is docker or local"
    if given := os.environ.get("SPLITFERRY_TEST_BOOTSTRAP"):
        yield given
    elif wanted == "docker" or (not wanted and docker_answers()):
        with broker_in_docker() as servers:
            yield servers
    else:
        broker = LocalBroker(tmp_path_factory.mktemp("broker"))
        run(broker.start())
        yield broker.bootstrap_servers
        run(broker.stop())


@dataclass(frozen=True)
class Topics:
    splits: str
    results: str
    dead_letters: str


@pytest.fixture
def topics(bootstrap_servers: str) -> Callable[..., Awaitable[Topics]]:
    """`await topics(partitions=4)`: new topics that nobody else uses."""

    async def create(partitions: int = 4) -> Topics:
        name = f"test-{uuid.uuid4().hex[:12]}"
        made = Topics(f"{name}.splits", f"{name}.results", f"{name}.dead-letters")
        new = [
            _topic(made.splits, partitions, {"max.message.bytes": str(SPLITS_BYTES)}),
            _topic(made.results, partitions, {}),
            _topic(made.dead_letters, 1, {"max.message.bytes": str(DEAD_LETTERS_BYTES)}),
        ]
        client = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
        await client.start()
        try:
            answer: Any = await client.create_topics(new)
        finally:
            await client.close()
        # The client does not raise what the broker answers.
        assert [error[1] for error in answer.topic_errors] == [0, 0, 0], answer
        return made

    return create


def _topic(name: str, partitions: int, configs: dict[str, str]) -> NewTopic:
    return NewTopic(name, partitions, replication_factor=1, topic_configs=configs)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` without touching the loop of the test that goes on (asyncio.run would)."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)


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
