"""Topics that take no records, are deleted, made anew, cut short, or grow, under a consumer.

Each act's docstring says what its user sees. What every act asks for: nothing is lost and nothing
told twice, and within 30 s of the healing all that was sent has its result.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from checker import read_committed, read_topic
from scene import RESUMED, Scene, scene, side_by_side
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Status
from stage import until
from workload import Message, send

pytestmark = pytest.mark.timeout(240)
AGAIN = "partition is taken again"
UNUSABLE = "partition is taken again: a topic is unusable"


# ---- topics that take no records


async def test_a_topic_that_takes_no_records(bootstrap_servers: str, tmp_path: Path) -> None:
    await side_by_side(
        bootstrap_servers,
        tmp_path,
        results_too_large,
        results_deleted,
        dead_letters_deleted,
    )


async def results_too_large(servers: str, directory: Path) -> None:
    """The results topic's max.message.bytes is smaller than a result.

    The log has an error that names the topic and the setting. Results wait for it.
    """
    async with scene(servers, directory) as play:
        consumer = await play.consumer()
        await play.configure(play.names.results, max_message_bytes="200")
        waiting = []
        async with asyncio.timeout(RESUMED):
            while not consumer.heard(UNUSABLE):  # the broker takes its time with the setting
                waiting.append(await play.item())
                await asyncio.sleep(0.5)
        line = await play.said(consumer, UNUSABLE, "max.message.bytes")
        assert (line["level"], play.names.results in line["error"]) == ("error", True)
        await play.configure(play.names.results, max_message_bytes="1048576")
        await play.told(*waiting)
        await play.sound()


async def results_deleted(servers: str, directory: Path) -> None:
    """The results topic is deleted and, later, made anew.

    The log has errors: that it does not exist; then, that it is another one now, so that it is
    not known any more which requests had a result: the partition is refused until the loss is
    accepted. What had no result yet gets it then; what had one gets no second one.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        old = await play.item()
        await play.told(old)
        await play.delete(play.names.results)
        waiting = await play.item()
        await play.said(consumer, UNUSABLE, "does not exist")
        await play.create(play.names.results, 1)
        line = await play.said(consumer, "partition refused", "--accept-loss")
        assert "results topic was deleted and made anew" in line["reason"]
        await consumer.stop()
        await play.consumer(ACCEPT_LOSS="true")
        late = await play.item()
        await play.told(waiting, late)
        await play.run.settle()
        await play.run.stop()
        assert await play.results() == [waiting, late]


async def dead_letters_deleted(servers: str, directory: Path) -> None:
    """The dead-letter topic is deleted and made anew.

    Partitions without dead letters go on. Where there is one, results wait with it, and the log
    has a warning that names the topic; it comes once, after the topic is there again.
    """
    async with scene(servers, directory) as play:
        consumer = await play.consumer()
        await play.delete(play.names.dead_letters)
        poison = Message(b"no request id", b"poison", partition=0)
        await send(play._producer, play.names.splits, [poison])
        behind, beside = await play.item(0), await play.item(1)
        await play.told(beside)
        line = await play.said(consumer, AGAIN, "was not found")
        assert play.names.dead_letters in line["error"]
        assert behind not in play.run.results
        await play.create(play.names.dead_letters, 1)
        await play.told(behind)
        await play.sound()


# ---- topics that are made anew or cut short


async def test_a_topic_that_is_not_what_it_was(bootstrap_servers: str, tmp_path: Path) -> None:
    await side_by_side(
        bootstrap_servers,
        tmp_path,
        made_anew_while_running,
        old_commit_for_a_new_topic,
        records_deleted_that_were_read,
        records_deleted_that_were_not_read,
        results_cut_short_while_stopped,
    )


async def make_anew(play: Scene, count: int) -> list[RequestId]:
    """More records than the old topic had, so that its offsets lie within the new log."""
    await play.delete(play.names.splits)
    await play.create(play.names.splits, 1)
    return [await play.item() for _ in range(count)]


async def committed_to(play: Scene, position: int) -> bool:
    """Whether the group's commit knows what was told of all below. It can be seen later than the
    results of its transaction; behind a deletion, it would speak of the new topic."""
    found = await read_committed(play.servers, play.run.group, play.names.splits)
    return f" P={position} " in found.get(0, (0, ""))[1]


