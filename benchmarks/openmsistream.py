"""OpenMSIStream, which moves files through Kafka in chunks of 512 KiB with a SHA-512 each: run by
its own commands, in an environment of its own that is made on first use.

It syncs nothing, tells no results and writes into the final file as chunks come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from load import Stage
from sides import HERE, folder, while_watched
from watched import INTERVAL, Measurement, Watched, watched

VERSION = "1.8.8"
ENVIRONMENT = HERE.parent / ".venv-openmsistream"
_PYTHON = ENVIRONMENT / "bin" / "python"
_CONFIG = """
[broker]
bootstrap.servers = {servers}
[producer]
batch.size = 2000000
linger.ms = 100
key.serializer = StringSerializer
value.serializer = DataFileChunkSerializer
[consumer]
auto.offset.reset = earliest
enable.auto.commit = False
fetch.min.bytes = 100000
key.deserializer = StringDeserializer
value.deserializer = DataFileChunkDeserializer
"""
"""As its documentation proposes, without the compression: these bytes have nothing to compress."""


def installed() -> bool:
    """Make the environment if it is not there; False, and the reason told, when it cannot be."""
    if (done := ENVIRONMENT / f"installed-{VERSION}").exists():
        return True
    print(f"installing OpenMSIStream {VERSION} into {ENVIRONMENT.name}")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    pip = ["-m", "pip", "install", "--quiet", f"openmsistream=={VERSION}"]
    try:
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([_PYTHON, *pip], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"OpenMSIStream is left out: {error}", flush=True)
        return False
    done.touch()
    return True


async def upload(here: Stage, files: Path) -> Measurement:
    """Into a topic of its own."""
    async with here.topics() as names:
        return await _upload(here, files, names.splits)


@contextlib.asynccontextmanager
async def uploaded(here: Stage, files: Path) -> AsyncIterator[str]:
    """A topic with the files in its own format, deleted at the end."""
    async with here.topics() as names:
        await _upload(here, files, names.splits)
        yield names.splits


async def _upload(here: Stage, files: Path, topic: str) -> Measurement:
    """From when it says that it begins to the confirmation of the last chunk, as its log tells."""
    count = len(list(files.iterdir()))
    with folder(here, "uploaded") as copy:  # it writes a log of its own beside the files
        for path in files.iterdir():
            (copy / path.name).hardlink_to(path)
        arguments = [str(copy), f"--topic_name={topic}", "--upload_existing", "--n_threads=2"]

        async def work(process: Watched) -> tuple[float, float]:
            first = await process.printed("Will upload")
            return first, await process.printed("has been fully produced to", count)

        return await _run(here, "DataFileUploadDirectory", arguments, work)


async def download(here: Stage, topic: str, files: int, threads: int) -> Measurement:
    """From the creation of the first file to the completion of the last, as its log tells."""
    with folder(here, "downloaded") as path:
        arguments = [
            *(str(path), f"--consumer_topic_name={topic}", f"--n_threads={threads}"),
            "--consumer_group_id=create_new",
        ]

        async def work(process: Watched) -> tuple[float, float]:
            while not any(one.is_file() and one.suffix == ".bin" for one in path.rglob("*")):
                await asyncio.sleep(INTERVAL)
            first = time.time()
            return first, await process.printed("successfully reconstructed from", files)

        return await _run(here, "DataFileDownloadDirectory", arguments, work)


async def _run(
    here: Stage,
    command: str,
    arguments: list[str],
    work: Callable[[Watched], Coroutine[Any, Any, tuple[float, float]]],
) -> Measurement:
    config = here.directory / "openmsistream.config"
    config.write_text(_CONFIG.format(servers=here.servers))
    told = [*arguments, f"--config={config}", "--logger_stream_level=debug"]
    command_file = os.fspath(ENVIRONMENT / "bin" / command)

    async with watched(
        [command_file, *told], here.directory / "openmsistream.log", _PYTHON
    ) as process:
        first, last = await while_watched(process, work(process))
        return process.measured(first, last)
