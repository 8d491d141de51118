"""From the real producer through a real broker to the target, and back as a result."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from brokers import Topics, administrator, configure
from checker import CONNECT, read_outcomes, violations
from place import BOUND, Place, results_of
from splitferry_consumer import ReceivedItem
from splitferry_producer import FileSource, MemorySource, StreamSource
from splitferry_protocol.errors import VersionMismatch, WriteDataFailed
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Accepted, Block, Result, Split, Status
from workload import KIB, MIB, Message, cut, damaged, make_load, message, send, sending

pytestmark = pytest.mark.timeout(180)

PARTITIONS = 2
MakePlace = Callable[..., Awaitable[Place]]


@pytest.fixture
def make_place(
    bootstrap_servers: str, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> MakePlace:
    async def make(partitions: int = PARTITIONS) -> Place:
        root = tmp_path / "sandbox" / "root"
        root.mkdir(parents=True)
        return Place(bootstrap_servers, await topics(partitions=partitions), root, tmp_path)

    return make


def messages(*contents: Split | Abort) -> list[Message]:
    return [message(content, PARTITIONS) for content in contents]


# ---- what arrives


async def test_files(make_place: MakePlace, tmp_path: Path) -> None:
    place = await make_place()
    data = os.urandom(3 * MIB + 1)
    (tmp_path / "sent").write_bytes(data)

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]

    async with place.serving(), place.producer(split_size=256 * KIB) as producer:
        whole, streamed, empty = await asyncio.gather(
            producer.send(
                FileSource(tmp_path / "sent"),
                unique_id="deep/down/file",
                version=3,
                labels={"colour": "blue"},
                reply=b"token",
                timeout=BOUND,
            ),
            producer.send(StreamSource(stream()), unique_id="stream", timeout=BOUND),
            producer.send(MemorySource(b"", Block.FILE), unique_id="empty", timeout=BOUND),
        )
        await place.settled()
    for result, name, content in [
        (whole, "deep/down/file", data),
        (streamed, "stream", data),
        (empty, "empty", b""),
    ]:
        assert isinstance(result, Result)
        assert (result.status, result.size, result.target) == (
            Status.COMPLETED,
            len(content),
            {"path": name},
        )
        assert result.sha256 == hashlib.sha256(content).digest()
        assert (place.root / name).read_bytes() == content
    assert isinstance(whole, Result)
    assert (whole.version, whole.labels, whole.reply) == (3, {"colour": "blue"}, b"token")
    assert (whole.splits, whole.duplicates, whole.group) == (13, 0, place.group)
    assert violations(await place.history()) == []


async def test_memory_is_opened_by_another_process(make_place: MakePlace) -> None:
    place = await make_place()
    data = os.urandom(2 * MIB + 3)
    async with place.serving(), place.producer() as producer:
        result = await producer.send(MemorySource(data), unique_id="matrix 7", timeout=BOUND)
        assert isinstance(result, Result)
        assert result.target is not None
        reading = (
            "import hashlib, sys\n"
            "from splitferry_consumer import attach\n"
            "with attach(sys.argv[1], int(sys.argv[2])) as data:\n"
            "    print(hashlib.sha256(data).hexdigest())"
        )
        told = await asyncio.to_thread(
            subprocess.check_output,
            [sys.executable, "-c", reading, result.target["shm"], str(result.size)],
            text=True,
        )
        await place.settled()
    assert told.strip() == hashlib.sha256(data).hexdigest()
    assert violations(await place.history()) == []
    Path("/dev/shm", result.target["shm"]).unlink()


async def test_a_handler_in_the_process(make_place: MakePlace) -> None:
    place = await make_place()
    received: list[tuple[str, bytes]] = []

    async def handler(item: ReceivedItem) -> None:
        received.append((item.unique_id, bytes(item.data)))
        if item.unique_id == "bad":
            raise ValueError("not for me")

    async with place.serving(handler), place.producer(split_size=1000) as producer:
        good = await producer.send(MemorySource(bytes(5000)), unique_id="good", timeout=BOUND)
        bad = await producer.send(MemorySource(b"x"), unique_id="bad", timeout=BOUND)
        await place.settled()
    assert received == [("good", bytes(5000)), ("bad", b"x")]
    assert isinstance(good, Result)
    assert isinstance(bad, Result)
    assert (good.status, good.target) == (Status.COMPLETED, None)
    assert bad.status is Status.FAILED
    assert "not for me" in str(bad.error)
    excused = {bad.request: (Status.FAILED, "BatchTransferFailed")}
    assert violations(await place.history(excused=excused)) == []


async def test_fifty_requests_interleaved_shuffled_and_duplicated(make_place: MakePlace) -> None:
    place = await make_place(4)
    rng = random.Random(50)
    sent = {}
    waiting: list[list[Message]] = []
    for number in range(50):
        request = RequestId(3, number)
        data = rng.randbytes(rng.choice([0, 1, 999, 30 * KIB, 400 * KIB]))
        splits = cut(request, data, max(1, len(data) // rng.randint(1, 12)))
        splits += rng.choices(splits, k=rng.randint(0, 5))
        rng.shuffle(splits)
        sent[request] = data
        waiting.append([message(split, 4) for split in splits])
    mixed: list[Message] = []
    while waiting := [left for left in waiting if left]:
        mixed.append(rng.choice(waiting).pop())
    async with place.serving():
        await place.send(mixed)
        await place.settled()
    history = await place.history()
    assert violations(history) == []
    results = results_of(history)
    assert results.keys() == sent.keys()
    for request, data in sent.items():
        assert results[request].success
        assert (place.root / f"items/{request}").read_bytes() == data


async def test_every_kind_of_request_at_once(make_place: MakePlace) -> None:
    place = await make_place()
    load = make_load(random.Random(7), 60, PARTITIONS, [0, 1, 700, 20 * KIB, 300 * KIB])
    async with place.serving(segment_lifetime=1):
        await place.send(load)
        await place.settled()
    assert violations(await place.history()) == []


# ---- what goes wrong


async def test_errors_are_told_and_the_partition_goes_on(make_place: MakePlace) -> None:
    place = await make_place()
    (place.root / "link").symlink_to(place.root.parent, target_is_directory=True)

    def item(number: int, unique_id: str | None = None) -> tuple[Split, Split]:
        one, two = cut(RequestId(5, number), b"abcdefgh", 4, unique_id=unique_id)
        return one, two

    cases: list[tuple[list[Message], Status, str | None]] = []

    def case(sent: list[Message], status: Status, code: str | None) -> None:
        cases.append((sent, status, code))

    failed = Status.FAILED
    one, two = item(0)
    case(messages(one, one._replace(payload=b"ABCD"), two), failed, "BatchTransferFailed")
    one, two = item(1)
    case(messages(one, two._replace(total=9)), failed, "BatchTransferFailed")
    one, two = item(2)
    case(messages(one, two._replace(sha256=bytes(32))), failed, "BatchTransferFailed")
    one, two = item(3)
    case(messages(one, two._replace(version=2)), failed, "VersionMismatch")
    one, two = item(4)
    case(messages(one, Abort(one.request, "enough"), two), Status.ABORTED, "BatchTransferFailed")
    for number, name in enumerate(["../up", "/etc/x", "a//b", ".splitferry/catalog.db", "a/\0"], 5):
        case(messages(*item(number, name)), failed, "BatchTransferError")
    one, two = item(10)
    case([*messages(one), damaged(messages(two)[0])], failed, "SplitTaskFailed")
    one, two = item(11)
    case(messages(one, two._replace(offset=5)), failed, "SplitTaskFailed")
    one, two = item(12)
    reused = messages(one, two, one._replace(unique_id="other"), one._replace(total=9))
    case(reused, Status.COMPLETED, None)
    one, two = item(13, "link/outside")
    case(messages(one, two), failed, "WriteDataFailed")
    one, two = item(14)
    case(messages(one, two), Status.COMPLETED, None)
    poison = [
        Message(None, b"\xc1"),
        Message(b"5-14", b"", [("crc32c", b"1")]),
        Message(b"x", None),
    ]
    async with place.serving():
        await place.send([*poison, *(m for sent, _, _ in cases for m in sent), *poison])
        await place.settled()
    link = RequestId(5, 13)
    history = await place.history(excused={link: (failed, "WriteDataFailed")})
    assert violations(history) == []
    results = results_of(history)
    for number, (_, status, code) in enumerate(cases):
        result = results[RequestId(5, number)]
        assert (result.status, result.error and result.error.code) == (status, code), number
    codes = [value for letter in history.dead_letters for name, value in letter.headers
             if name == CONNECT + "exception.class.name"]  # fmt: skip
    assert sorted(codes).count(b"BatchTransferError") == len(poison) * 2 + 5 + 2


async def test_only_a_newer_version_replaces_an_item(make_place: MakePlace) -> None:
    place = await make_place()
    async with place.serving(), place.producer() as producer:

        async def put(version: int, data: bytes) -> Result:
            source = MemorySource(data, Block.FILE)
            told = await producer.send(source, unique_id="x", version=version, timeout=BOUND)
            assert isinstance(told, Result)
            return told

        assert (await put(2, b"two")).success
        for version in (1, 2):
            refused = await put(version, b"late")
            assert isinstance(refused.error, VersionMismatch)
            assert (refused.error.expected, refused.error.actual) == (3, version)
        assert (await put(3, b"three")).success
        await place.settled()
    assert (place.root / "x").read_bytes() == b"three"
    assert violations(await place.history()) == []


async def test_a_quota_refuses_and_later_requests_go_on(make_place: MakePlace) -> None:
    place = await make_place()
    async with place.serving(quota=100_000), place.producer() as producer:
        large = await producer.send(
            MemorySource(bytes(200_000), Block.FILE), unique_id="large", timeout=BOUND
        )
        small = await producer.send(
            MemorySource(bytes(50_000), Block.FILE), unique_id="small", timeout=BOUND
        )
        await place.settled()
    assert isinstance(large, Result)
    assert isinstance(small, Result)
    assert "quota" in str(large.error)
    assert small.success
    excused = {large.request: (Status.FAILED, "BatchTransferFailed")}
    assert violations(await place.history(excused=excused)) == []


async def test_a_request_without_new_bytes_expires(make_place: MakePlace) -> None:
    place = await make_place()
    idle, alive = cut(RequestId(5, 1), b"abcd", 2), cut(RequestId(5, 2), b"abcdef", 1)
    async with place.serving(idle_timeout=5.0), sending(place.servers) as producer:
        await send(producer, place.names.splits, messages(idle[0], alive[0]))
        # Only new bytes are activity; the same split again is none.
        for split in alive[1:]:
            await asyncio.sleep(1.2)
            await send(producer, place.names.splits, messages(idle[0], split))
        await place.settled()
        await place.send(messages(idle[1]))
        await place.settled()
    history = await place.history(
        excused={idle[0].request: (Status.EXPIRED, "BatchTransferFailed")}
    )
    assert violations(history) == []
    assert results_of(history)[alive[0].request].success


async def test_what_cannot_be_written_is_given_up(make_place: MakePlace) -> None:
    """The disk is full for files; memory items of the same partition are received meanwhile."""
    place = await make_place(1)
    async with (
        place.serving(disk_reserve=2**62, write_timeout=1.0, segment_lifetime=1),
        place.producer() as producer,
    ):
        file, mem = await asyncio.gather(
            producer.send(MemorySource(b"x" * 9000, Block.FILE), unique_id="f", timeout=BOUND),
            producer.send(MemorySource(b"y" * 9000), unique_id="m", timeout=BOUND),
        )
        await place.settled()
    assert isinstance(file, Result)
    assert isinstance(mem, Result)
    assert isinstance(file.error, WriteDataFailed)
    assert mem.success
    excused = {file.request: (Status.FAILED, "WriteDataFailed")}
    assert violations(await place.history(excused=excused)) == []


async def test_a_full_file_system(make_place: MakePlace) -> None:
    place = await make_place(1)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "splitferry-test", str(place.root)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        async with (
            place.serving(disk_reserve=0, write_timeout=1.0),
            place.producer(split_size=512 * KIB) as producer,
        ):
            large = await producer.send(
                MemorySource(bytes(8 * MIB), Block.FILE), unique_id="large", timeout=BOUND
            )
            small = await producer.send(
                MemorySource(bytes(MIB), Block.FILE), unique_id="small", timeout=BOUND
            )
            await place.settled()
        assert isinstance(large, Result)
        assert isinstance(small, Result)
        assert isinstance(large.error, WriteDataFailed)
        assert small.success
        excused = {large.request: (Status.FAILED, "WriteDataFailed")}
        assert violations(await place.history(excused=excused)) == []
    finally:
        subprocess.run(["umount", str(place.root)], check=True)


# ---- what is told besides results


async def test_tokens_are_told_in_their_order(make_place: MakePlace) -> None:
    place = await make_place(1)
    one, two = cut(RequestId(5, 1), b"abcd", 2)
    before = [one._replace(reply=b"a"), one._replace(reply=b"b", index=7), two]
    after = [one._replace(reply=t) for t in (b"b", b"c", b"c", b"b")]
    async with place.serving():
        await place.send([message(split, 1) for split in before])
        await place.settled()
        await place.send([message(split, 1) for split in after])
        await place.settled()
    told = [outcome.told for outcome in await read_outcomes(place.servers, place.names.results)]
    accepted = [e for e in told if isinstance(e, Accepted)]
    assert accepted == [Accepted(one.request, place.group, 7, b"a")]
    results = [(e.repeat, e.reply) for e in told if isinstance(e, Result)]
    assert results == [(False, b"b"), (True, b"c"), (True, b"b")]
    assert violations(await place.history()) == []


async def test_a_dead_letter_too_large_for_its_topic_leaves_a_stub(make_place: MakePlace) -> None:
    place = await make_place(1)
    async with administrator(place.servers) as admin:
        await configure(admin, place.names.dead_letters, {"max.message.bytes": "300000"})
    good = [message(split, 1) for n in range(4) for split in cut(RequestId(5, n), b"abcd", 2)]
    small, large = Message(b"1", b"small", [("own", b"1")]), Message(b"2", b"x" * 400_000)
    async with place.serving():
        await place.send([*good[:3], small, large, *good[3:6], large, small, *good[6:]])
        await place.settled()
    history = await place.history(stubs=frozenset({(0, 4), (0, 8)}))
    assert violations(history) == []
    assert [letter.value for letter in history.dead_letters] == [b"small", b"", b"", b"small"]
