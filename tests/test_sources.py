"""Sources: what they read, that they tell its block type and size, and that a change is found."""

from __future__ import annotations

import array
import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitferry_producer import (
    DataItemSource,
    FileSource,
    MemorySource,
    SourceChanged,
    SourceError,
    StreamSource,
)
from splitferry_protocol.records import Block


async def parts_of(source: DataItemSource, length: int) -> list[bytes]:
    """All parts of `length` bytes, checked against the digest that ran along."""
    digest = hashlib.sha256()
    parts: list[bytes] = []
    last = False
    await source.open()
    try:
        while not last:
            part, last = await source.read(sum(map(len, parts)), length, digest)
            parts.append(bytes(part))
    finally:
        await source.close()
    assert digest.digest() == hashlib.sha256(b"".join(parts)).digest()
    return parts


@pytest.mark.parametrize(
    "data",
    [
        b"twelve bytes",
        bytearray(b"twelve bytes"),
        memoryview(b"--twelve bytes--")[2:-2],
        array.array("I", [1, 2, 3]),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
        np.zeros((0, 3)),
        b"",
    ],
    ids=lambda data: type(data).__name__,
)
async def test_memory_of_any_kind_is_read_in_ranges(data: Any) -> None:
    whole = memoryview(data).tobytes()
    source = MemorySource(data)
    assert (source.block, source.size, source.unbounded) == (Block.MEM, len(whole), False)
    parts = await parts_of(source, 5)
    assert b"".join(parts) == whole
    assert [len(part) for part in parts[:-1]] == [5] * (len(parts) - 1)


async def test_memory_is_not_copied() -> None:
    data = bytearray(10)
    part, _ = await MemorySource(data).read(2, 4, hashlib.sha256())
    data[3] = 7
    assert bytes(part) == b"\0\7\0\0"


@pytest.mark.parametrize("data", [np.arange(10)[::2], np.ones((2, 3)).T, "text"])
def test_memory_without_its_bytes_in_a_row_is_refused(data: Any) -> None:
    with pytest.raises(TypeError):
        MemorySource(data)


@given(data=st.binary(max_size=200), length=st.integers(1, 60))
@settings(deadline=None, max_examples=50)
def test_a_file_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "read_whole"
    path.write_bytes(data)
    source = FileSource(path)
    parts = asyncio.run(parts_of(source, length))
    assert b"".join(parts) == data
    assert len(parts) == max(1, -(-len(data) // length))
    assert (source.block, source.size) == (Block.FILE, len(data))


async def test_a_file_may_go_to_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    assert FileSource(tmp_path / "f", Block.MEM).block is Block.MEM


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewritten(path: Path) -> None:
    path.write_bytes(b"B" * 10)
    os.utime(path, (1, 1))


def replaced(path: Path) -> None:
    kept = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"B" * 10)
    os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (appended, "its size"),
        (lambda path: os.truncate(path, 6), "ends at byte 6"),
        (rewritten, "modification time"),
        (replaced, "another file"),
        (os.unlink, "No such file"),
    ],
)
async def test_a_file_that_changes_is_found_before_its_end_is_told(
    tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"A" * 10)
    source = FileSource(path)
    await source.open()
    _, last = await source.read(0, 5, hashlib.sha256())
    assert not last
    change(path)
    with pytest.raises(SourceChanged, match=told):
        await source.read(5, 5, hashlib.sha256())
    await source.close()


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, told in [("fifo", "not a regular"), ("none", "No such file"), (".", "not a regular")]:
        source = FileSource(tmp_path / name)
        with pytest.raises(SourceError, match=told):
            asyncio.run(parts_of(source, 1))
    with pytest.raises(SourceError, match="null"):
        asyncio.run(parts_of(FileSource("a\0b"), 1))


async def test_a_closed_file_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    source = FileSource(tmp_path / "f")
    before = len(os.listdir("/proc/self/fd"))
    await parts_of(source, 1)
    # A cancelled open may come to its thread after the close: it must not open any more.
    with pytest.raises(SourceError, match="was sent before"):
        await source.open()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(SourceError, match="not open"):
        await source.read(0, 1, hashlib.sha256())


