"""A bare aiokafka consumer that reads a topic to its end and looks at nothing: what the client
and the broker can do at most on this machine. Run by `receive.py` as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

from aiokafka import AIOKafkaConsumer, TopicPartition


async def drain(
    servers: str, topic: str, partitions: int, check_crcs: bool, fetch_bytes: int
) -> tuple[float, float]:
    """The moments at which the first and the last records were handed out."""
    async with AIOKafkaConsumer(
        bootstrap_servers=servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        check_crcs=check_crcs,
        max_partition_fetch_bytes=fetch_bytes,
    ) as consumer:
        known = [TopicPartition(topic, number) for number in range(partitions)]
        ends = await consumer.end_offsets(known)
        left = {partition: end for partition, end in ends.items() if end}
        consumer.assign(list(left))
        assert left, "the topic is empty"
        first = 0.0
        while left:
            for partition, records in (await consumer.getmany(timeout_ms=1000)).items():
                first = first or time.time()
                if records[-1].offset + 1 >= left[partition]:
                    del left[partition]
        return first, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers")
    parser.add_argument("topic")
    parser.add_argument("partitions", type=int)
    parser.add_argument("--check-crcs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fetch-bytes", type=int, required=True)
    told = parser.parse_args()
    first, last = asyncio.run(drain(**vars(told)))
    print(json.dumps({"first": first, "last": last}), flush=True)
    sys.stdin.read()  # stay until the last look at this process


if __name__ == "__main__":
    main()
