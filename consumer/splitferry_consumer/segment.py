"""For readers: the shared memory that a result with the target `shm` names.

    with attach(result.target["shm"], result.size) as data: ...

`multiprocessing.shared_memory.SharedMemory(name)` works as well, with two traps: before Python
3.13 its resource tracker unlinks the segment when the reader exits (unregister it, or pass
track=False), and it maps for writing, which needs to run as the consumer's user.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

DIRECTORY = "/dev/shm"  # noqa: S108  where Linux keeps POSIX shared memory
PREFIX = "splitferry-"


@contextmanager
def attach(name: str, size: int | None = None) -> Iterator[memoryview]:
    """Map the segment `name` read-only, without copying, and give its first `size` bytes.

    `size` comes from the result; it matters for an item of 0 bytes, whose segment has one byte,
    since nothing can map an empty one. The memory stays mapped while any view of it is alive.

    Raises:
        ValueError: not the name of such a segment, or it is smaller than `size`.
        FileNotFoundError: its lifetime is over, or it was on another host.
    """
    file = os.open(_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mapping = mmap.mmap(file, 0, prot=mmap.PROT_READ)
    finally:
        os.close(file)
    if size is not None and size > len(mapping):
        raise ValueError(f"segment {name} has {len(mapping)} bytes, not {size}")
    view = memoryview(mapping)[:size]
    try:
        yield view
    finally:
        with suppress(BufferError):  # An array made from the view holds it: it ends with that.
            view.release()
            mapping.close()


def free(name: str) -> None:
    """Unlink the segment before its lifetime ends; who has it mapped keeps it. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(_path(name))


def _path(name: str) -> str:
    if not name.startswith(PREFIX) or "/" in name:
        raise ValueError(f"{name!r} is not the name of a segment: expected {PREFIX}…")
    return f"{DIRECTORY}/{name}"
