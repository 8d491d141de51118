"""Which ids of data items can name a file below a root (WIRE, "Paths")."""

from __future__ import annotations

from .records import UNIQUE_ID_MAX

SEGMENT_MAX = 255
"""Bytes of one segment's name: what file systems take."""
PRIVATE_DIRECTORY = ".splitferry"
"""The consumer's own directory in its root."""


def path_problem(unique_id: str) -> str | None:
    """Why `unique_id` cannot be a path below the root, as a sentence; None if it can.

    This is the part of the rule that needs no file system; symbolic links are the target's to
    refuse.
    """
    try:
        size = len(unique_id.encode())
    except UnicodeEncodeError:
        return "the path is not valid UTF-8"
    if not 1 <= size <= UNIQUE_ID_MAX:
        return f"the path has {size} bytes, allowed are 1 to {UNIQUE_ID_MAX}"
    if "\0" in unique_id:
        return "the path holds a NUL"
    if unique_id.startswith("/"):
        return "the path is not relative"
    segments = unique_id.split("/")
    if "" in segments:
        return "the path has an empty segment"
    if "." in segments or ".." in segments:
        return "the path has a segment . or .."
    if any(len(segment.encode()) > SEGMENT_MAX for segment in segments):
        return f"the path has a segment of more than {SEGMENT_MAX} bytes"
    # Some file systems ignore case: there this name would lead into the directory as well.
    if segments[0].casefold() == PRIVATE_DIRECTORY:
        return f"the path lies in {PRIVATE_DIRECTORY}/, which is the consumer's own"
    return None
