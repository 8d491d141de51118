"""Finding and replacing files below a root without ever following a symbolic link.

Every step opens one directory from the descriptor of the one above it, so a link swapped in
while we look leads nowhere (RELIABILITY, rule 9).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from splitferry_protocol.paths import PRIVATE_DIRECTORY, path_problem

from .modes import directory_mode

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

PERMANENT = {
    errno.EISDIR: "a directory stands there",
    errno.EEXIST: "a directory stands there",
    errno.ENOTEMPTY: "a directory stands there",
    errno.ENOTDIR: "the path leads through a file or a symbolic link",
    errno.ELOOP: "the path leads through a symbolic link",
    errno.ENAMETOOLONG: "the file system does not take names of this length",
    errno.EILSEQ: "the file system does not take this name",
    errno.EXDEV: "another file system is mounted below the root there",
    errno.EFBIG: "the file system does not take files of this size",
}
"""What no waiting heals, as a cause for people."""


class Obstructed(Exception):
    """The item's path cannot be used, and waiting does not help. The message is the cause."""


@contextmanager
def _permanent() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in PERMANENT:
            raise Obstructed(PERMANENT[error.errno]) from error
        raise


def open_directory(name: str, parent: int, create_mode: int | None = None) -> int:
    """Open the directory `name` in `parent`, made first if `create_mode` is given, and then with
    exactly that mode.

    Raises:
        OSError: among others ENOTDIR for a file or a symbolic link.
    """
    made: int | None = None
    if create_mode is not None:
        with suppress(FileExistsError):
            os.mkdir(name, create_mode, dir_fd=parent)
            made = create_mode
    directory = os.open(name, DIRECTORY, dir_fd=parent)
    if made is not None:
        try:
            # The umask may have taken some away. With the set-group-ID bit of its parent would go
            # the group of its files.
            os.fchmod(directory, made | os.fstat(directory).st_mode & stat.S_ISGID)
        except BaseException:
            os.close(directory)
            raise
    return directory


def folds_names(directory: int) -> bool:
    """Whether the file system takes names that are spelled alike for the same: tries it out in
    `directory`. Raises OSError."""
    name = "probe A\u00e9"
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory))
    try:
        found = os.stat(name, dir_fd=directory)
        for other in ("probe a\u00e9", "probe Ae\u0301"):
            with suppress(FileNotFoundError):
                if os.path.samestat(found, os.stat(other, dir_fd=directory)):
                    return True
        return False
    finally:
        os.unlink(name, dir_fd=directory)


def leads_to(path: str, directory: int, parent: int | None = None) -> bool:
    """Whether `path`, from `parent`, leads to the open `directory`. Raises OSError."""
    try:
        found = os.stat(path, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(found, os.fstat(directory))


class Tree:
    """The files below a root. `root` is the descriptor of a directory, and stays the caller's.

    `mode` is that of published files; directories on their way get the matching search bits.
    """

    def __init__(self, root: int, mode: int) -> None:
        self._root = root
        self._directory_mode = directory_mode(mode)

    def stands_at(self, path: str) -> bool:
        """Whether `path` leads to the root."""
        return leads_to(path, self._root)

    def used(self) -> bool:
        """Whether anything lies below the root, besides what is private."""
        with os.scandir(self._root) as entries:
            return any(entry.name != PRIVATE_DIRECTORY for entry in entries)

    @contextmanager
    def _directory(self, segments: Sequence[str], create: bool = False) -> Iterator[int]:
        descriptor = self._root
        try:
            for segment in segments:
                below = open_directory(
                    segment, descriptor, self._directory_mode if create else None
                )
                if descriptor != self._root:
                    os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            if descriptor != self._root:
                os.close(descriptor)

    @staticmethod
    def _segments(unique_id: str) -> list[str]:
        problem = path_problem(unique_id)
        if problem is not None:
            raise Obstructed(problem)
        return unique_id.split("/")

    def check(self, unique_id: str) -> None:
        """Look whether a file can be put at `unique_id`; nothing is made. Blocks.

        Raises:
            Obstructed: it cannot.
            OSError: it could not be found out.
        """
        *above, name = self._segments(unique_id)
        with suppress(FileNotFoundError), _permanent(), self._directory(above) as parent:
            self._check_name(parent, name)

    @staticmethod
    def _check_name(parent: int, name: str) -> None:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISLNK(found):
            raise Obstructed("a symbolic link stands there")
        if stat.S_ISDIR(found):
            raise Obstructed("a directory stands there")

    def place(self, source: str, source_directory: int, unique_id: str) -> None:
        """Rename `source` to `unique_id`, over the file that is there. Blocks; syncs nothing.

        Raises:
            Obstructed: nothing was renamed, and nothing will be.
            FileNotFoundError: `source`, or a directory made for it a moment ago, is not there.
            OSError: may heal.
        """
        *above, name = self._segments(unique_id)
        with _permanent(), self._directory(above, create=True) as parent:
            with suppress(FileNotFoundError):
                self._check_name(parent, name)
            os.rename(source, name, src_dir_fd=source_directory, dst_dir_fd=parent)

    def sync(self, unique_ids: Iterable[str]) -> dict[str, OSError]:
        """Make the names durable: fsync every directory from the root to each file, once.

        All of them, not only those made now: one that a crashed owner made has perhaps never
        been synced. Returns what failed, by unique id. Blocks.
        """
        synced: dict[tuple[str, ...], OSError | None] = {}
        failed: dict[str, OSError] = {}
        for unique_id in unique_ids:
            segments = self._segments(unique_id)
            for depth in range(len(segments)):
                directory = tuple(segments[:depth])
                if directory not in synced:
                    synced[directory] = self._sync_directory(directory)
                error = synced[directory]
                if error is not None:
                    failed[unique_id] = error
                    break
        return failed

    def _sync_directory(self, segments: Sequence[str]) -> OSError | None:
        try:
            with self._directory(segments) as directory:
                os.fsync(directory)
        except OSError as error:
            return error
        return None

    def holds(self, unique_id: str, size: int, sha256: bytes) -> bool:
        """Whether the file at `unique_id` has exactly these bytes. Reads it all; blocks."""
        *above, name = self._segments(unique_id)
        try:
            with self._directory(above) as parent:
                file = os.open(
                    name,
                    os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK,
                    dir_fd=parent,
                )
        except OSError as error:
            if error.errno in {errno.ENOENT, *PERMANENT}:
                return False
            raise
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return False
            with open(file, "rb", closefd=False) as stream:
                return hashlib.file_digest(stream, "sha256").digest() == sha256
        finally:
            os.close(file)