@pytest.mark.parametrize("parts", [1, 3], ids=["in its middle", "at its end"])
async def test_a_stream_that_was_sent_is_not_sent_again(parts: int) -> None:
    """The second time it would be empty: an empty item over the one that was published."""
    source = StreamSource(trickle([b"a", b"b", b"c"]))
    await source.open()
    for _ in range(parts):
        await source.read(0, 1, hashlib.sha256())
    await source.close()
    with pytest.raises(SourceError, match=r"stream is sent, or was sent before: .* make a new one"):
        await source.open()


async def test_a_source_is_not_sent_twice_at_once(tmp_path: Path) -> None:
    """Both would publish a part of the stream, each with a digest that fits."""
    (tmp_path / "f").write_bytes(b"abc")
    before = len(os.listdir("/proc/self/fd"))
    for source in (StreamSource(trickle([b"abcdef"])), FileSource(tmp_path / "f")):
        await source.open()
        assert (await source.read(0, 1, hashlib.sha256()))[0] == b"a"
        with pytest.raises(SourceError, match="is sent, or was sent before"):
            await source.open()
        await source.close()  # as the one does that was refused
        with pytest.raises(SourceError, match=r"closed while it was read|not open"):
            await source.read(1, 1, hashlib.sha256())
    assert len(os.listdir("/proc/self/fd")) == before


async def trickle(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@given(chunks=st.lists(st.binary(max_size=20), max_size=12), length=st.integers(1, 25))
@settings(deadline=None, max_examples=100)
def test_a_stream_knows_its_last_part(chunks: list[bytes], length: int) -> None:
    whole = b"".join(chunks)
    for stream in (trickle(chunks), io.BytesIO(whole)):
        source = StreamSource(stream)
        assert (source.size, source.unbounded) == (None, True)
        parts = asyncio.run(parts_of(source, length))
        assert b"".join(parts) == whole
        # Every part is full but the last, and the last is empty only if the item is.
        assert [len(part) for part in parts[:-1]] == [length] * (len(parts) - 1)
        assert bool(parts[-1]) == bool(whole)


async def test_a_pipe_is_read_to_its_end() -> None:
    data = os.urandom(300_000)
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as stream:
        writing = asyncio.create_task(asyncio.to_thread(write_all, write_end, data))
        parts = await parts_of(StreamSource(stream), 100_000)
        await writing
    assert b"".join(parts) == data
    assert [len(part) for part in parts] == [100_000] * 3


def write_all(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb") as file:
        file.write(data)


async def test_a_read_of_a_silent_pipe_leaves_no_thread_when_cancelled() -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as stream:
        source = StreamSource(stream)
        reading = asyncio.create_task(source.read(0, 10, hashlib.sha256()))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await source.close()
        # A thread left in the read would take these bytes.
        os.write(write_end, b"for someone else")
        os.close(write_end)
        assert await asyncio.to_thread(stream.read) == b"for someone else"


async def test_an_asyncio_stream_is_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"no line ends here")
    reader.feed_eof()
    assert await parts_of(StreamSource(reader), 10) == [b"no line en", b"ds here"]


async def failing() -> AsyncIterator[bytes]:
    yield b"begun"
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (failing(), "Connection reset"),
        (io.StringIO("text"), "something else than bytes"),
        (trickle(["text"]), "something else than bytes"),  # type: ignore[list-item]
    ],
)
async def test_a_stream_that_cannot_be_read_says_so(stream: Any, told: str) -> None:
    with pytest.raises(SourceError, match=told):
        await parts_of(StreamSource(stream, name="feed"), 3)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs /proc")
async def test_a_file_that_says_it_is_empty_is_not_sent_as_empty() -> None:
    source = FileSource("/proc/version")
    await source.open()
    try:
        with pytest.raises(SourceError, match="more bytes than its size says"):
            await source.read(0, 512 * 1024, hashlib.sha256())
    finally:
        await source.close()
