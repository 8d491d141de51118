"""Who may read what is published: file modes, whatever the umask of the process is."""

from __future__ import annotations

import os
import stat

FILE_MODE = 0o640
"""Unless told otherwise: received files are there for other programs, which need not run as the
consumer does, and of which the group tells; nobody else has to do with them."""
PRIVATE_DIRECTORY, PRIVATE_FILE = 0o700, 0o600
"""Of what is nobody's business but the consumer's."""


def mode_problem(mode: int) -> str | None:
    """Why published files cannot have this mode; None if they can."""
    if not 0 <= mode <= 0o777:
        return "it has more than the bits for owner, group and others"
    if mode & 0o600 != 0o600:
        return "the consumer itself has to read and write its files"
    if mode & 0o111:
        return "received files are never executable"
    if mode & 0o002:
        return "everyone could change what was received"
    return None


def directory_mode(mode: int) -> int:
    """Of directories for files of `mode`: who may read those may look them up."""
    return mode | 0o300 | (mode & 0o044) >> 2


def make_directories(path: str, mode: int) -> None:
    """As `os.makedirs`, where each directory that is made gets `mode`. Raises OSError."""
    above = os.path.dirname(path)
    if not os.path.isdir(above):
        make_directories(above, mode)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    found = os.stat(path).st_mode
    if found & 0o777 != mode:
        os.chmod(path, mode | found & stat.S_ISGID)
    directory = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # What lies in it can be no more durable than its own name.
    finally:
        os.close(directory)


def make_private(path: str) -> None:
    """Take the rights to a file of ours from all others. Raises OSError.

    By its path: whoever closes a descriptor of the catalogue gives up SQLite's locks.
    """
    if os.stat(path).st_mode & 0o777 != PRIVATE_FILE:
        os.chmod(path, PRIVATE_FILE)
