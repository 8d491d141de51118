"""The limit of open files, for what receives: each file on its way in is an open one."""

from __future__ import annotations

import resource
from contextlib import suppress


def take_all() -> None:
    """Take all that this user may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where no limit is a limit that cannot be set (macOS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
