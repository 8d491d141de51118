"""What a producer sends: memory, a file, or a stream of unknown size.

A source reads a range and tells its block type and its size. Reads and hashing run in worker
threads, in one hop, so that neither the disk nor SHA-256 holds up the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pickle
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable
from typing import TYPE_CHECKING, Any, BinaryIO

from splitferry_protocol.records import Block

from .errors import SourceChanged, SourceError

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

_CHUNK = 256 * 1024
"""Bytes asked of a stream at a time."""


class DataItemSource(ABC):
    """One item to send. A source is read once, from its first byte to its last.

    Attributes:
        block: where the item goes at the consumer.
        name: what errors call it.
        unbounded: its size shows only at its end, and it may wait for its next byte for ever.
    """

    block: Block
    name: str
    unbounded: bool = False

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Bytes of the item, known once it is open; None for a stream."""

    async def open(self) -> None:  # noqa: B027 (memory has nothing to open)
        """Get ready. Raises SourceError if the item cannot be read."""

    @abstractmethod
    async def read(self, offset: int, length: int, digest: Hash) -> tuple[Any, bool]:
        """Read the next bytes and add them to `digest`.

        Args:
            offset: where to read; always the end of the range read before.
            length: bytes to read; fewer come only at the end of the item.

        Returns:
            The bytes, and whether the item ends with them. Before the end is told, the item
            has been looked at once more: its bytes are those of one moment.

        Raises:
            SourceChanged: what was read is not one state of the item.
            SourceError: it cannot be read.
        """

    async def close(self) -> None:  # noqa: B027
        """Release what `open` took; also called when it failed."""


class MemorySource(DataItemSource):
    """Bytes, a memoryview, an array: whatever gives a buffer in C order. It is not copied,
    and must not change until it is sent; a change is found by the digest.

    Args:
        block: where the item goes at the consumer: memory, unless told.
        name: what errors call it.

    Raises:
        TypeError: there is no such buffer.
    """

    def __init__(self, data: Any, block: Block = Block.MEM, name: str = "item in memory") -> None:
        if not memoryview(data).c_contiguous:
            raise TypeError("the array is not contiguous: send a contiguous copy of it")
        # raw() gives the bytes of every element type; memoryview.cast() knows only native ones.
        self._view = pickle.PickleBuffer(data).raw()
        self.block = block
        self.name = name

    @property
    def size(self) -> int:
        return self._view.nbytes

    async def read(self, offset: int, length: int, digest: Hash) -> tuple[memoryview, bool]:
        part = self._view[offset : offset + length]
        await asyncio.to_thread(digest.update, part)
        return part, offset + len(part) == self.size


class FileSource(DataItemSource):
    """A regular file. Symbolic links are followed.

    The file must not change from `open` to the end: its size, modification time and inode are
    compared, and a short read is a change too.

    Args:
        block: where the item goes at the consumer: a file, unless told.
    """

    def __init__(self, path: str | os.PathLike[str], block: Block = Block.FILE) -> None:
        self.path = os.fspath(path)
        self.block = block
        self.name = self.path
        self._descriptor: int | None = None
        self._state: os.stat_result | None = None
        # A cancelled call leaves its thread running. The lock keeps `close` from closing a
        # descriptor that the thread reads from; the flag keeps a late open from leaking one.
        self._lock = threading.Lock()
        self._closed = False

    @property
    def size(self) -> int | None:
        return self._state.st_size if self._state else None

    async def open(self) -> None:
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        with self._lock:
            if self._closed or self._descriptor is not None:
                raise _sent_before(self.name)
            try:
                # Not blocking: opening a FIFO without a writer would wait for one.
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                state = os.fstat(self._descriptor)
            except (OSError, ValueError) as error:
                raise SourceError(self.name, f"cannot be read: {_reason(error)}") from error
            if not stat.S_ISREG(state.st_mode):
                raise SourceError(self.name, "is not a regular file: send it as a stream")
            self._state = state

    async def read(self, offset: int, length: int, digest: Hash) -> tuple[bytes, bool]:
        return await asyncio.to_thread(self._read, offset, length, digest)

    def _read(self, offset: int, length: int, digest: Hash) -> tuple[bytes, bool]:
        with self._lock:
            return self._read_locked(offset, length, digest)

    def _read_locked(self, offset: int, length: int, digest: Hash) -> tuple[bytes, bool]:
        if self._descriptor is None or self._state is None:
            raise SourceError(self.name, "is not open")
        length = min(length, self._state.st_size - offset)
        try:
            data = os.pread(self._descriptor, length, offset)
            while len(data) < length:
                more = os.pread(self._descriptor, length - len(data), offset + len(data))
                if not more:
                    raise SourceChanged(self.name, f"it ends at byte {offset + len(data)} now")
                data += more
            last = offset + length == self._state.st_size
            grown = last and os.pread(self._descriptor, 1, offset + length)
        except OSError as error:
            raise SourceError(self.name, f"cannot be read: {_reason(error)}") from error
        digest.update(data)
        if last:
            self._compare(self._state)
        if grown:  # as in /proc, where files say that they are empty
            raise SourceError(self.name, "has more bytes than its size says: send it as a stream")
        return data, last

    def _compare(self, before: os.stat_result) -> None:
        assert self._descriptor is not None
        try:
            states = os.fstat(self._descriptor), os.stat(self.path)
        except OSError as error:
            raise SourceChanged(self.name, _reason(error)) from error
        for what in ("st_size", "st_mtime_ns", "st_ino", "st_dev"):
            if any(getattr(state, what) != getattr(before, what) for state in states):
                raise SourceChanged(self.name, _CHANGES[what])

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


