"""Awaiting what may neither end nor keep its cancellations to itself."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress

import pytest

from splitferry_consumer.bounded import Leaked, within


async def test_the_outcome_is_handed_on() -> None:
    async def give() -> int:
        await asyncio.sleep(0)
        return 7

    async def fail() -> int:
        raise ValueError("so it is")

    assert await within(30, give()) == 7
    with pytest.raises(ValueError, match="so it is"):
        await within(30, fail())


async def test_what_failing_work_had_in_its_hands_is_given_back_at_once() -> None:
    class Large:
        pass

    held: list[weakref.ref[Large]] = []

    async def fail() -> None:
        large = Large()
        held.append(weakref.ref(large))
        await asyncio.sleep(0)
        raise ValueError

    gc.collect()
    gc.disable()
    try:
        with suppress(ValueError):
            await within(30, fail())
        assert held[0]() is None
    finally:
        gc.enable()


async def test_work_that_swallows_cancellations_cannot_hold_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("splitferry_consumer.bounded.CANCEL_AGAIN", 0.01)
    heard = 0
    ended = asyncio.Event()

    async def deaf() -> None:
        nonlocal heard
        while heard < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1
        ended.set()

    with pytest.raises(TimeoutError):
        await within(0.01, deaf())
    async with asyncio.timeout(30):
        await ended.wait()


async def test_a_cancellation_of_the_work_is_no_cancellation_of_ours() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(Leaked):
        await within(30, cancelled())


async def test_our_own_cancellation_ends_the_work_and_is_ours() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    waiting = asyncio.create_task(within(30, work()))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(30):
        await ended.wait()
