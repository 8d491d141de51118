"""Stops a coroutine at each of its await points in turn."""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def stepped(coroutine: Coroutine[Any, Any, T], reached: Callable[[int], object]) -> T:
    """Run `coroutine`, and tell the number of each suspension, from 1, before it happens."""
    return await _steps(coroutine, reached)


@types.coroutine
def _steps(
    coroutine: Coroutine[Any, Any, T], reached: Callable[[int], object]
) -> Generator[Any, Any, T]:
    step = 0
    resume: Callable[[], Any] = partial(coroutine.send, None)
    while True:
        try:
            waited_for = resume()
        except StopIteration as stop:
            result: T = stop.value
            return result
        step += 1
        reached(step)
        try:
            yield waited_for
        except BaseException as error:
            resume = partial(coroutine.throw, error)
        else:
            resume = partial(coroutine.send, None)
