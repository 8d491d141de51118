# ruff: noqa: E501  the ids of a kind stand together
"""Ids of items that try to leave the root, and a watch over all that lies around it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inotify_simple import INotify, flags

from splitferry_protocol.paths import PRIVATE_DIRECTORY

UNSAFE = [
    # up and out
    *(
        "..",
        "../x",
        "../../x",
        "../outside/secret",
        "../../../../../../etc/passwd",
        "a/..",
        "a/../b",
    ),
    *("a/../../outside/secret", "a/b/../../../outside/x", "./../x", "a/./../x", "../root/x"),
    *("..//x", "a//../../x", "../.splitferry/catalog.db", "x/../.splitferry/catalog.db"),
    # absolute
    *("/", "//", "/x", "//x", "///etc/passwd", "/proc/self/root/x", "/dev/shm/x", "/../x"),
    # empty and dotted segments
    *("", ".", "./", "./x", "a/.", "a/./b", "a//b", "a/", "/a/", "a///b", "././.", "a/b//"),
    # NUL
    *("\0", "a\0", "\0a", "a\0/../b", "a/\0", "x\0.txt", "../\0x"),
    # too long
    *("s" * 256, "a/" + "s" * 256, "é" * 128, "a" * 513, "a/" * 256 + "a", "😀" * 64),
    # the consumer's own directory
    *(".splitferry", ".splitferry/", ".splitferry/x", ".splitferry/catalog.db"),
    *(".splitferry/catalog.db-journal", ".splitferry/incoming/x", ".splitferry/incoming/o/lock"),
    *(".SPLITFERRY/x", ".Splitferry/catalog.db", ".splitFERRY", "./.splitferry/x", "//.splitferry"),
]
SAFE = [
    # encoded: nobody decodes it
    *("%2e%2e/x", "%2e%2e%2fx", "..%2fx", "%252e%252e", "%00", "a%00b", "%c0%ae%c0%ae/x", "&#46;&#46;"),
    # more dots, and dots besides other letters
    *("...", "....", "..x", "x..", ".. /x", " ../x", "..\t/x", ". ./x", "a/.../b", "~", "~root/x"),
    # other separators
    *("..\\x", "..\\..\\x", "a\\..\\b", "\\", "\\\\host\\share", "C:", "C:\\x", "D:/x", "file:x"),
    *("\uff0e\uff0e/x", "\u2025/x", "\u2024\u2024/x", "..\u2215x", "..\u2044x", "..\uff0fx", "\u3002"),
    # ends that some systems cut off
    *("y.", "y..", "x ", "x. .", " x", "x\t", "a /b", "a./b"),
    # names of devices
    *("CON", "nul", "NUL.txt", "COM1", "aux", "LPT1.", "dev/null", "stdin", "-", "--help", "-rf"),
    # names of temporary files and of the catalogue, in another place
    *("0", "1", "lock", "incoming", "incoming/0", "catalog.db", "catalog.db-journal", "x/.splitferry"),
    *("x/.splitferry/catalog.db", ".splitferry.", ".splitferry ", "\u202e.splitferry", ".splitferry2"),
    *(".splitf\u0435rry/x", ".splitferry\u200b/x", "\ufeff.splitferry/x", ".splitferry\\x"),
    # right to left, invisible, control and escape
    *("\u202etxt.exe", "\u200bx", "\u2066a\u2069", "a\nb", "\n", "\r\nx", "\x1b[2Jx", "\x1b]0;x\x07"),
    *("\x7f", "\x01\x02", "a\x08b", "'; DROP TABLE items; --", "$(id)", "`id`", "*", "?", "|x", "{a,b}"),
    # alike but not the same, where case and composition tell names apart
    *("Case", "case", "CASE", "\u00e9", "e\u0301", "\u00c9", "\ufb01le", "file", "\u017f", "s\u0131", "\u212a"),
    # as long as can be
    *("s" * 255, "a/" * 255 + "ab", "é" * 127, "😀" * 63),
]  # fmt: skip


def around(root: Path) -> Path:
    """The sandbox that holds the root, made with something worth stealing. Returns `outside`."""
    sandbox = root.parent
    outside = sandbox / "outside"
    (outside / "deep" / "er").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (outside / "deep" / "file").write_bytes(b"kept")
    (outside / PRIVATE_DIRECTORY).mkdir()
    (outside / PRIVATE_DIRECTORY / "catalog.db").write_bytes(b"not ours")
    (sandbox / "x").mkdir()
    return outside


@contextmanager
def untouched(root: Path) -> Iterator[None]:
    """Nothing around the root is made, changed, touched or removed meanwhile, not for a moment.

    What has gone again is seen by inotify; what inotify has no event for, by the two pictures.
    """
    watched = flags.MODIFY | flags.ATTRIB | flags.CREATE | flags.DELETE | flags.MOVED_FROM
    watched |= flags.MOVED_TO | flags.MOVE_SELF | flags.DELETE_SELF | flags.CLOSE_WRITE
    before = dict(_picture(root))
    with INotify() as inotify:
        for path in before:
            if path.is_dir() and not path.is_symlink():
                inotify.add_watch(path, watched)
        yield
        events = [event for event in inotify.read(timeout=0) if event.name != root.name]
    assert events == []
    assert dict(_picture(root)) == before


def _picture(root: Path) -> Iterator[tuple[Path, tuple[object, ...]]]:
    """All entries around the root, with all that the system says of them and their bytes."""
    for folder, folders, files in os.walk(root.parent):
        if Path(folder) == root.parent:
            folders.remove(root.name)
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            seen = path.lstat()
            content: object = None
            if stat.S_ISREG(seen.st_mode):
                content = hashlib.sha256(path.read_bytes()).digest()
            elif stat.S_ISLNK(seen.st_mode):
                content = path.readlink()
            yield (
                path,
                (seen.st_mode, seen.st_ino, seen.st_nlink, seen.st_uid, seen.st_size,
                 seen.st_mtime_ns, seen.st_ctime_ns, content),
            )  # fmt: skip
