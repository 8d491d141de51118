"""The brokers that tests can have, and what they make there. Fixtures: `conftest.py`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from splitferry_cli.broker import answers
from splitferry_cli.kafka_jars import KAFKA_VERSION
from splitferry_cli.kafka_process import SETTINGS, free_ports, node

T = TypeVar("T")

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
