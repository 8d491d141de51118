"""The consumer as a whole, on a Kafka in memory: feeding, rebalances, ending in phases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import captured_logs
from memory_transport import Kafka, MemoryTransport, broken
from owners import results, temporaries, until
from splitferry_consumer import membership as membership_module
from splitferry_consumer import partition as partition_module
from splitferry_consumer import service as service_module
from splitferry_consumer.service import Phase, Service, Settings, StartError
from splitferry_consumer.targets.handler import ReceivedItem
from splitferry_consumer.transport import Excluded, OutOfRange, TransportError
from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.records import Block, Status
from world import split


class Consumer:
    """A service whose member of the group a test can see."""

    def __init__(self, kafka: Kafka, settings: Settings, **options: Any) -> None:
        self.service = Service(settings, **options)
        self.member = MemoryTransport(kafka, batch=2)
        self.running: asyncio.Task[None]

    def start(self) -> None:
        self.running = asyncio.create_task(self.service.run())

    async def stop(self) -> None:
        self.service.stop()
        await self.running


@pytest.fixture
def kafka() -> Kafka:
    return Kafka(partitions=3)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        ConnectionSettings("127.0.0.1:1"),
        tmp_path / "root",
        group="group",
        splits_topic="splits",
        results_topic="results",
        dead_letters_topic="dead-letters",
    )


@pytest.fixture
async def consumer(
    kafka: Kafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Consumer]:
    """Not started. Its transport is in memory, and the topics count as checked."""
    made = Consumer(kafka, settings)
    let_in(made, monkeypatch)
    yield made
    if hasattr(made, "running"):
        for gate in kafka.gates.values():
            gate.set()
        made.service.stop()
        await asyncio.wait([made.running])
        assert made.service.phase is Phase.STOPPED
        assert made.member.stopped or "start" not in kafka.calls
        assert temporaries(settings.root) == []
        assert [writer for writer in kafka.writers if not writer.closed] == []


def let_in(consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def checked(*arguments: object) -> None:
        pass

    monkeypatch.setattr(service_module, "check_topics", checked)
    monkeypatch.setattr(service_module, "AiokafkaTransport", lambda *options: consumer.member)
    monkeypatch.setattr(membership_module, "POLL_WAIT", 0.005)
    monkeypatch.setattr(partition_module, "TICK", 0.005)
    monkeypatch.setattr(partition_module, "RETAKE_PAUSES", (0.001,) * 5)


def send(kafka: Kafka, request: int, partition: int = 0, payload: bytes = b"data") -> None:
    content = split(request, 0, payload, total=len(payload), block=Block.FILE)
    kafka.send(content, partition)


# ---- receiving


async def test_all_partitions_are_received(
    consumer: Consumer, kafka: Kafka, settings: Settings
) -> None:
    for request in range(12):
        send(kafka, request, request % 3)
    phases = [consumer.service.phase]
    consumer.start()
    await until(lambda: sum(len(results(kafka, n)) for n in range(3)) == 12)
    phases.append(consumer.service.phase)
    await consumer.stop()
    assert [*phases, consumer.service.phase] == [Phase.STARTING, Phase.RUNNING, Phase.STOPPED]
    assert [kafka.offsets[n][0] for n in range(3)] == [4, 4, 4]
    assert len(list(settings.root.glob("item-*"))) == 12


async def test_mem_items_go_to_a_handler_where_one_is_given(
    kafka: Kafka, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[ReceivedItem] = []

    async def handler(item: ReceivedItem) -> None:
        handled.append(item)

    consumer = Consumer(kafka, settings, handler=handler)
    let_in(consumer, monkeypatch)
    kafka.send(split(1, 0, b"in memory", total=9))
    consumer.start()
    await until(lambda: results(kafka))
    await consumer.stop()
    assert [bytes(item.data) for item in handled] == [b"in memory"]


async def test_a_failed_poll_is_followed_by_the_next(consumer: Consumer, kafka: Kafka) -> None:
    for request in range(8):
        send(kafka, request)
    kafka.faults["fetch"] += [None, broken(), OutOfRange([0]), None]
    consumer.start()
    await until(lambda: len(results(kafka)) == 8)


async def test_the_poll_goes_on_while_a_partition_is_held_up(
    consumer: Consumer, kafka: Kafka
) -> None:
    # It is the sign of life to the group.
    kafka.gates["committed"].clear()
    consumer.start()
    await until(lambda: "committed" in kafka.calls)
    polls = kafka.calls.count("poll")
    await until(lambda: kafka.calls.count("poll") > polls + 3)
    assert consumer.member.paused == {0, 1, 2}


async def test_a_rebalance_hands_partitions_over(consumer: Consumer, kafka: Kafka) -> None:
    consumer.start()
    send(kafka, 1)
    await until(lambda: results(kafka))
    await consumer.member.assign([1])
    send(kafka, 2, partition=1)
    send(kafka, 3, partition=0)
    await until(lambda: results(kafka, 1))
    assert [result.request.sequence for result in results(kafka)] == [1], "it is another's now"
    await consumer.member.assign([0, 1])
    await until(lambda: len(results(kafka)) == 2)
    assert [result.status for result in results(kafka)] == [Status.COMPLETED] * 2


async def test_partitions_share_the_bytes_in_flight(
    consumer: Consumer, kafka: Kafka, settings: Settings
) -> None:
    consumer.start()
    await until(lambda: consumer.service.phase is Phase.RUNNING)
    service = consumer.service
    assert service.membership is not None
    gauges = [partition.gauge for partition in service.membership.partitions.values()]
    for gauge in gauges:
        gauge.add(1)
    assert service._flow.high == settings.flow_high // 3
    for gauge in gauges:
        gauge.add(-1)


async def test_what_dead_owners_left_is_cleared_now_and_then(
    consumer: Consumer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "SWEEP_INTERVAL", 0.005)
    consumer.start()
    incoming = settings.root / ".splitferry/incoming"
    await until(lambda: consumer.service.phase is Phase.RUNNING)
    # Elsewhere first: a sweep takes what is still empty for one that nobody made, and removes it.
    made, dead = settings.root / ".splitferry/made", incoming / "dead"
    made.mkdir()
    (made / "0").write_bytes(b"half of an item")
    (made / "lock").touch()
    made.rename(dead)
    await until(lambda: not dead.exists())


# ---- stopping


async def test_a_stop_finishes_what_is_in_flight_and_reads_no_further(
    consumer: Consumer, kafka: Kafka
) -> None:
    kafka.gates["commit"].clear()
    send(kafka, 1)
    consumer.start()
    await until(lambda: "commit" in kafka.calls)
    consumer.service.stop()
    await until(lambda: consumer.service.phase is Phase.DRAINING)
    send(kafka, 2)
    polls = kafka.calls.count("poll")
    await until(lambda: kafka.calls.count("poll") > polls + 3)
    assert not consumer.running.done()
    kafka.gates["commit"].set()
    await consumer.running
    assert [result.request.sequence for result in results(kafka)] == [1]
    assert kafka.offsets[0][0] == 1


@pytest.mark.parametrize("how", ["abandoned", "out of grace"])
async def test_a_stop_does_not_wait_for_ever(
    kafka: Kafka, settings: Settings, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(partition_module, "LOSE_BOUND", 0.01)
    consumer = Consumer(kafka, replace(settings, grace=3600 if how == "abandoned" else 0.01))
    let_in(consumer, monkeypatch)
    kafka.gates["commit"].clear()
    send(kafka, 1)
    consumer.start()
    await until(lambda: "commit" in kafka.calls)
    with captured_logs() as logs:
        consumer.service.stop()
        if how == "abandoned":
            await until(lambda: consumer.service.phase is Phase.DRAINING)
            consumer.service.abandon()
        await consumer.running
    assert "stopped with work in flight; the next owner reads it again" in [
        entry["event"] for entry in logs
    ]
    assert results(kafka) == []
    kafka.gates["commit"].set()


async def test_a_stop_before_the_start_returns_at_once(consumer: Consumer, kafka: Kafka) -> None:
    consumer.service.stop()
    consumer.start()
    await consumer.running
    assert "poll" not in kafka.calls


async def test_a_stop_ends_a_start_that_hangs(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a broker that takes connections, and never answers."""
    asked = asyncio.Event()

    async def hangs(*arguments: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(service_module, "check_topics", hangs)
    consumer.start()
    await asked.wait()
    consumer.service.stop()
    await asyncio.wait_for(consumer.running, 20)


async def test_a_cancelled_run_puts_everything_away(consumer: Consumer, kafka: Kafka) -> None:
    kafka.send(split(1, 0, b"ab", total=4, block=Block.FILE))
    consumer.start()
    await until(lambda: kafka.calls.count("position") > 0)
    consumer.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer.running


# ---- a membership that fails


async def test_a_silent_partition_ends_the_membership_and_another_follows(
    consumer: Consumer, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of the client may die unnoticed: the group believes us alive, and nothing comes."""
    monkeypatch.setattr(membership_module, "STALLED", 0.05)
    monkeypatch.setattr(service_module, "REJOIN_PAUSE", 0.01)
    consumer.start()
    send(kafka, 1)
    await until(lambda: results(kafka))
    consumer.member.silent_for = 1.0
    await until(lambda: consumer.member.stopped)
    consumer.member.silent_for = 0.0
    send(kafka, 2)
    await until(lambda: len(results(kafka)) == 2)


async def test_who_is_no_member_any_more_has_been_assigned_nothing(
    consumer: Consumer, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REJOIN_PAUSE", 0)
    consumer.start()
    await until(consumer.service.assigned.is_set)
    kafka.gates["start"].clear()  # the group's coordinator does not answer
    kafka.faults["poll"].append(Excluded("the group does not want us"))
    await until(lambda: kafka.calls.count("start") == 2)
    assert not consumer.service.assigned.is_set()
    kafka.gates["start"].set()
    await until(consumer.service.assigned.is_set)


async def test_polls_that_only_fail_end_the_membership(
    consumer: Consumer, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership_module, "STALLED", 0.05)
    monkeypatch.setattr(membership_module, "FAILED_POLL_WAIT", 0.01)
    monkeypatch.setattr(service_module, "REJOIN_PAUSE", 0.01)
    kafka.faults["poll"] += [broken()] * 20
    consumer.start()
    await until(lambda: consumer.member.stopped)
    send(kafka, 1)
    await until(lambda: results(kafka))


async def test_a_rebalance_that_crosses_the_stop_leaves_nothing_running(
    consumer: Consumer, kafka: Kafka
) -> None:
    consumer.start()
    await until(lambda: consumer.service.phase is Phase.RUNNING)
    membership = consumer.service.membership
    assert membership is not None
    await consumer.stop()
    await membership._assigned([0, 1])
    assert membership.partitions == {}


# ---- what does not allow a start


@pytest.mark.parametrize("group", ["", "x" * 257])
async def test_a_group_that_no_result_could_name_is_refused(settings: Settings, group: str) -> None:
    with pytest.raises(StartError, match="1 to 256 bytes"):
        await Service(replace(settings, group=group)).run()


async def test_a_group_that_cannot_be_joined_is_told_in_one_line(
    consumer: Consumer, kafka: Kafka
) -> None:
    kafka.faults["start"].append(TransportError("not authorized"))
    consumer.start()
    with pytest.raises(StartError, match="not authorized"):
        await consumer.running


async def test_a_certificate_that_cannot_be_read_is_told_in_one_line(
    settings: Settings, tmp_path: Path
) -> None:
    connection = ConnectionSettings("a:1", "SSL", ssl_cafile=str(tmp_path / "missing.pem"))
    with pytest.raises(StartError, match="No such file or directory: check ssl_cafile"):
        await Service(replace(settings, connection=connection)).run()


async def test_a_root_that_cannot_be_used_is_told_in_one_line(
    consumer: Consumer, settings: Settings
) -> None:
    settings.root.write_bytes(b"a file stands there")
    consumer.start()
    with pytest.raises(StartError, match="choose another root"):
        await consumer.running
    settings.root.unlink()
