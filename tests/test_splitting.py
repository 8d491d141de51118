"""Splitting covers an item exactly, and with few enough splits."""

from __future__ import annotations

import asyncio
import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitferry_producer import ItemTooLarge, MemorySource, SplitTooLarge, StreamSource
from splitferry_producer.flow import Allowance, ByteBudget
from splitferry_producer.sources import DataItemSource
from splitferry_producer.splitting import (
    DEFAULT_SIZE,
    SPLITS_AIM,
    SPLITS_MAX,
    TOPIC_DEFAULT,
    Piece,
    SplitSizes,
    pieces,
    read_ahead,
)
from splitferry_protocol.records import PAYLOAD_MAX

MIB = 1024 * 1024


async def cut(source: DataItemSource, sizes: SplitSizes, ahead: bool = False) -> list[Piece]:
    budget = ByteBudget(100)
    await source.open()
    found = []
    with Allowance(budget) as allowance:
        made = pieces(source, sizes, allowance.admit)
        async for piece in read_ahead(made) if ahead else made:
            assert budget.used >= len(piece.payload)
            allowance.hand_over(len(piece.payload))
            budget.release(len(piece.payload))
            found.append(piece)
    assert budget.used == 0
    return found


@given(
    data=st.binary(max_size=300),
    size=st.integers(1, 80),
    stream=st.booleans(),
    ahead=st.booleans(),
)
def test_pieces_cover_the_item_exactly(data: bytes, size: int, stream: bool, ahead: bool) -> None:
    source = StreamSource(io.BytesIO(data)) if stream else MemorySource(data)
    found = asyncio.run(cut(source, SplitSizes(size, size), ahead))
    assert b"".join(bytes(piece.payload) for piece in found) == data
    end = 0
    for number, piece in enumerate(found):
        assert (piece.index, piece.offset) == (number, end)
        end += len(piece.payload)
    *others, last = found
    assert (last.total, last.sha256) == (len(data), hashlib.sha256(data).digest())
    assert all(p.payload and p.sha256 is None for p in others)
    assert {piece.total for piece in others} <= {None if stream else len(data)}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_empty_item_is_one_empty_split(stream: bool) -> None:
    source = StreamSource(io.BytesIO()) if stream else MemorySource(b"")
    (only,) = await cut(source, SplitSizes(10, 10))
    assert (only.payload, only.total, only.offset) == (b"", 0, 0)
    assert only.sha256 == hashlib.sha256().digest()


@given(total=st.integers(0, 2**44), topic=st.integers(10_000, 40 * MIB))
def test_sizes_grow_as_far_as_the_topic_allows(total: int, topic: int) -> None:
    sizes = SplitSizes.fitting(None, topic)
    assert sizes.largest <= min(PAYLOAD_MAX, topic)
    try:
        size = sizes.of_item(total)
    except ItemTooLarge:
        assert total > sizes.largest * SPLITS_MAX
        return
    assert min(DEFAULT_SIZE, sizes.largest) <= size <= sizes.largest
    splits = -(-total // size)
    assert splits <= SPLITS_MAX
    assert splits <= SPLITS_AIM or size == sizes.largest


def test_a_topic_with_kafkas_default_takes_the_default_split() -> None:
    sizes = SplitSizes.fitting(None, TOPIC_DEFAULT)
    assert sizes.of_item(1) == DEFAULT_SIZE
    assert sizes.of_item(90 * 1024 * MIB) == sizes.largest > 1_030_000


def test_a_stream_stays_far_below_the_horizon() -> None:
    sizes = SplitSizes.fitting(None, 17 * MIB)
    found = [sizes.of_stream(index) for index in range(SPLITS_AIM)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (DEFAULT_SIZE, PAYLOAD_MAX)
    assert sum(found) > 45 * 1024 * MIB
    assert sizes.of_stream(SPLITS_MAX - 1) == PAYLOAD_MAX
    with pytest.raises(ItemTooLarge, match="send the item in parts"):
        sizes.of_stream(SPLITS_MAX)


def test_a_configured_size_stays_as_it_is() -> None:
    sizes = SplitSizes.fitting(1000, TOPIC_DEFAULT)
    assert sizes.of_item(0) == sizes.of_item(99_000_000) == sizes.of_stream(99_999) == 1000
    with pytest.raises(ItemTooLarge, match="larger split size"):
        sizes.of_item(1000 * SPLITS_MAX + 1)


@pytest.mark.parametrize(
    ("configured", "topic", "remedy"),
    [
        (MIB, TOPIC_DEFAULT, "give at most 1039372"),
        (PAYLOAD_MAX + 1, 64 * MIB, f"give at most {PAYLOAD_MAX}"),
        (None, 5000, "raise its max.message.bytes"),
        (0, TOPIC_DEFAULT, "give at least 1"),
    ],
)
def test_a_size_that_the_topic_does_not_take_is_refused(
    configured: int | None, topic: int, remedy: str
) -> None:
    with pytest.raises(SplitTooLarge, match=remedy):
        SplitSizes.fitting(configured, topic)


async def test_an_error_of_the_source_comes_after_the_pieces_before_it() -> None:
    class Failing(MemorySource):
        async def read(self, offset: int, length: int, digest: object) -> tuple[memoryview, bool]:
            if offset:
                raise OSError(5, "broken")
            return await super().read(offset, length, digest)  # type: ignore[arg-type]

    budget = ByteBudget(100)
    with Allowance(budget) as allowance:
        ahead = read_ahead(pieces(Failing(b"abcdef"), SplitSizes(3, 3), allowance.admit))
        assert (await anext(ahead)).payload == b"abc"
        with pytest.raises(OSError, match="broken"):
            await anext(ahead)
    assert budget.used == 0
