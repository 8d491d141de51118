"""Receive `mem` items in the process, without files or shared memory.

$ splitferry broker                  # this and what follows: each in a terminal of its own
$ splitferry topics create
$ python examples/handler.py
$ splitferry send --memory model.bin

Ctrl-C finishes what is in flight.
"""

import asyncio
from contextlib import suppress
from pathlib import Path

from splitferry_consumer import ConnectionSettings, Consumer, ReceivedItem, Settings

SETTINGS = Settings(ConnectionSettings("127.0.0.1:9092"), root=Path("received"), group="example")


async def handler(item: ReceivedItem) -> None:
    """Work on one whole item. An exception fails its request; its result is told afterwards.

    After a crash between the two the item comes again: whoever must not act on it twice
    remembers `item.request`.
    """
    zeros = await asyncio.to_thread(item.data.tobytes().count, 0)
    print(f"{item.unique_id}: {len(item.data)} bytes, {zeros} of them zero")


async def main() -> None:
    async with Consumer(SETTINGS, handler) as consumer:
        print("ready")
        async for result in consumer.results():
            print(f"{result.unique_id}: {result.status}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
