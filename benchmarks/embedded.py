"""A consumer inside a program of its own, with a handler that does nothing.
A side runs it as a process of its own, until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from pathlib import Path
from typing import Any

from splitferry_cli import logs
from splitferry_consumer import ConnectionSettings, Consumer, ReceivedItem, Settings


async def _handle(item: ReceivedItem) -> None:
    assert item.data


async def run(servers: str, **settings: Any) -> None:
    loop = asyncio.get_running_loop()
    async with Consumer(Settings(ConnectionSettings(servers), **settings), _handle) as consumer:
        loop.add_signal_handler(signal.SIGTERM, consumer.stop)
        await consumer.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap-servers", dest="servers", required=True)
    parser.add_argument("--root", type=Path, required=True)
    for name in ("group", "splits-topic", "results-topic", "dead-letters-topic"):
        parser.add_argument(f"--{name}", required=True)
    logs.configure(verbose=False, service=True)
    gc.freeze()  # as `Consumer` says
    gc.set_threshold(10_000)
    asyncio.run(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
