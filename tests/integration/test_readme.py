"""The README's program runs and prints what the README says."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from brokers import Topics

README = (Path(__file__).parents[2] / "README.md").read_text()


async def test_the_library_example(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    program = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert program is not None
    source, output = program.groups()
    names = await topics(partitions=2)
    # The example leaves everything at its defaults; the test needs a broker and topics of its own.
    source = source.replace('"127.0.0.1:9092"', repr(bootstrap_servers))
    source = source.replace(
        'group="example"',
        f'group="example", splits_topic={names.splits!r}, results_topic={names.results!r}, '
        f"dead_letters_topic={names.dead_letters!r}",
    )
    source = source.replace(
        "Producer(kafka)",
        f"Producer(kafka, splits_topic={names.splits!r}, results_topic={names.results!r})",
    )
    assert names.splits in source
    assert bootstrap_servers in source
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, errors = await process.communicate()
    said = [line for line in printed.decode().splitlines() if re.match("received|completed", line)]
    assert said == output.splitlines(), errors.decode()
    assert process.returncode == 0
