"""What a look at a consumer with many open requests costs, in CPU time of its event loop.

PYTHONPATH=tests .venv/bin/python benchmarks/looking.py [REQUESTS]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.ledger import Ledger, Limits
from splitferry_consumer.observing import Observer
from splitferry_consumer.partition import PartitionState
from splitferry_consumer.service import Service, Settings
from splitferry_consumer.transport import Record
from splitferry_consumer.web.metrics import exposition
from splitferry_consumer.web.status import Snapshots, Sort, View
from splitferry_protocol.connection import ConnectionSettings
from world import split

PARTITIONS = 4
GAPS = 5
"""Of each request."""
TRIES = 15
HORIZON = 10**9


def main(requests: int) -> None:
    service = Service(Settings(ConnectionSettings("127.0.0.1:1"), Path("/tmp")))
    ledgers = [_ledger(number, range(number, requests, PARTITIONS)) for number in range(PARTITIONS)]
    membership: Any = SimpleNamespace(
        partitions={
            number: SimpleNamespace(
                number=number,
                ledger=ledger,
                end=ledger.position,
                state=PartitionState.READING,
                trouble=None,
                gauge=SimpleNamespace(bytes=0),
            )
            for number, ledger in enumerate(ledgers)
        }
    )
    service.membership = membership
    snapshots = Snapshots(service, lambda: {"free": 1, "total": 1, "reserve": 0})
    for view in (
        View(),
        View(limit=200),
        View(sort=Sort.LARGEST),
        View(sort=Sort.STALLED, offset=requests // 2),
        View(find="item-9"),
        View(find="nothing"),
    ):
        _show(str(view), partial(_encoded, snapshots, view))
    _show("metrics", exposition(service, lambda: {"free": 1, "total": 1, "reserve": 0}))
    observer, one, count = Observer(), split(1, 0, bytes(100)), 100_000
    began = time.process_time()
    for _ in range(count):
        observer.read(one)
    print(f"{(time.process_time() - began) / count * 1e6:8.2f} µs  each split")


def _ledger(number: int, requests: range) -> Ledger:
    limits = Limits(open_requests=len(requests))
    ledger = Ledger("g", "t", number, HORIZON, Bookmark(0, 0, 0, HORIZON), 0, limits)
    for request in requests:
        for gap in range(GAPS):
            name = f"folder/item-{request}.bin"
            part = split(request, 1000 * gap, bytes(100), total=10**6, unique_id=name)
            record = Record(ledger.position, part.request.key, b"", (), 1 + ledger.position)
            ledger.read(record, part, time.monotonic())
    return ledger


def _encoded(snapshots: Snapshots, view: View) -> bytes:
    return json.dumps(snapshots.snapshot(view)).encode()


def _show(name: str, look: Callable[[], bytes]) -> None:
    taken: list[float] = []
    size = 0
    for _ in range(TRIES):
        began = time.process_time()
        size = len(look())
        taken.append(time.process_time() - began)
    print(f"{sorted(taken)[TRIES // 2] * 1e3:8.2f} ms  {size / 1024:6.0f} KiB  {name}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