async def made_anew_while_running(servers: str, directory: Path) -> None:
    """The splits topic is deleted and made anew, and gets more records than the old one had.

    The log says that the topic is not found, and that the partition is revoked. What was open is
    lost with the topic. Kafka deletes the group's offsets too: the new log is read from its
    start, and each of its requests gets its one result.
    """
    async with scene(servers, directory, partitions=1) as play:
        await play.consumer()
        lost, _ = await play.begin()
        old = [await play.item() for _ in range(3)]
        await play.told(*old)
        await until(lambda: committed_to(play, 7), "their commit")
        anew = await make_anew(play, 8)
        await play.told(*anew)
        await play.run.settle()
        await play.run.stop()
        assert await play.results() == sorted([*old, *anew])
        assert lost not in play.run.results


async def old_commit_for_a_new_topic(servers: str, directory: Path) -> None:
    """The group's offset speaks of a splits topic that was deleted, and lies within the new one:
    a transaction that was under way committed it, or somebody restored it.

    The log has an error that says so; nothing is told before the loss is accepted, and then all
    of the new log, from its start. Once accepted, it is over.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        await play.told(*[await play.item() for _ in range(3)])
        await play.run.settle()
        await consumer.stop()
        old = (await read_committed(play.servers, play.run.group, play.names.splits))[0]
        anew = await make_anew(play, 8)
        await commit(play, *old)
        refused = await play.run.consumer()
        line = await play.said(refused, "partition refused", "--accept-loss")
        assert "splits topic was deleted and made anew" in line["reason"]
        assert not {*anew} & {*play.run.results}
        await refused.stop()
        accepting = await play.consumer(ACCEPT_LOSS="true")
        await play.told(*anew)
        await play.run.settle()
        await accepting.stop()
        await play.consumer()
        late = await play.item()
        await play.told(late)
        await play.run.settle()
        await play.run.stop()
        results = await play.results()
        assert results == sorted({*results}), "each once"
        assert {*anew, late} <= {*results}


async def delete_records(play: Scene, topic: str, before: int) -> None:
    await play.admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before)})


async def records_deleted_that_were_read(servers: str, directory: Path) -> None:
    """Retention takes the start of an open request, and results, from under a running consumer.

    The user sees nothing: the request completes, and nothing is told again.
    """
    async with scene(servers, directory, partitions=1) as play:
        await play.consumer()
        held, left = await play.begin()
        told = [await play.item(), await play.item()]
        await play.told(*told)
        await delete_records(play, play.names.splits, 3)
        await delete_records(play, play.names.results, 1)
        await play.send(left)
        await play.told(held)
        await play.run.settle()
        await play.run.stop()
        left_over = await play.results()
        assert (held in left_over, len(left_over)) == (True, 2), "one is deleted, none told again"
        assert play.run.errors() == []


async def records_deleted_that_were_not_read(servers: str, directory: Path) -> None:
    """Retention takes records that a slow consumer has not read yet.

    The log has an error that says which, and that retention is too short; the partition is
    refused until the loss is accepted. What is left of the log gets its results then.
    """
    async with scene(servers, directory, partitions=1) as play:
        slow = await play.consumer(SESSION_TIMEOUT="30")
        await play.told(await play.item())
        slow.freeze()
        for _ in range(3):
            await play.item()
        left = await play.item()
        await delete_records(play, play.names.splits, 8)
        slow.thaw()
        line = await play.said(slow, "partition refused", "--accept-loss")
        assert "lengthen the retention of the splits topic" in line["reason"]
        await slow.stop()
        await play.consumer(ACCEPT_LOSS="true")
        await play.told(left)
        await play.run.settle()


async def results_cut_short_while_stopped(servers: str, directory: Path) -> None:
    """Retention takes results that still matter, while no consumer runs.

    The log has an error; the partition is refused until the loss is accepted.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        await play.told(await play.item(), await play.item())
        await play.run.settle()
        await consumer.stop()
        await delete_records(play, play.names.results, 1)
        late = await play.item()
        refused = await play.run.consumer()
        line = await play.said(refused, "partition refused", "--accept-loss")
        assert "lengthen the retention of the results topic" in line["reason"]
        await refused.stop()
        await play.consumer(ACCEPT_LOSS="true")
        await play.told(late)
        await play.run.settle()


# ---- partitions and offsets


