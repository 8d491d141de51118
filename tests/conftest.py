"""What all tests share: a real broker, topics of their own, and no blocking calls in the loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings

from brokers import Topics, broker_in_docker, docker_answers, make_topics, run
from splitferry_cli.broker import LocalBroker

PACKAGES = ["splitferry_protocol", "splitferry_producer", "splitferry_consumer", "splitferry_cli"]


# A shell starts what goes on in the background with SIGINT ignored; all that tests start, and stop
# by it, would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine holds up any example for longer than the 200 ms that Hypothesis allows by itself.
# Whoever judges mutants has loaded a profile before.
if settings.get_current_profile_name() == "default":
    slow = [HealthCheck.too_slow]
    settings.register_profile("unhurried", deadline=None, suppress_health_check=slow)
    settings.load_profile("unhurried")

BROKERS = {"bootstrap_servers", "killable_broker", "broker"}
"""Fixtures that start one."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest: dict[Path, float] = {}
    for item in items:
        if BROKERS & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.kafka)
        limit = item.get_closest_marker("timeout")
        seconds = limit.args[0] if limit is not None else None
        longest[item.path] = max(longest.get(item.path, 0.0), seconds or 0.0)
    # Files that may take long go first, or the last process would work on one by itself.
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(autouse=True, scope="session")
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A call below our own code that blocks the event loop raises BlockingError."""
    with blockbuster_ctx(PACKAGES) as detection:
        # In memory: see `Target.in_memory`.
        detection.functions["os.rename"].can_block_in("targets/memory.py", "_finish")
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


@pytest.fixture
def topics(bootstrap_servers: str) -> Callable[..., Awaitable[Topics]]:
    """`await topics(partitions=4)`: new topics that nobody else uses."""

    async def create(partitions: int = 4) -> Topics:
        return await make_topics(bootstrap_servers, partitions)

    return create
