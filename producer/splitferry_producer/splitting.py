"""How an item is cut: sizes of splits, and the splits themselves, read one ahead.

The horizon (WIRE, "result") counts offsets of a partition, which all its requests share. So an
item is given few splits: large ones where the topic takes them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from splitferry_protocol.records import HEADER_MAX, PAYLOAD_MAX

from .errors import ItemTooLarge, SplitTooLarge
from .sources import DataItemSource

DEFAULT_SIZE = 512 * 1024
"""Bytes of payload."""
TOPIC_DEFAULT = 1_048_588
"""Bytes: Kafka's own default of `max.message.bytes`."""
SPLITS_AIM = 8_000
"""An item grows its splits rather than having more of them than this."""
SPLITS_MAX = 100_000
"""More splits are refused: two fifths of the default horizon, so that one neighbour of the
same size in the partition still lets the request end in time."""
_STEP = 4096
_GROW_EVERY = 1_000
"""Splits of a stream after which they double: 8,000 of them hold 48 GiB where the topic takes
16 MiB, and a short stream stays with small ones."""
OVERHEAD = HEADER_MAX + 1024
"""Bytes of a batch with one record that are not payload: batch and record header (61 and up to
80), key, the header `crc32c`, and the value's own header at its largest."""


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """Sizes of the splits of one topic, in bytes of payload.

    Attributes:
        smallest: what an item begins with.
        largest: what the topic takes.
        chosen: the size is not ours to choose.
    """

    smallest: int
    largest: int
    chosen: bool = False

    @classmethod
    def fitting(cls, configured: int | None, max_message_bytes: int) -> SplitSizes:
        """Sizes for a topic with this `max.message.bytes`. A configured size stays as it is.

        Raises:
            SplitTooLarge: the topic does not take the configured size, or no split at all.
        """
        largest = min(PAYLOAD_MAX, max_message_bytes - OVERHEAD)
        if configured is not None and configured < 1:
            raise SplitTooLarge(f"a split size of {configured} bytes is none: give at least 1")
        if largest < 1 or (configured or 0) > largest:
            raise SplitTooLarge(
                f"a split size of {configured or DEFAULT_SIZE} bytes is more than the splits "
                f"topic takes: give at most {max(largest, 0)}, or raise its max.message.bytes "
                f"(now {max_message_bytes})"
            )
        if configured is not None:
            return cls(configured, configured, chosen=True)
        return cls(min(DEFAULT_SIZE, largest), largest)

    def of_item(self, total: int) -> int:
        """One size for all splits of an item of `total` bytes.

        Raises:
            ItemTooLarge: it would need more than SPLITS_MAX splits.
        """
        wanted = -(-total // SPLITS_AIM)
        size = min(max(self.smallest, -(-wanted // _STEP) * _STEP), self.largest)
        if total > size * SPLITS_MAX:
            raise self._too_large(f"an item of {total} bytes")
        return size

    def of_stream(self, index: int) -> int:
        """The size of a stream's split number `index`: it doubles as the stream goes on.

        Raises:
            ItemTooLarge: the stream has had SPLITS_MAX splits.
        """
        if index >= SPLITS_MAX:
            raise self._too_large("the stream")
        return min(self.smallest << min(index // _GROW_EVERY, 24), self.largest)

    def _too_large(self, item: str) -> ItemTooLarge:
        return ItemTooLarge(
            f"{item} needs more than {SPLITS_MAX} splits of {self.largest} bytes: "
            f"{'give a larger split size, or none; or ' if self.chosen else ''}"
            "raise max.message.bytes of the splits topic (a split has at most 16 MiB), "
            "or send the item in parts"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """One split's part of the item. `total` and `sha256` come with the last one of a stream;
    an item of known size carries its total from the start."""

    index: int
    offset: int
    payload: memoryview | bytes
    total: int | None
    sha256: bytes | None


async def pieces(
    source: DataItemSource, sizes: SplitSizes, admit: Callable[[int], Awaitable[object]]
) -> AsyncGenerator[Piece, None]:
    """Cut an open source; every byte once, in order. An empty item is one empty piece.

    Args:
        admit: waits until that many bytes more may be in memory.

    Raises:
        SourceError, SourceChanged: as `DataItemSource.read`.
        ItemTooLarge: as SplitSizes.
    """
    digest = hashlib.sha256()
    total = source.size
    fixed = None if total is None else sizes.of_item(total)
    index = offset = 0
    last = False
    while not last:
        if total is not None and fixed is not None:
            await admit(min(fixed, total - offset))
            payload, last = await source.read(offset, fixed, digest)
        else:
            # A stream is admitted after it was read: it may wait for its next byte for ever,
            # and would keep others from memory meanwhile. So it holds one split beside them.
            payload, last = await source.read(offset, sizes.of_stream(index), digest)
            await admit(len(payload))
        end = offset + len(payload)
        yield Piece(
            index, offset, payload, end if last else total, digest.digest() if last else None
        )
        index, offset = index + 1, end


async def read_ahead(made: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """The same pieces, made while others are on their way to the broker.

    How far ahead is bounded by what `pieces` is admitted.
    """
    queue: asyncio.Queue[Piece | None] = asyncio.Queue()

    async def fill() -> None:
        async for piece in made:
            queue.put_nowait(piece)

    filling = asyncio.create_task(fill())
    filling.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (piece := await queue.get()) is not None:
            yield piece
        await filling
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
        await made.aclose()
