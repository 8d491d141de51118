"""The command as a process that ends by itself."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from brokers import Topics

BOUND = 60.0
"""Seconds after which a command counts as hanging."""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self
        return lines[0]


def topics_of(names: Topics) -> dict[str, str]:
    """The options that name topics, as variables of the environment."""
    return {
        "SPLITFERRY_SPLITS_TOPIC": names.splits,
        "SPLITFERRY_RESULTS_TOPIC": names.results,
        "SPLITFERRY_DEAD_LETTERS_TOPIC": names.dead_letters,
    }


async def command(environment: Mapping[str, str], *args: str | Path) -> Outcome:
    """Run `splitferry` with `args`, and with no option but those of `environment`."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("SPLITFERRY_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "splitferry_cli", *map(str, args)),
        env={**others, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(BOUND):
            stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Outcome(process.returncode, stdout.decode(), stderr.decode())
