"""The bound on bytes in memory that all requests of a producer share."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class ByteBudget:
    """Grants bytes first come, first served: a large split waits behind nobody who came later.

    Nobody holds bytes while waiting for more than the broker's confirmation, so the bytes come
    back and no set of requests can block each other.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<ByteBudget {self.used}/{self.capacity}, {len(self._waiting)} waiting>"

    async def acquire(self, size: int) -> None:
        """Wait for `size` bytes. More than the capacity is granted once nothing else is used."""
        if not self._waiting and self._fits(size):
            self.used += size
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(size)  # granted and cancelled in the same turn of the loop
            else:
                self._grant()  # this one is skipped, and the next in line may be smaller
            raise

    def release(self, size: int) -> None:
        self.used -= size
        self._grant()

    def _fits(self, size: int) -> bool:
        return not self.used or self.used + size <= self.capacity

    def _grant(self) -> None:
        while self._waiting:
            size, granted = self._waiting[0]
            if not granted.cancelled():
                if not self._fits(size):
                    return
                self.used += size
                granted.set_result(None)
            self._waiting.popleft()


class Allowance:
    """What one request holds of the budget and has not handed on yet. On leaving, that returns."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    async def admit(self, size: int) -> None:
        await self._budget.acquire(size)
        self._held += size

    def hand_over(self, size: int) -> None:
        """From now on, whoever got the bytes releases them."""
        self._held -= size

    def __enter__(self) -> Allowance:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._budget.release(self._held)
        self._held = 0
