"""Each example runs as it is, but for the broker, and topics and a group of the test's own."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from brokers import Topics
from command import command, topics_of
from place import Place
from splitferry_cli.kafka_process import free_ports

EXAMPLES = Path(__file__).parents[1] / "examples"
BOUND = 90.0
"""Seconds after which an example counts as hanging."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def place(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> Place:
    return Place(bootstrap_servers, await topics(partitions=2), tmp_path / "received", tmp_path)


def fitted(name: str, place: Place, **others: str) -> str:
    """The example's text for the broker and the topics of a test."""
    text = (EXAMPLES / name).read_text()
    names = (
        f"splits_topic={place.names.splits!r}, results_topic={place.names.results!r}, "
        f"dead_letters_topic={place.names.dead_letters!r}, "
    )
    changes = {
        '"127.0.0.1:9092"': repr(place.servers),
        'group="example"': f"group={place.group!r}, {names}session_timeout=2",
        "Producer(CONNECTION)": f"Producer(CONNECTION, splits_topic={place.names.splits!r}, "
        f"results_topic={place.names.results!r})",
        '"splitferry.results"': repr(place.names.results),
        "example-results": f"{place.group}-results",
        **others,
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    assert place.names.splits in text
    assert place.servers in text
    return text


class Example:
    """An example that runs, and the lines that it has printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self, wanted: str) -> None:
        """Read on until a line is `wanted`."""
        assert self.process.stdout is not None
        seen: list[str] = []
        try:
            async with asyncio.timeout(BOUND):
                while wanted not in seen:
                    line = await self.process.stdout.readline()
                    assert line, f"ended before it said {wanted!r}: {seen}"
                    seen.append(line.decode().rstrip())
        except TimeoutError:
            pytest.fail(f"did not say {wanted!r}: {seen}")

    async def ends(self, number: int) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        async with asyncio.timeout(BOUND):
            return await self.process.wait()


@asynccontextmanager
async def running(text: str, place: Place, *arguments: str) -> AsyncIterator[Example]:
    path = place.state / "example.py"
    path.write_text(text)
    with (place.state / "stderr").open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", *(arguments or [str(path)])),
            cwd=place.state,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    try:
        yield Example(process)
    except BaseException:
        print((place.state / "stderr").read_text())
        raise
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def sent(place: Place, *options: str) -> None:
    item = place.state / "item.bin"
    item.write_bytes(bytes(1000) + b"x" * 500)
    environment = {"SPLITFERRY_BOOTSTRAP_SERVERS": place.servers, **topics_of(place.names)}
    outcome = await command(environment, "send", *options, item)
    assert outcome.code == 0, outcome


async def test_the_handler_in_the_process(place: Place) -> None:
    async with running(fitted("handler.py", place), place) as example:
        await example.says("ready")
        await sent(place, "--memory")
        await example.says("item.bin: 1500 bytes, 1000 of them zero")
        await example.says("item.bin: completed")
        assert await example.ends(signal.SIGINT) == 0
    assert "Traceback" not in (place.state / "stderr").read_text()


async def test_the_asyncio_service(place: Place) -> None:
    (port,) = free_ports(0)[:1]
    text = fitted("asyncio_service.py", place, **{"8642": str(port)})
    async with running(text, place) as example:
        await example.says("ready")
        await sent(place, "--version", "3")
        await example.says("item.bin: completed")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b"item.bin: version 3, 1500 bytes\n"
        writer.close()
        assert await example.ends(signal.SIGTERM) == 0
    assert (place.root / "item.bin").stat().st_size == 1500
    assert "Traceback" not in (place.state / "stderr").read_text()


@pytest.mark.parametrize("how", [[], ["-m", "faststream", "run", "example:app"]])
async def test_the_faststream_application(place: Place, how: list[str]) -> None:
    async with running(fitted("faststream_app.py", place), place, *how) as example:
        await example.says("ready")
        await sent(place)
        await example.says(f"item.bin: completed, told by group {place.group}")
        assert await example.ends(signal.SIGTERM) == 0
    assert "Traceback" not in (place.state / "stderr").read_text()


async def test_the_array(place: Place) -> None:
    async with place.serving(), running(fitted("send_array.py", place), place) as example:
        await example.says("weights: completed")
        await example.says("the same array: True")
        assert await example.process.wait() == 0


def test_every_example_is_run() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert re.search(rf'fitted\("{path.name}"', here), path.name
