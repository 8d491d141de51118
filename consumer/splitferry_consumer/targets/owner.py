"""Directories for temporary files that end with the process that made them.

An owner's directory has a random name and holds a file `lock`, on which the owner keeps a
flock. The kernel drops the flock when the process ends, however it ends, so a directory whose
lock is free belongs to a dead owner and may be cleared. (A child made by fork without exec
shares the lock, and keeps the directory alive.)
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from splitferry_consumer.paths import open_directory

_LOCK = "lock"


class Owner:
    """A directory and the lock in it, both held open. Everything here blocks."""

    def __init__(self, name: str, parent: int, directory: int, lock: int) -> None:
        self.name = name
        self.directory = directory
        self.lock = lock
        self._parent = parent

    @classmethod
    def create(cls, parent: int, prefix: str = "") -> Self:
        """Make a directory of our own in `parent`. Raises OSError."""
        while True:
            name = prefix + secrets.token_hex(8)
            os.mkdir(name, 0o700, dir_fd=parent)
            # A sweeper may come between any two of these steps and take the directory for a
            # dead owner's: then it is gone, or locked by the sweeper, or its lock file has no
            # name any more. Once the lock is ours and has a name, no sweeper can get it.
            with suppress(FileNotFoundError, BlockingIOError):
                owner = cls._locked(name, parent, os.O_CREAT | os.O_EXCL)
                if owner is not None:
                    return owner

    @classmethod
    @contextmanager
    def dead(cls, parent: int, name: str) -> Iterator[Self | None]:
        """Hold the directory of a dead owner; None if its owner lives or it is gone."""
        owner = None
        try:
            owner = cls._locked(name, parent, 0)
        except BlockingIOError:
            pass
        except FileNotFoundError:
            # No lock file: a sweeper or an owner died here. Only an empty directory goes.
            with suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        try:
            yield owner
        finally:
            if owner is not None:
                owner.release()

    @classmethod
    def lives(cls, parent: int, name: str) -> bool:
        """Whether a process holds the directory."""
        try:
            owner = cls._locked(name, parent, 0)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        if owner is not None:
            owner.release()
        return False

    @classmethod
    def _locked(cls, name: str, parent: int, flags: int) -> Self | None:
        directory = open_directory(name, parent)
        try:
            lock = os.open(
                _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=directory
            )
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_nlink:
                    return cls(name, parent, directory, lock)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        except BaseException:
            os.close(directory)
            raise
        os.close(directory)
        return None

    def files(self) -> list[str]:
        """Names of the temporary files in the directory."""
        return [name for name in os.listdir(self.directory) if name != _LOCK]

    def remove(self) -> None:
        """Remove the directory if nothing is left in it but the lock."""
        if not self.files():
            os.unlink(_LOCK, dir_fd=self.directory)
            with suppress(OSError):  # NFS keeps the open lock's inode under a name of its own.
                os.rmdir(self.name, dir_fd=self._parent)

    def release(self) -> None:
        """Close everything, which gives the lock back."""
        os.close(self.lock)
        os.close(self.directory)
