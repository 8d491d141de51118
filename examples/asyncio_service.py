"""A plain asyncio service that receives files and tells over TCP what it has.

$ splitferry broker                  # this and what follows: each in a terminal of its own
$ splitferry topics create
$ python examples/asyncio_service.py
$ splitferry send model.bin
$ nc 127.0.0.1 8642

SIGTERM or Ctrl-C: what is in flight is finished within the grace, then everything ends in order.
Should the consumer fail, its block is cancelled, and the program ends with what made it fail.
"""

import asyncio
import signal
from pathlib import Path

from splitferry_consumer import ConnectionSettings, Consumer, Result, Settings

SETTINGS = Settings(
    ConnectionSettings("127.0.0.1:9092"), root=Path("received"), group="example", grace=10
)
HOST, PORT = "127.0.0.1", 8642


async def main() -> None:
    received: dict[str, Result] = {}

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for name, result in received.items():
            writer.write(f"{name}: version {result.version}, {result.size} bytes\n".encode())
        writer.close()
        await writer.wait_closed()

    async with Consumer(SETTINGS) as consumer, await asyncio.start_server(answer, HOST, PORT):
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, consumer.stop)
        print("ready")
        # Ends when the consumer was stopped and its last result is given.
        async for result in consumer.results():
            print(f"{result.unique_id}: {result.status}")
            if result.success:  # the file is durable at its path from before this is told
                received[result.unique_id] = result
    print("stopped")


if __name__ == "__main__":
    asyncio.run(main())
