"""Kills a process that publishes a file before every single step, and recovers with another.

Run as a script with a folder: prints one JSON line per death. A process of its own, since it
forks, which is safe only while it has no threads; each fork lives for one attempt.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from splitferry_consumer.targets import Item, Verdict
from splitferry_consumer.targets.file import FileTarget
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Status

OLD, NEW = b"old" * 1000, b"new!" * 5000
UNIQUE_ID = "a/b/item.bin"
STEPS = "open mkdir pwrite posix_fallocate ftruncate fchmod fsync rename unlink rmdir close listdir"


def item(version: int) -> Item:
    key = RequestKey("group", "splits", 3, RequestId(7, 2**64 - version), 100 + version)
    return Item(key, UNIQUE_ID, version)


def completed(data: bytes) -> Verdict:
    return Verdict(Status.COMPLETED, None, len(data), hashlib.sha256(data).digest())


def expired(version: int) -> Verdict:
    error = BatchTransferFailed(item(version).key.request, "expired")
    return Verdict(Status.EXPIRED, error)


async def receive(root: Path, version: int, data: bytes) -> Verdict:
    target = await FileTarget.open(root)
    incoming = target.begin(item(version))
    middle = len(data) // 2
    await target.in_thread(lambda: incoming.write_at(middle, data[middle:]))
    await target.in_thread(lambda: incoming.write_at(0, data[:middle]))
    verdict = await incoming.settle(completed(data))
    await target.in_thread(target.close)
    return verdict


async def expire(root: Path, version: int) -> Verdict:
    target = await FileTarget.open(root)
    verdict = await target.begin(item(version)).settle(expired(version))
    await target.in_thread(target.close)
    return verdict


def die_before(step: int) -> list[str]:
    """Make the process kill itself before its step number `step`; returns the steps so far."""
    taken: list[str] = []

    def tick(name: str) -> None:
        taken.append(name)
        if len(taken) == step:
            os.write(1, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            tick(name)
            return real(*arguments, **options)

        return call

    for name in STEPS.split():
        setattr(os, name, counted(name, getattr(os, name)))
    fcntl.flock = counted("flock", fcntl.flock)

    class Connection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            tick(arguments[0].split()[0])
            return super().execute(*arguments)

    connect = sqlite3.connect
    sqlite3.connect = lambda *arguments, **options: connect(  # type: ignore[assignment]
        *arguments, factory=Connection, **options
    )
    return taken


def forked(work: Callable[[], Any]) -> tuple[int, str]:
    """Run `work` in a fork; its exit status and what it returned or wrote as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        outcome = work()
        os.write(1, str(outcome).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    return status, told


def dying(work: Callable[[], Any], step: int) -> Callable[[], Any]:
    def run() -> Any:
        die_before(step)
        return work()

    return run


def told(verdict: Verdict) -> str:
    digest = verdict.sha256.hex() if verdict.sha256 else None
    return json.dumps([verdict.status, verdict.size, digest, verdict.target])


def receiving(root: Path) -> Callable[[], str]:
    return lambda: told(asyncio.run(receive(root, 2, NEW)))


def expiring(root: Path) -> Callable[[], str]:
    return lambda: told(asyncio.run(expire(root, 2)))


def unswept(recover: Callable[[Path], Callable[[], str]]) -> Callable[[Path], Callable[[], str]]:
    """As if the dead owner still lived: nothing of it is cleared or finished by a sweep."""

    def prepare(root: Path) -> Callable[[], str]:
        def run() -> str:
            FileTarget._sweep = lambda self: None  # type: ignore[method-assign]
            return recover(root)()

        return run

    return prepare


RECOVERIES = {
    "receive": receiving,
    "expire": expiring,
    "receive-unswept": unswept(receiving),
    "expire-unswept": unswept(expiring),
}


def look(root: Path) -> dict[str, Any]:
    """What is to be seen from outside, by whoever does not know of us."""
    final = (root / UNIQUE_ID).read_bytes()
    return {
        "final": {OLD: "old", NEW: "new"}.get(final, "broken"),
        "left": sorted(path.name for path in (root / ".splitferry/incoming").rglob("*")),
        "files": sorted(path.name for path in root.parent.iterdir()),
    }


def attempt(folder: Path, step: int, recovery: str, second: int | None) -> bool:
    """One death (or two, with `second`) and its recovery; False when nobody died."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(folder / "prepared" / "root", root)
    status, name = forked(dying(receiving(root), step))
    died = status == signal.SIGKILL
    after_death = look(root)["final"]
    recover = RECOVERIES[recovery](root)
    if second is not None:
        status, _ = forked(dying(recover, second))
        died = died and status == signal.SIGKILL
    status, first = forked(recover)
    final = look(root)["final"]
    _, again = forked(expiring(root))
    print(
        json.dumps(
            {
                "step": name,
                "died": died,
                "recovery": recovery,
                "after_death": after_death,
                "exit": status,
                "verdict": json.loads(first) if first else None,
                "again": json.loads(again) if again else None,
                **look(root),
                "recovered": final,
            }
        )
    )
    return died


def main(folder: Path, recovery: str, around: str | None) -> None:
    """Deaths before all steps; or, with `around`, two deaths: the first near steps so named."""
    (folder / "prepared").mkdir()
    status, _ = forked(lambda: asyncio.run(receive(folder / "prepared/root", 1, OLD)))
    assert status == 0
    if around is None:
        step = 1
        while attempt(folder, step, recovery, None):
            step += 1
        return
    root = folder / "root"
    shutil.copytree(folder / "prepared" / "root", root)

    def trace() -> str:
        taken = die_before(0)
        asyncio.run(receive(root, 2, NEW))
        return " ".join(taken)

    steps = forked(trace)[1].split()
    at = steps.index(around) + 1
    for first in (at, at + 1):
        second = 1
        while attempt(folder, first, recovery, second):
            second += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
