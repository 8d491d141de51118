"""The bytes of one item on a descriptor: what files and shared memory have in common."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from contextlib import suppress

from splitferry_consumer.coverage import Coverage

from . import Refused

STEP = 16 * 1024 * 1024
"""Bytes reserved ahead at most."""
WRITE_BACK = 8 * 1024 * 1024
"""Bytes after which the disk is set to work."""
OFFSET_MAX = 2**63 - 1
"""POSIX file offsets are signed."""
_PAGE = 4096
DESCRIPTOR_RESERVE = 160
"""Open files left to the catalogue, the directories, the connections and whatever else runs."""


class Descriptors:
    """How many items of this process may be on their way in, in all targets that it is given to.
    Any thread may use it."""

    def __init__(self) -> None:
        self._taken = 0
        self._lock = threading.Lock()

    def open(self, path: str, directory: int) -> int:
        """Make the file `path`, from `directory`. Raises OSError, also when it has to wait for
        others.

        Without a reserve the catalogue could not open its journal, so nothing would settle, so
        no descriptor would ever be given back.
        """
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - DESCRIPTOR_RESERVE
        with self._lock:
            if self._taken >= max(1, most):
                raise OSError(
                    errno.EMFILE,
                    f"{self._taken} items are on their way in, as many as may be open; "
                    "raise the limit of open files (ulimit -n)",
                )
            self._taken += 1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(path, flags, 0o600, dir_fd=directory)
        except BaseException:
            self.give()
            raise

    def give(self) -> None:
        """Once it is closed."""
        with self._lock:
            self._taken -= 1


class Inode:
    """Owns `descriptor`. Not for two threads at once; every method blocks.

    `admit(size)` is asked before room for `size` more bytes is reserved, and raises if there
    is none; `release(size)` takes back what it had granted.
    """

    def __init__(
        self, descriptor: int, admit: Callable[[int], None], release: Callable[[int], None]
    ) -> None:
        self.descriptor = descriptor
        self._admit = admit
        self._release = release
        self._written = Coverage()
        self._reserved = Coverage()
        self._extent = 0
        """Size that reserving may have given the file."""
        self._granted: list[int] = []

    @property
    def charged(self) -> int:
        """Bytes granted by `admit` and not released."""
        return sum(self._granted)

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of `data`, however short the single writes are.

        Raises:
            OSError: also EFBIG for an offset that no file can have.
            Refused: from `admit`.
        """
        rest, end = memoryview(data), offset + len(data)
        if end > OFFSET_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._reserve(offset, end)
        position = offset
        while rest:
            written = os.pwrite(self.descriptor, rest, position)
            if not written:
                raise OSError(errno.EIO, "a write wrote nothing")
            rest, position = rest[written:], position + written
        self._written.add(offset, end)
        if offset // WRITE_BACK != end // WRITE_BACK:
            start = offset - offset % WRITE_BACK
            self.write_out(start, end - start)

    def write_out(self, offset: int = 0, size: int = 0) -> None:
        """Set the disk to work on `size` bytes (0: all) at `offset`, and wait for nothing.

        Linux then begins to write these pages out, and drops none that is not yet on the disk:
        the sync at the end finds little left. An error is told by that sync.
        """
        with suppress(OSError, AttributeError):  # It is only a hint, and not known everywhere.
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def read_at(self, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = os.pread(self.descriptor, size, offset)
            if not part:
                raise OSError(errno.EIO, f"the file ends before byte {offset}")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def trim(self, size: int) -> bool:
        """Cut off what was reserved behind the item, once nothing more is written.

        Returns False if not exactly `size` bytes were written. Raises OSError.
        """
        if self._written.missing(0, size) or self._written.end > size:
            return False
        if self._extent > size:
            os.ftruncate(self.descriptor, size)
        granted, kept = self.charged, size + -size % _PAGE
        self._granted[:] = [kept]
        self._release(granted - kept)
        return True

    def release(self) -> None:
        """Give back what was granted. Any thread may call it, any number of times."""
        with suppress(IndexError):
            while True:
                self._release(self._granted.pop())

    def close(self) -> None:
        self.release()
        os.close(self.descriptor)

    def _reserve(self, start: int, end: int) -> None:
        """Reserve what is written now, and as much again as is there from the item's start on.

        So a large item needs few steps, and nobody fills the disk with a few bytes here and
        there: what is reserved stays below twice what was written, and a page for each gap. What
        lies reserved behind the item's end refuses none of its bytes, for then all have a place.
        """
        if not self._reserved.missing(start, end):
            return
        ahead = min(start, STEP) if self._written.prefix == start else 0
        if ahead:
            # Where there is no room to go ahead there may still be room for these bytes.
            with suppress(OSError, Refused):
                self._allocate(start, end + ahead)
                return
        self._allocate(start, end)

    def _allocate(self, start: int, end: int) -> None:
        first, last = start - start % _PAGE, min(end + -end % _PAGE, OFFSET_MAX)
        for gap, gap_end in self._reserved.missing(first, last):
            self._admit(gap_end - gap)
            extent = min(gap_end, end)  # So an item that came at once has its size already.
            try:
                self._fallocate(gap, extent - gap)
            except OSError:
                self._release(gap_end - gap)
                raise
            self._granted.append(gap_end - gap)
            self._reserved.add(gap, gap_end)
            self._extent = max(self._extent, extent)

    def _fallocate(self, offset: int, size: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, offset, size)
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                return  # This file system cannot reserve: the writes find room or fail.
            # What a failed call did get stays taken, and keeps the disk full, until it is cut off.
            with suppress(OSError):
                os.ftruncate(self.descriptor, max(self._extent, self._written.end))
            raise
