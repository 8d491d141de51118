"""The programs of the README and of the first steps run, and print what is said there."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from brokers import Topics
from command import command, topics_of

REPOSITORY = Path(__file__).parents[2]
BOUND = 60.0


def program(page: str, servers: str, names: Topics) -> str:
    """The Python program of a page, for the broker and the topics of a test."""
    found = re.search(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    assert found is not None
    # The program leaves everything at its defaults; the test needs topics of its own.
    source = found[1].replace('"127.0.0.1:9092"', repr(servers))
    source = re.sub(
        r'group="([\w-]+)"',
        rf'group="\1", splits_topic={names.splits!r}, results_topic={names.results!r}, '
        rf"dead_letters_topic={names.dead_letters!r}",
        source,
    )
    source = source.replace(
        "Producer(kafka)",
        f"Producer(kafka, splits_topic={names.splits!r}, results_topic={names.results!r})",
    )
    assert names.splits in source
    assert servers in source
    return source


async def start(source: str, directory: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", "-c", source), cwd=directory,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_the_library_example(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    names = await topics(partitions=2)
    process = await start(program("README.md", bootstrap_servers, names), tmp_path)
    printed, errors = await process.communicate()
    said = [line for line in printed.decode().splitlines() if re.match("received|completed", line)]
    told = re.search(r"```\n(received.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert told is not None
    assert said == told[1].splitlines(), errors.decode()
    assert process.returncode == 0


async def test_the_service_of_the_first_steps(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    names = await topics(partitions=2)
    item = tmp_path / "model.bin"
    item.write_bytes(os.urandom(3_000_000))
    environment = {"SPLITFERRY_BOOTSTRAP_SERVERS": bootstrap_servers, **topics_of(names)}
    process = await start(program("docs/START.md", bootstrap_servers, names), tmp_path)
    try:
        async with asyncio.timeout(BOUND):
            assert process.stdout is not None
            while await process.stdout.readline() not in {b"ready\n", b""}:
                pass
            assert (await command(environment, "send", item)).code == 0
            process.send_signal(signal.SIGINT)
            printed, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert "received received/model.bin, 3000000 bytes" in printed.decode().splitlines()
    assert (tmp_path / "received" / "model.bin").read_bytes() == item.read_bytes()
    assert process.returncode == 0, errors.decode()


async def test_a_service_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    nowhere = program("docs/START.md", "127.0.0.1:1", Topics("a", "b", "c"))
    process = await start(nowhere, tmp_path)
    _, errors = await process.communicate()
    assert errors.decode().splitlines()[-1].startswith("no Kafka broker answers at 127.0.0.1:1")
    assert "Traceback" not in errors.decode()
    assert process.returncode == 1
