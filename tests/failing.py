"""Calls that fail as the system's do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def failing(number: int) -> Callable[..., None]:
    """In the place of any call: it raises the OSError of that number."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def nobody_may_list(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on folders of that name cannot be listed, not even by root."""
    scan = os.scandir

    def scandir(path: Path) -> Any:
        return failing(errno.EACCES)() if path.name == folder else scan(path)

    monkeypatch.setattr(os, "scandir", scandir)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As another user, where root would be let in everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
