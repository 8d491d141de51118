"""How much memory the items of this process may take together."""

from __future__ import annotations

import errno
import threading

from splitferry_consumer.targets import Item, Refused
from splitferry_protocol.errors import BatchTransferFailed


class MemoryLimit:
    """`limit` bytes, shared by all targets that it is given to. Any thread may use it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def reserve(self, item: Item, held: int, size: int) -> None:
        """Reserve `size` bytes for `item`, which holds `held` already.

        Raises:
            OSError: not now; others may give theirs back.
            Refused: never, not with all of the limit.
        """
        if held + size > self.limit:
            reason = f"the item needs more than the memory limit of {self.limit} bytes"
            raise Refused(BatchTransferFailed(item.key.request, reason))
        with self._lock:
            if self.used + size > self.limit:
                raise OSError(errno.ENOMEM, f"the memory limit of {self.limit} bytes is reached")
            self.used += size

    def release(self, size: int) -> None:
        with self._lock:
            self.used -= size
