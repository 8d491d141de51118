"""Awaiting a client that may neither end nor keep its cancellations to itself.

aiokafka cancels tasks of its own and awaits them. A cancellation of ours that arrives just then is
swallowed, so a time-out around such a call may never take effect; and its own CancelledError may
come out of the call, which taken for ours would end a task of ours without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog
from aiokafka.errors import KafkaError

log = structlog.get_logger(__name__)

T = TypeVar("T")

STOP_BOUND = 5.0
"""Seconds that closing a client may take; a broker that is gone would make it hang."""
CANCEL_AGAIN = 1.0
"""Seconds after which work that is to end is cancelled once more."""

_abandoned: set[asyncio.Task[None]] = set()


class Leaked(KafkaError):
    """A client's own cancellation came out of it."""

    def __init__(self) -> None:
        super().__init__("the client has cancelled its own work")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`, which runs in a task of its own.

    Raises:
        TimeoutError: after `seconds`, whatever the work does then; it is cancelled until it ends.
        Leaked: it was cancelled, and not by us.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise TimeoutError
        if task.cancelled():
            raise Leaked
        return task.result()
    finally:
        if not task.done():
            _abandon(task)
        # The error's traceback leads here, and the task has the error: a circle, in which all that
        # the work had in its hands would wait for the collector.
        del task


async def bounded(stopping: Coroutine[Any, Any, object]) -> None:
    """Await the end of a client, but not for ever; what goes wrong in it is over with it."""
    try:
        await within(STOP_BOUND, stopping)
    except Exception as error:  # noqa: BLE001
        log.debug("a Kafka client did not stop cleanly", error=repr(error))


def is_ours() -> bool:
    """Whether a CancelledError at hand is meant for the running task."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _abandon(task: asyncio.Task[Any]) -> None:
    ending = asyncio.create_task(_end(task))
    _abandoned.add(ending)
    ending.add_done_callback(_abandoned.discard)


async def _end(task: asyncio.Task[Any]) -> None:
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("a call to Kafka that was given up has failed", error=repr(error))