_CHANGES = {
    "st_size": "its size",
    "st_mtime_ns": "its modification time",
    "st_ino": "another file took its place",
    "st_dev": "another file took its place",
}


class StreamSource(DataItemSource):
    """An item whose size shows only at its end.

    Args:
        stream: an async iterator of bytes, an `asyncio.StreamReader`, or a binary file to
            read, such as `sys.stdin.buffer`. It is not closed.
        block: where the item goes at the consumer: a file, unless told.
        name: what errors call it.
    """

    unbounded = True

    def __init__(
        self,
        stream: AsyncIterable[bytes] | asyncio.StreamReader | BinaryIO,
        block: Block = Block.FILE,
        name: str = "stream",
    ) -> None:
        self._chunks = _chunks(stream)
        self._held: list[Any] = []
        self._held_size = 0
        self._ended = False
        self._opened = self._closed = False
        self.block = block
        self.name = name

    @property
    def size(self) -> None:
        return None

    async def open(self) -> None:
        # Its end would be found at once, and an empty item go over the one that was published;
        # and two at once would share its bytes.
        if self._opened or self._closed:
            raise _sent_before(self.name)
        self._opened = True

    async def read(self, offset: int, length: int, digest: Hash) -> tuple[bytes, bool]:
        # Whether these bytes are the last is known only when one more has come, or the end:
        # so at least one byte is held back, and the last split is never an empty one.
        while self._held_size <= length and not self._ended:
            try:
                chunk = memoryview(await anext(self._chunks)).cast("B")
            except StopAsyncIteration:
                self._ended = True
            except OSError as error:
                raise SourceError(self.name, f"cannot be read: {_reason(error)}") from error
            except TypeError as error:
                raise SourceError(self.name, f"gave something else than bytes: {error}") from error
            else:
                self._held.append(chunk)
                self._held_size += len(chunk)
        if self._closed:  # by a second `send`, which was refused
            raise SourceError(self.name, "was closed while it was read")
        data = await asyncio.to_thread(self._take, length, digest)
        return data, self._ended and not self._held_size

    def _take(self, length: int, digest: Hash) -> bytes:
        taken, rest = [], length
        while self._held and rest:
            chunk = self._held[0]
            taken.append(chunk[:rest])
            if len(chunk) > rest:
                self._held[0] = chunk[rest:]
            else:
                del self._held[0]
            rest -= len(taken[-1])
        data = b"".join(taken)
        self._held_size -= len(data)
        digest.update(data)
        return data

    async def close(self) -> None:
        self._closed = True
        with contextlib.suppress(RuntimeError):  # a generator that a cancelled read left running
            await self._chunks.aclose()
        self._held.clear()


async def _chunks(stream: Any) -> AsyncGenerator[Any, None]:
    if isinstance(stream, asyncio.StreamReader):
        while chunk := await stream.read(_CHUNK):
            yield chunk
    elif hasattr(stream, "__aiter__"):
        async for chunk in stream:
            yield chunk
    elif isinstance(stream, io.TextIOBase) or not hasattr(stream, "read"):
        raise TypeError(f"{type(stream).__name__} is no binary stream")
    else:
        read = getattr(stream, "read1", stream.read)
        while True:
            if isinstance(getattr(stream, "raw", stream), io.FileIO):
                await _readable(stream.fileno())
            chunk = await asyncio.to_thread(read, _CHUNK)
            if chunk:
                yield chunk
            elif chunk is not None:  # None: a non-blocking descriptor had nothing after all
                return


async def _readable(descriptor: int) -> None:
    """Wait until a pipe or terminal can be read without blocking.

    A thread that blocks in a read cannot be cancelled: after Ctrl-C the process would stay
    until its standard input ends. What cannot be polled is a disk file and does not block.
    """
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _sent_before(name: str) -> SourceError:
    return SourceError(name, "is sent, or was sent before: a source is read once, make a new one")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
