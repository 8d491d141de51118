"""A FastStream application that receives files, and reacts to everybody's results.

$ pip install 'faststream[cli,kafka]'
$ splitferry broker                  # this and what follows: each in a terminal of its own
$ splitferry topics create
$ faststream run examples.faststream_app:app     # or: python examples/faststream_app.py
$ splitferry send model.bin
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from faststream import FastStream
from faststream.kafka import KafkaBroker, KafkaMessage

from splitferry_consumer import ConnectionSettings, Consumer, Result, Settings
from splitferry_protocol import Accepted, decode_outcome

SERVERS = "127.0.0.1:9092"
SETTINGS = Settings(ConnectionSettings(SERVERS), root=Path("received"), group="example")

broker = KafkaBroker(SERVERS, apply_types=False)


@asynccontextmanager
async def receiving() -> AsyncIterator[None]:
    """Receive as long as the application runs; it ends if the consumer fails."""
    async with Consumer(SETTINGS):
        print("ready")
        yield


app = FastStream(broker, lifespan=receiving)


async def outcome(message: KafkaMessage) -> Result | Accepted:
    """The bytes of the results topic are msgpack, and their key matters."""
    record = message.raw_message
    assert not isinstance(record, tuple)
    return decode_outcome(record.key, record.value)


@broker.subscriber(
    "splitferry.results",
    group_id="example-results",
    auto_offset_reset="earliest",
    isolation_level="read_committed",  # results are told in transactions
    decoder=outcome,
)
async def on_outcome(told: Result | Accepted) -> None:
    if isinstance(told, Result) and not told.repeat:
        print(f"{told.unique_id}: {told.status}, told by group {told.group}")


if __name__ == "__main__":
    asyncio.run(app.run())
