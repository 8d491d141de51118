"""Send a numpy array without copying it, and find it in shared memory on the consumer's host.

$ splitferry broker                  # this and what follows: each in a terminal of its own
$ splitferry topics create
$ splitferry consume --root received
$ python examples/send_array.py
"""

import asyncio
from typing import Any

import numpy as np

from splitferry_consumer import attach
from splitferry_producer import ConnectionSettings, MemorySource, Producer

CONNECTION = ConnectionSettings("127.0.0.1:9092")


async def main() -> None:
    array: np.ndarray[Any, Any] = np.random.default_rng(1).random((1000, 1000))
    # What the receiver needs to make an array of bytes again; they travel into the result.
    labels = {"dtype": array.dtype.str, "shape": ",".join(map(str, array.shape))}
    async with Producer(CONNECTION) as producer:
        result = await producer.send(MemorySource(array), unique_id="weights", labels=labels)
    print(f"{result.unique_id}: {result.status}")
    if result.target is None or result.labels is None:
        raise SystemExit(str(result.error))
    # Any process on that host, until the segment's lifetime is over; this one, for the example.
    with attach(result.target["shm"], result.size) as data:
        shape = [int(extent) for extent in result.labels["shape"].split(",")]
        found = np.frombuffer(data, result.labels["dtype"]).reshape(shape)
        print(f"the same array: {np.array_equal(found, array)}")


if __name__ == "__main__":
    asyncio.run(main())
