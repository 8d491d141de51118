"""A bare aiokafka consumer that reads records and looks at nothing: what the client and the
broker can do at most on this machine. A side runs it as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence

from aiokafka import AIOKafkaConsumer, TopicPartition


async def drain(
    servers: str,
    topic: str,
    partitions: Sequence[int],
    records: int,
    check_crcs: bool,
    fetch_bytes: int,
) -> tuple[float, float]:
    """The moments at which the first and the last records were handed out."""
    async with AIOKafkaConsumer(
        bootstrap_servers=servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        check_crcs=check_crcs,
        max_partition_fetch_bytes=fetch_bytes,
    ) as consumer:
        consumer.assign([TopicPartition(topic, number) for number in partitions])
        print(json.dumps({"ready": True}), flush=True)
        first, left = 0.0, records
        while left > 0:
            for some in (await consumer.getmany(timeout_ms=1000)).values():
                first = first or time.time()
                left -= len(some)
        return first, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers")
    parser.add_argument("topic")
    parser.add_argument("partitions", type=int, nargs="+")
    parser.add_argument("--records", type=int, required=True, help="to read in all")
    parser.add_argument("--check-crcs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fetch-bytes", type=int, required=True)
    told = parser.parse_args()
    first, last = asyncio.run(drain(**vars(told)))
    print(json.dumps({"first": first, "last": last}), flush=True)
    sys.stdin.read()  # stay until the last look at this process


if __name__ == "__main__":
    main()
