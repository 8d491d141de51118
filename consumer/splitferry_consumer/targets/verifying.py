"""Where items are received and checked, and then let go: for a replay that writes nothing."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from contextlib import suppress

from . import Condemned, Item, Verdict
from .inode import Inode


class VerifyingIncoming:
    """See `Incoming`. The bytes on their way lie in a nameless file of the system's directory for
    temporary files (TMPDIR), which ends with the request, or with the process."""

    def __init__(self, item: Item) -> None:
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

    def put(self, data: memoryview | bytes, proposal: Verdict) -> None:
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
