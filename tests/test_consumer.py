"""The consumer in a program of one's own: entering, results, leaving, and how it ends early."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from bench import captured_logs
from memory_transport import Kafka, MemoryTransport
from owners import results, until
from splitferry_consumer import Consumer, ReceivedItem, Settings, StartError
from splitferry_consumer import membership as membership_module
from splitferry_consumer import service as service_module
from splitferry_consumer.transport import TransportError
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.records import Block, Result
from world import split


@pytest.fixture
def kafka() -> Kafka:
    return Kafka(partitions=2)


@pytest.fixture
def member(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> MemoryTransport:
    """What the consumer of a test is in the group. The topics count as checked."""

    async def checked(*arguments: object) -> None:
        pass

    made = MemoryTransport(kafka)
    monkeypatch.setattr(service_module, "check_topics", checked)
    monkeypatch.setattr(service_module, "AiokafkaTransport", lambda *options: made)
    monkeypatch.setattr(membership_module, "POLL_WAIT", 0.005)
    return made


@pytest.fixture
def settings(tmp_path: Path, member: MemoryTransport) -> Settings:
    return Settings(
        ConnectionSettings("127.0.0.1:1"),
        tmp_path / "root",
        group="group",
        splits_topic="splits",
        results_topic="results",
        dead_letters_topic="dead-letters",
    )


def send(kafka: Kafka, request: int, partition: int = 0) -> None:
    kafka.send(split(request, 0, b"data", total=4, block=Block.FILE), partition)


async def read(consumer: Consumer, count: int) -> list[int]:
    """The sequences of the next `count` results."""
    found: list[int] = []
    async with asyncio.timeout(20):
        async for result in consumer.results():
            found.append(result.request.sequence)
            if len(found) == count:
                break
    return found


def fail(member: MemoryTransport, kafka: Kafka) -> None:
    """What nobody foresaw: such an error of the poll ends the service."""
    kafka.faults["poll"].append(ZeroDivisionError("unforeseen"))


# ---- entering


async def test_it_is_entered_when_partitions_are_assigned(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    kafka.gates["start"].clear()
    consumer = Consumer(settings)
    entering = asyncio.create_task(consumer.__aenter__())
    await until(lambda: "start" in kafka.calls)
    assert not entering.done()
    assert "starting" in repr(consumer)
    kafka.gates["start"].set()
    assert await entering is consumer
    assert set(member.positions) == {0, 1}
    await consumer.__aexit__(None, None, None)
    assert member.stopped


async def test_it_is_entered_where_others_have_all_partitions(
    kafka: Kafka, settings: Settings
) -> None:
    kafka.partitions = range(0)
    async with asyncio.timeout(20), Consumer(settings):
        pass


async def test_what_does_not_allow_a_start_is_raised_on_entering(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    kafka.faults["start"].append(TransportError("not authorized"))
    with pytest.raises(StartError, match="not authorized"):
        async with Consumer(settings):
            pytest.fail("entered")
    assert member.stopped


async def test_one_that_was_stopped_before_is_not_entered(settings: Settings) -> None:
    consumer = Consumer(settings)
    consumer.stop()
    with pytest.raises(StartError, match="stopped before"):
        await consumer.__aenter__()


async def test_entering_may_be_cancelled(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    kafka.gates["start"].clear()
    entering = asyncio.create_task(Consumer(settings).__aenter__())
    await until(lambda: "start" in kafka.calls)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert member.stopped


async def test_it_is_entered_once(settings: Settings) -> None:
    consumer = Consumer(settings)
    async with consumer:
        with pytest.raises(RuntimeError, match="make a new one"):
            await consumer.__aenter__()


# ---- results


async def test_results_come_as_they_are_committed(kafka: Kafka, settings: Settings) -> None:
    send(kafka, 1)
    async with Consumer(settings) as consumer:
        assert await read(consumer, 1) == [1]
        for request in range(2, 6):
            send(kafka, request, partition=request % 2)
        assert sorted(await read(consumer, 4)) == [2, 3, 4, 5]
    told: list[Result] = [*results(kafka, 0), *results(kafka, 1)]
    assert sorted(result.request.sequence for result in told) == [1, 2, 3, 4, 5]


async def test_a_result_is_not_given_before_it_is_committed(
    kafka: Kafka, settings: Settings
) -> None:
    kafka.gates["commit"].clear()
    send(kafka, 1)
    async with Consumer(settings) as consumer:
        reading = asyncio.create_task(read(consumer, 1))
        await until(lambda: "commit" in kafka.calls)
        await asyncio.sleep(0.01)
        assert not reading.done()
        kafka.gates["commit"].set()
        assert await reading == [1]


async def test_results_end_when_it_is_stopped_and_none_is_left(
    kafka: Kafka, settings: Settings
) -> None:
    kafka.gates["commit"].clear()
    send(kafka, 1)
    async with asyncio.timeout(20), Consumer(settings) as consumer:
        await until(lambda: "commit" in kafka.calls)
        consumer.stop()
        kafka.gates["commit"].set()
        assert [result.request.sequence async for result in consumer.results()] == [1]
        await consumer.wait()


async def test_what_comes_while_the_block_is_left_can_be_read_behind_it(
    kafka: Kafka, settings: Settings
) -> None:
    kafka.gates["commit"].clear()
    send(kafka, 1)
    async with Consumer(settings) as consumer:
        await until(lambda: "commit" in kafka.calls)
        asyncio.get_running_loop().call_later(0.05, kafka.gates["commit"].set)
    assert [result.request.sequence async for result in consumer.results()] == [1]


async def test_a_reader_that_is_cancelled_takes_nothing_along(
    kafka: Kafka, settings: Settings
) -> None:
    async with Consumer(settings) as consumer:
        reading = asyncio.create_task(read(consumer, 1))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait([reading])
        send(kafka, 1)
        assert await read(consumer, 1) == [1]


@pytest.mark.parametrize("reading", [False, True])
async def test_results_that_nobody_reads_hold_up_nothing(
    kafka: Kafka, settings: Settings, reading: bool
) -> None:
    with captured_logs() as logs:
        async with Consumer(settings, results_kept=2) as consumer:
            if reading:
                send(kafka, 1)
                assert await read(consumer, 1) == [1]
            for request in range(2, 8):
                send(kafka, request)
            await until(lambda: len(results(kafka)) == 6 + reading)
        assert [result async for result in consumer.results()] == results(kafka)[-2:]
    lost = [entry["count"] for entry in logs if "not read in time" in entry["event"]]
    assert sum(lost) == (4 if reading else 0)


# ---- leaving


async def test_leaving_finishes_what_is_in_flight(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    handling, finish = asyncio.Event(), asyncio.Event()

    async def handler(item: ReceivedItem) -> None:
        handling.set()
        await finish.wait()

    kafka.send(split(1, 0, b"data", total=4))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with Consumer(settings, handler):
            await handling.wait()
            asyncio.get_running_loop().call_later(0.05, finish.set)
            raise ZeroDivisionError
    assert [result.request.sequence for result in results(kafka)] == [1]
    assert member.stopped


async def test_a_cancelled_block_is_left_in_the_same_way(kafka: Kafka, settings: Settings) -> None:
    kafka.gates["commit"].clear()
    send(kafka, 1)

    async def block() -> None:
        async with Consumer(settings):
            await asyncio.Event().wait()

    running = asyncio.create_task(block())
    await until(lambda: "commit" in kafka.calls)
    running.cancel()
    await asyncio.sleep(0.05)
    kafka.gates["commit"].set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [result.request.sequence for result in results(kafka)] == [1]


async def test_a_cancellation_while_it_is_left_leaves_at_once(
    kafka: Kafka, member: MemoryTransport, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "BACKGROUND_BOUND", 0.05)
    kafka.send(split(1, 0, b"data", total=4))
    handling, finish = asyncio.Event(), asyncio.Event()

    async def handler(item: ReceivedItem) -> None:
        handling.set()
        await finish.wait()

    async def block() -> None:
        async with Consumer(settings, handler):
            await handling.wait()

    running = asyncio.create_task(block())
    await handling.wait()
    await asyncio.sleep(0.05)
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert member.stopped
    finish.set()
    assert results(kafka) == []


# ---- a failure


async def test_a_failure_cancels_the_block_and_is_raised_behind_it(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with Consumer(settings):
            fail(member, kafka)
            await asyncio.Event().wait()
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # nothing of the cancellation is left
    assert member.stopped


@pytest.mark.parametrize("how", ["wait", "results"])
async def test_who_waits_elsewhere_is_told_as_well(
    kafka: Kafka, member: MemoryTransport, settings: Settings, how: str
) -> None:
    async def elsewhere(consumer: Consumer) -> None:
        if how == "wait":
            await consumer.wait()
        await read(consumer, 1)

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with Consumer(settings) as consumer:
            waiting = asyncio.create_task(elsewhere(consumer))
            await asyncio.sleep(0)
            fail(member, kafka)
            await asyncio.Event().wait()
    async with asyncio.timeout(20):
        await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), ZeroDivisionError)


async def test_a_block_that_ends_as_the_failure_comes(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    """The cancellation was asked for, and the block has ended before it met an await."""
    consumer = Consumer(settings)
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with consumer:
            assert consumer._running is not None
            consumer._running.add_done_callback(lambda _: failed.set())
            failed = asyncio.Event()
            fail(member, kafka)
            with suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.create_task(failed.wait()))
    assert task.cancelling() == 0


async def test_a_failure_does_not_swallow_the_cancellation_of_others(
    kafka: Kafka, member: MemoryTransport, settings: Settings
) -> None:
    async def block() -> None:
        async with Consumer(settings):
            fail(member, kafka)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                outer.cancel()
                raise

    outer = asyncio.create_task(block())
    await asyncio.wait([outer])
    assert outer.cancelled()
