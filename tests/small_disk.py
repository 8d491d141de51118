"""A file system of its own, that tests fill and free, take away and give back. Needs root."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path

import pytest

_BLOCK = 64 * 1024


@cache
def can_mount() -> bool:
    """Whether this process may mount; found out where nobody sees it."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs root, to mount file systems")


class SmallDisk:
    """Mounted at `path`. What fills it is a file beside what the mount shows."""

    def __init__(self, path: Path, hidden: Path) -> None:
        self.path = path
        self._hidden = hidden
        self._filler = hidden / "filler"

    @property
    def room(self) -> int:
        """Bytes that are free."""
        found = os.statvfs(self._hidden)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take all room but `leave` bytes."""
        with self._filler.open("ab", buffering=0) as filler, suppress(OSError):
            while (room := self.room - leave) > 0:
                filler.write(bytes(min(room, _BLOCK)))

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    async def take_away(self) -> None:
        """Unmount it: `path` is the empty directory below. Open files stay usable."""
        await _run("umount", "--lazy", self.path)

    async def give_back(self) -> None:
        """Mount it again, as it is."""
        await _run("mount", "--bind", self._hidden / "disk", self.path)


@asynccontextmanager
async def small_disk(path: Path, size: int) -> AsyncIterator[SmallDisk]:
    """A tmpfs of `size` bytes at the directory `path`, gone at the end whoever still uses it."""
    hidden = Path(tempfile.mkdtemp(prefix="small-disk-"))
    await _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", hidden)
    try:
        (hidden / "disk").mkdir(mode=0o755)
        disk = SmallDisk(path, hidden)
        await disk.give_back()
        try:
            yield disk
        finally:
            with suppress(subprocess.CalledProcessError):  # It is away.
                await disk.take_away()
    finally:
        await _run("umount", "--lazy", hidden)
        hidden.rmdir()


async def _run(*command: str | Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode or 0, command, stderr=said)
