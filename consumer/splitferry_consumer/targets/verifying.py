"""A target that keeps nothing: items are received and checked, and then let go."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress

from . import Condemned, Item, Taken, Verdict, settle_each
from .inode import Inode


class VerifyingTarget:
    """The bytes of each request on its way lie in a nameless file of the system's directory for
    temporary files (TMPDIR), which ends with the request, or with the process."""

    in_memory = False

    def begin(self, item: Item) -> VerifyingIncoming:
        """See `Target.begin`."""
        return VerifyingIncoming()

    async def settle_taken(self, taken: Sequence[Taken]) -> None:
        """See `Target.settle_taken`."""
        await settle_each(taken)

    async def passed(self, group: str, topic: str, partition: int, before: int) -> None:
        """Nothing: this target keeps no verdicts."""

    async def sweep(self) -> None:
        """Nothing: what is in this process ends with it."""

    def close(self) -> None:
        """Nothing is held besides the requests' own bytes."""


class VerifyingIncoming:
    """See `Incoming`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inode: Inode | None = None
        self._dropped = False

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        with self._lock:
            self._begun().write_at(offset, data)

    def read_at(self, offset: int, size: int) -> bytes:
        with self._lock:
            return self._begun().read_at(offset, size)

    async def settle(self, proposal: Verdict) -> Verdict:
        await asyncio.to_thread(self.discard)
        return proposal

    def take(self, data: memoryview | bytes, proposal: Verdict) -> None:
        self.write_at(0, data)

    def discard(self) -> None:
        with self._lock:
            self._dropped = True
            if self._inode is not None:
                with suppress(OSError):
                    self._inode.close()
                self._inode = None

    def _begun(self) -> Inode:
        if self._dropped:
            raise Condemned("the bytes were dropped")
        if self._inode is None:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
            self._inode = Inode(descriptor, lambda size: None, lambda size: None)
        return self._inode
