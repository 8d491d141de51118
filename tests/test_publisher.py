"""What a batch becomes on the topics, published through a Kafka in memory."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from memory_transport import (
    DEAD_LETTERS,
    RESULTS,
    SPLITS,
    TOPIC_IDS,
    Fate,
    Kafka,
    MemoryTransport,
    broken,
)
from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.ledger import Batch, DeadLetter, Ledger
from splitferry_consumer.publisher import Publisher
from splitferry_consumer.request import RequestPhase
from splitferry_consumer.targets import Verdict
from splitferry_consumer.transport import (
    FateUnknown,
    Fenced,
    Record,
    TooLarge,
    TopicUnusable,
    TransportError,
)
from splitferry_protocol.codec import InvalidRecord, decode_outcome
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Accepted, Result, Split, Status
from world import split

CONNECT = "__connect.errors."


class Desk:
    """A ledger with its publisher; `read` settles what has ended, as proposed."""

    def __init__(self, kafka: Kafka, partition: int = 0) -> None:
        self.kafka = kafka
        self.partition = partition
        self.stubs: dict[int, int] = {}
        self.ledger = Ledger("group", SPLITS, partition, 100, Bookmark(0, None, 0, None))

    async def open(self) -> Publisher:
        writer = await MemoryTransport(self.kafka).writer(self.partition)
        source = (SPLITS, self.partition)
        return Publisher(writer, source, RESULTS, DEAD_LETTERS, self.stubs, TOPIC_IDS)

    def read(self, content: Split | InvalidRecord, value: bytes = b"value") -> None:
        offset = self.ledger.position
        record = Record(offset, b"a key", value, [("from", b"producer")], timestamp=77)
        for decision in self.ledger.read(record, content, 0.0):
            if decision.state.phase is RequestPhase.ENDED:
                state = decision.state
                verdict = Verdict(state.status, state.error, state.total, b"\1" * 32)
                self.ledger.settled(state, verdict, finished_at=5)

    def gather(self) -> Batch:
        batch = self.ledger.gather()
        assert batch is not None
        return batch

    def outcomes(self) -> list[tuple[Record, Result | Accepted]]:
        records = self.kafka.committed_records(RESULTS)
        return [(record, decode_outcome(record.key, record.value)) for record in records]


@pytest.fixture
def desk() -> Desk:
    return Desk(Kafka())


async def test_results_events_and_the_offset_go_in_one_transaction(desk: Desk) -> None:
    desk.read(split(1, 0, b"ab", total=4, reply=b"old"))
    desk.read(split(1, 2, b"cd", reply=b"new", index=1))
    desk.read(InvalidRecord("no valid header"))
    publisher = await desk.open()
    batch = desk.gather()
    await publisher.publish(desk.ledger, batch)
    (result_record, result), (_, accepted) = desk.outcomes()
    assert isinstance(result, Result)
    assert (result.request, result.status, result.reply) == (
        RequestId(1, 1), Status.COMPLETED, b"new",
    )  # fmt: skip
    assert result_record.key == b"1-1"
    assert accepted == Accepted(RequestId(1, 1), "group", 1, b"old")
    assert len(desk.kafka.committed_records(DEAD_LETTERS)) == 1
    offset, metadata = desk.kafka.offsets[0]
    assert Bookmark.parse(offset, metadata) == Bookmark(3, 0, 3, 100, TOPIC_IDS)
    assert desk.ledger.committed == (3, 3)
    assert desk.kafka.calls == ["writer", "begin", "send", "commit"]


async def test_results_and_events_of_a_partition_go_to_the_same_one_of_the_results() -> None:
    kafka = Kafka(partitions=3)
    desk = Desk(kafka, partition=2)
    desk.read(split(1, 0, b"ab", total=2, reply=b"old"))
    desk.read(split(2, 0, b"a", reply=b"old"))
    desk.read(split(2, 0, b"", reply=b"new"))
    await (await desk.open()).publish(desk.ledger, desk.gather())
    assert len(kafka.committed_records(RESULTS, 2)) == 2


async def test_the_commit_says_what_its_offsets_are_offsets_in(desk: Desk) -> None:
    """A topic that was made anew has other ids, and the next owner sees it."""
    desk.read(split(1, total=0))
    publisher = await desk.open()
    await publisher.publish(desk.ledger, desk.gather())
    assert Bookmark.parse(*desk.kafka.offsets[0]).topics == desk.kafka.topics


async def test_a_repeat_is_told_with_the_recorded_result(desk: Desk) -> None:
    publisher = await desk.open()
    desk.read(split(1, total=0, reply=b"first"))
    await publisher.publish(desk.ledger, desk.gather())
    desk.read(split(1, total=0, reply=b"second"))
    await publisher.publish(desk.ledger, desk.gather())
    told = [(o.reply, o.repeat) for _, o in desk.outcomes() if isinstance(o, Result)]
    assert told == [(b"first", False), (b"second", True)]


async def test_a_dead_letter_is_the_record_and_why_it_is_one(desk: Desk) -> None:
    desk.read(split(1, 0, b"ab"))
    desk.read(InvalidRecord("a b\u00fcd r\udce9cord"), b"\xffthe value")
    await (await desk.open()).publish(desk.ledger, desk.gather())
    (letter,) = desk.kafka.committed_records(DEAD_LETTERS)
    assert (letter.key, letter.value) == (b"a key", b"\xffthe value")
    assert letter.headers == [
        ("from", b"producer"),
        (CONNECT + "topic", b"splits"),
        (CONNECT + "partition", b"0"),
        (CONNECT + "offset", b"1"),
        (CONNECT + "exception.class.name", b"BatchTransferError"),
        (CONNECT + "exception.message", "a b\u00fcd r?cord".encode()),
        (CONNECT + "timestamp", b"77"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [(None, None, b""), (None, b"value", b"value"), (b"key", None, None)],
)
async def test_only_a_record_without_key_and_value_is_kept_with_an_empty_value(
    desk: Desk, key: bytes | None, value: bytes | None, kept: bytes | None
) -> None:
    publisher = await desk.open()
    desk.ledger.read(Record(0, key, value), InvalidRecord("no key"), 0.0)
    await publisher.publish(desk.ledger, desk.gather())
    (letter,) = desk.kafka.committed_records(DEAD_LETTERS)
    assert (letter.key, letter.value) == (key, kept)


async def test_the_offsets_of_dead_letters_say_nothing_about_the_results(desk: Desk) -> None:
    publisher = await desk.open()
    for _ in range(9):
        desk.read(InvalidRecord("bad"))
    await publisher.publish(desk.ledger, desk.gather())
    desk.read(split(1, total=0))
    desk.read(InvalidRecord("bad"))
    await publisher.publish(desk.ledger, desk.gather())
    desk.read(split(2, total=0))
    await publisher.publish(desk.ledger, desk.gather())
    assert Bookmark.parse(*desk.kafka.offsets[0]).results == 0
    (first, _), _ = desk.outcomes()
    assert first.offset == 0


async def test_what_is_too_large_for_the_dead_letters_becomes_a_stub_the_next_time(
    desk: Desk,
) -> None:
    desk.kafka.size_limits[DEAD_LETTERS] = 10
    desk.read(split(1, total=0))
    desk.read(InvalidRecord("bad"), b"small")
    desk.read(InvalidRecord("bad"), b"much too large")
    batch = desk.gather()
    with pytest.raises(TooLarge), capture_logs() as logs:
        await (await desk.open()).publish(desk.ledger, batch)
    assert desk.stubs == {2: 1}
    (warning,) = logs
    assert warning.pop("remedy").startswith("raise its max.message.bytes 64 KiB above")
    assert warning == {
        "log_level": "warning",
        "event": "dead letter too large for its topic, a stub takes its place",
        "topic": DEAD_LETTERS, "partition": 0, "offset": 2, "size": len(b"much too large"),
    }  # fmt: skip
    assert isinstance(batch.events[1], DeadLetter)
    # The partition is taken again: another publisher, the same batch.
    await (await desk.open()).publish(desk.ledger, batch)
    small, stub = desk.kafka.committed_records(DEAD_LETTERS)
    assert (small.value, stub.value) == (b"small", b"")
    assert dict(stub.headers)[CONNECT + "offset"] == b"2"
    assert len(desk.outcomes()) == 1, "the refused transaction left no result"


@pytest.mark.parametrize(
    ("refusals", "key", "headers"),
    [(1, b"a key", ["from"]), (2, None, []), (3, None, [])],
)
async def test_a_stub_that_is_too_large_as_well_leaves_key_and_headers_behind(
    desk: Desk, refusals: int, key: bytes | None, headers: list[str]
) -> None:
    desk.read(InvalidRecord("bad"))
    batch = desk.gather()
    for _ in range(refusals):
        desk.kafka.faults["send"].append(TooLarge([0]))
        with pytest.raises(TooLarge):
            await (await desk.open()).publish(desk.ledger, batch)
    await (await desk.open()).publish(desk.ledger, batch)
    (stub,) = desk.kafka.committed_records(DEAD_LETTERS)
    assert (stub.key, stub.value) == (key, b"")
    names = [name for name, _ in stub.headers]
    assert [name for name in names if not name.startswith(CONNECT)] == headers
    assert dict(stub.headers)[CONNECT + "exception.message"] == b"bad", "why it is one stays"


async def test_a_result_that_its_topic_does_not_take_names_the_remedy(desk: Desk) -> None:
    """Nothing can take its place, and a dead letter beside it is not at fault."""
    desk.kafka.size_limits[RESULTS] = 10
    desk.read(InvalidRecord("bad"))
    desk.read(split(1, total=0))
    remedy = r"topic results takes: raise its max\.message\.bytes to 256 KiB or more$"
    with pytest.raises(TopicUnusable, match=remedy):
        await (await desk.open()).publish(desk.ledger, desk.gather())
    assert desk.stubs == {}


@pytest.mark.parametrize(
    ("operation", "fault", "heard"),
    [
        ("send", broken(), TransportError),
        ("send", Fenced("by another"), Fenced),
        ("commit", Fate.COMMITTED, FateUnknown),
        ("commit", Fate.ABORTED, FateUnknown),
    ],
)
async def test_what_was_not_heard_to_be_committed_is_not_told_to_the_ledger(
    desk: Desk, operation: str, fault: Exception | Fate, heard: type[Exception]
) -> None:
    desk.read(split(1, total=0))
    desk.kafka.faults[operation].append(fault)
    with pytest.raises(heard):
        await (await desk.open()).publish(desk.ledger, desk.gather())
    assert desk.ledger.committed == (0, 0)
    assert desk.ledger.unsettled == 1


async def test_a_publisher_that_was_fenced_publishes_nothing(desk: Desk) -> None:
    old, new = await desk.open(), await desk.open()
    desk.read(split(1, total=0))
    batch = desk.gather()
    with pytest.raises(Fenced):
        await old.publish(desk.ledger, batch)
    assert desk.outcomes() == []
    await new.publish(desk.ledger, batch)
    assert len(desk.outcomes()) == 1


async def test_closing_gives_up_the_right_to_publish(desk: Desk) -> None:
    publisher = await desk.open()
    await publisher.close()
    assert desk.kafka.calls[-1] == "close"
