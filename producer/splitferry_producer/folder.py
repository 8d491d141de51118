"""The files of a folder, each to become one request."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from splitferry_protocol.paths import PRIVATE_DIRECTORY, path_problem

from .errors import SourceError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A regular file of a folder.

    Attributes:
        path: the folder's path as it was given, with the file's behind it.
        unique_id: the path relative to the folder, with `/`.
    """

    path: Path
    unique_id: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder holds, in byte order of the unique ids.

    Attributes:
        files: what can be sent. Whether it can be read shows when it is sent.
        skipped: path and cause of what is no item: symbolic links (what they point to may lie
            outside, or be sent already), sockets, FIFOs, devices, what lies in `.splitferry/`.
            Each was logged as a warning.
        failed: path and cause of what should be sent and cannot be, logged likewise: folders that
            cannot be listed, files with names that a consumer refuses (not UTF-8, too long).
    """

    files: tuple[FolderFile, ...]
    skipped: tuple[tuple[Path, str], ...]
    failed: tuple[tuple[Path, str], ...] = ()


async def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """List a folder and all folders in it. Empty folders leave no trace.

    Raises:
        SourceError: the folder itself cannot be listed.
    """
    listing = await asyncio.to_thread(_list, Path(folder))
    for path, cause in (*listing.skipped, *listing.failed):
        # A name that is not UTF-8 is shown with replacement characters.
        _log.warning("not sent", path=os.fsencode(path).decode(errors="replace"), cause=cause)
    return listing


def _list(root: Path) -> Listing:
    files: list[FolderFile] = []
    skipped: list[tuple[Path, str]] = []
    failed: list[tuple[Path, str]] = []
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError as error:
            cause = f"cannot be listed: {error.strerror}"
            if folder is root:
                raise SourceError(str(root), cause) from error
            failed.append((folder, cause))
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                skipped.append((path, "is a symbolic link"))
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif not entry.is_file(follow_symlinks=False):
                skipped.append((path, "is no regular file"))
            elif problem := path_problem(unique_id := path.relative_to(root).as_posix()):
                ours = path.relative_to(root).parts[0].casefold() == PRIVATE_DIRECTORY
                (skipped if ours else failed).append((path, f"cannot be named: {problem}"))
            else:
                files.append(FolderFile(path, unique_id))
    files.sort(key=lambda file: file.unique_id.encode())
    return Listing(tuple(files), tuple(sorted(skipped)), tuple(sorted(failed)))
