"""Sends files to a topic: with this project's producer, or the same bytes from memory with a bare
aiokafka one. A side runs it as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from splitferry_producer import ConnectionSettings, FileSource, Producer
from splitferry_protocol.records import PAYLOAD_MAX, Block


async def own(told: argparse.Namespace) -> tuple[float, float]:
    """All files at once, as many requests; the moments around it, everything confirmed."""
    async with Producer(
        ConnectionSettings(told.servers),
        node_id=told.node_id,
        splits_topic=told.topic,
        split_size=told.split_size,
        state_dir=told.files.parent / "state",
    ) as producer:
        first = time.time()
        async with asyncio.TaskGroup() as group:
            for path in told.files.iterdir():
                source = FileSource(path, Block.FILE)
                group.create_task(
                    producer.send(source, unique_id=f"bench/{path.name}", version=1, wait=False)
                )
        return first, time.time()


async def bare(told: argparse.Namespace) -> tuple[float, float]:
    """As many records of a split's size, a file in each partition in turn."""
    sizes = [path.stat().st_size for path in told.files.iterdir()]
    value = os.urandom(told.split_size)
    due: deque[asyncio.Future[Any]] = deque()
    async with AIOKafkaProducer(
        bootstrap_servers=told.servers,
        enable_idempotence=True,
        acks="all",
        linger_ms=told.linger,
        max_batch_size=told.batch_size,
        max_request_size=2 * PAYLOAD_MAX,
    ) as producer:
        first = time.time()
        for offset in range(0, max(sizes), told.split_size):
            for number, size in enumerate(sizes):
                payload = value[: size - offset] if offset < size else None
                if payload is None:
                    continue
                partition = number % told.partitions
                due.append(await producer.send(told.topic, payload, partition=partition))
                if len(due) > told.in_flight:
                    await due.popleft()
        await asyncio.gather(*due)
        return first, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["own", "bare"])
    parser.add_argument("servers")
    parser.add_argument("topic")
    parser.add_argument("files", type=Path, help="folder with them")
    parser.add_argument("--split-size", type=int, required=True)
    parser.add_argument("--node-id", type=int, default=1)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2**20, help="of the bare one, bytes")
    parser.add_argument("--in-flight", type=int, default=16, help="records of the bare one")
    parser.add_argument("--linger", type=int, default=0, help="of the bare one, ms")
    told = parser.parse_args()
    first, last = asyncio.run({"own": own, "bare": bare}[told.side](told))
    print(json.dumps({"first": first, "last": last}), flush=True)
    sys.stdin.read()  # stay until the last look at this process


if __name__ == "__main__":
    main()