async def test_partitions_added_and_offsets_set_by_hand(
    bootstrap_servers: str, tmp_path: Path
) -> None:
    await side_by_side(
        bootstrap_servers,
        tmp_path,
        partitions_added,
        splits_partitions_added_alone,
        offset_set_while_running,
        offset_set_forward_while_stopped,
        metadata_replaced_while_stopped,
    )


async def partitions_added(servers: str, directory: Path) -> None:
    """Results topic first, then the splits topic, while a request is open.

    The request stays in its partition; the new one is taken within 30 s. Nothing else to see.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        held, left = await play.begin(0)
        await play.grow(play.names.results, 2)
        await play.grow(play.names.splits, 2)
        await until(lambda: consumer.heard("partition taken") >= 3, "a new partition", RESUMED)
        fresh = await play.item(1)
        await play.send(left)
        await until(lambda: told_in(play, 2), "both results", RESUMED)
        await play.sound()
        assert await play.results() == [held, fresh]
        assert play.run.errors() == []


async def told_in(play: Scene, count: int) -> bool:
    """The watch of the stage knows only the partitions of its beginning."""
    return len(await play.outcomes()) >= count


async def splits_partitions_added_alone(servers: str, directory: Path) -> None:
    """The splits topic gets a partition that the results topic does not have.

    The log has an error, every few seconds, that says which topic lacks it; the other partition
    goes on. What was sent there gets its result when the partition is added.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        await play.grow(play.names.splits, 2)
        line = await play.said(consumer, UNUSABLE, "add partitions to it")
        assert (line["level"], line["partition"]) == ("error", 1)
        assert play.names.results in line["error"]
        waiting, beside = await play.item(1), await play.item(0)
        await play.told(beside)
        await play.grow(play.names.results, 2)
        await until(lambda: told_in(play, 2), "the result of the new partition", RESUMED)
        await play.sound()
        assert await play.results() == [waiting, beside]


async def commit(play: Scene, offset: int, metadata: str = "") -> None:
    """Commit for the group from outside; Kafka lets a transaction do so while members are there."""
    async with (
        AIOKafkaProducer(
            bootstrap_servers=play.servers, transactional_id=f"operator of {play.run.group}"
        ) as operator,
        operator.transaction(),
    ):
        where = TopicPartition(play.names.splits, 0)
        await operator.send_offsets_to_transaction(
            {where: OffsetAndMetadata(offset, metadata)}, play.run.group
        )


async def offset_set_while_running(servers: str, directory: Path) -> None:
    """The group's offset is set, beyond an open request and back, under a running consumer.

    The user sees nothing: the owner knows better, and its next commit says so.
    """
    async with scene(servers, directory, partitions=1) as play:
        await play.consumer()
        held, left = await play.begin()
        for offset in (3, 0):
            await commit(play, offset)
            await play.told(await play.item())
        assert (await read_committed(play.servers, play.run.group, play.names.splits))[0][0] == 0
        await play.send(left)
        await play.told(held)
        await play.sound()
        assert play.run.errors() == []


async def offset_set_forward_while_stopped(servers: str, directory: Path) -> None:
    """The group's offset is set beyond an open request while no consumer runs.

    The log warns that it was set by hand. The request's splits below are given up by that: what
    still comes of it opens it anew, and without the rest it expires, with the one result.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        held, left = await play.begin()
        told = await play.item()
        await play.told(told)
        await consumer.stop()
        _, ends = await read_topic(play.servers, play.names.splits)
        await commit(play, ends[0])
        await play.send(left)
        again = await play.consumer(IDLE_TIMEOUT="2")
        await play.said(again, "partition taken", f'"watermark": {ends[0]}')
        assert any("was set by hand" in line["event"] for line in play.lines(again))
        await play.told(held)
        assert play.run.results[held].status is Status.EXPIRED
        await play.run.settle()
        assert await play.results() == [held, told]


async def metadata_replaced_while_stopped(servers: str, directory: Path) -> None:
    """The commit's metadata is replaced by somebody's text.

    The log warns; all results are read again, and nothing changes.
    """
    async with scene(servers, directory, partitions=1) as play:
        consumer = await play.consumer()
        held, left = await play.begin()
        await play.told(await play.item())
        await consumer.stop()
        await commit(play, 0, "reset by the night shift, S=1 P=2 H=3")
        again = await play.consumer()
        assert any("was set by hand" in line["event"] for line in play.lines(again))
        await play.send(left)
        await play.told(held)
        await play.sound()
