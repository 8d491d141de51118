"""Calls that fail as the system's do."""

from __future__ import annotations

import os
from collections.abc import Callable


def failing(number: int) -> Callable[..., None]:
    """In the place of any call: it raises the OSError of that number."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
