"""Fetched batches, unpacked within bounds, and then read by aiokafka."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from aiokafka.errors import CorruptRecordException
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from bombs import CODECS, HEAD, PACK, SNAPPY, ZSTD, batch, bomb, record
from splitferry_consumer import batches
from splitferry_consumer.batches import (
    UNPACKED_MAX,
    UNREADABLE,
    any_misread,
    look,
    readable,
    record_set,
)

MIB = 1024 * 1024


def read(records: bytes) -> list[tuple[Any, ...]]:
    """As aiokafka reads them."""
    memory, found = MemoryRecords(records), []
    while memory.has_next():
        made: Any = memory.next_batch()
        found += [(r.offset, r.key, r.value, tuple(r.headers)) for r in made]
    return found


def records(count: int = 5, name: bytes = b"name") -> bytes:
    return b"".join(record(n, b"%d" % n, b"v" * n, [(name, b"x")]) for n in range(count))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_was_compressed_is_read_as_if_it_never_was(codec: int) -> None:
    packed = batch(PACK[codec](records()), 5, codec)
    assert look(packed * 2) == (True, 10)
    assert read(readable(packed, MIB, mend_names=False)) == read(batch(records(), 5))
    assert look(readable(packed, MIB, mend_names=True)) == (False, 5)


def test_raw_snappy_is_read_too() -> None:
    import cramjam

    packed = batch(bytes(cramjam.snappy.compress_raw(records())), 5, SNAPPY)
    assert read(readable(packed, MIB, mend_names=False)) == read(batch(records(), 5))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_bomb_becomes_one_record_that_names_the_cause(codec: int) -> None:
    hostile = bomb(codec, UNPACKED_MAX)
    made = readable(hostile, MIB, mend_names=False)
    ((offset, key, value, ((name, cause),)),) = read(made)
    assert (offset, key, value, name) == (0, None, None, UNREADABLE)
    assert b"offsets 0 to 0 does not unpack within 33554432 bytes" in cause
    assert len(read(readable(bomb(codec, UNPACKED_MAX - 100), MIB, mend_names=False))[0][2]) > 0


def test_facts_of_the_batch_stay_and_its_other_offsets_hold_nothing() -> None:
    """An aborted transaction stays one, and the position goes behind the batch."""
    hostile = bytearray(batch(PACK[ZSTD](bytes(UNPACKED_MAX + 1)), 7, ZSTD))
    transactional = 0x10
    struct.pack_into(">q", hostile, 0, 1000)
    struct.pack_into(">h", hostile, 21, ZSTD | transactional)
    struct.pack_into(">qh", hostile, 43, 4242, 3)
    made: Any = MemoryRecords(readable(bytes(hostile), MIB, mend_names=False)).next_batch()
    assert made.is_transactional
    assert (made.producer_id, made.base_offset, made.next_offset) == (4242, 1000, 1007)
    assert [r.offset for r in made] == [1000]


@pytest.mark.parametrize(
    ("codec", "packed"),
    [
        (1, b"\x1f\x8b" + b"\xff" * 50),
        (2, b"\xff\xff\xff\xff\x0f" + b"a" * 20),  # says that it holds 4 GiB
        (2, b"\x82SNAPPY\0\0\0\0\1\0\0\0\1\xff\xff\xff\xfc"),  # a block of -4 bytes: no end
        (2, b"\x82SNAPPY\0\0\0\0\1\0\0\0\1\0\0"),
        (3, b"\x04\x22\x4d\x18" + b"\xff" * 30),
        (4, b"\x28\xb5\x2f\xfd" + b"\xff" * 30),
        (5, b"?"),
        (7, b""),
    ],
    ids=[
        *("gzip", "snappy of 4 GiB", "snappy going back", "snappy cut", "lz4", "zstd"),
        *("codec 5", "codec 7"),
    ],
)
def test_what_does_not_unpack_is_told_and_passed(codec: int, packed: bytes) -> None:
    ((_, _, _, ((name, _),)), *rest) = read(
        readable(batch(packed, 1, codec) + batch(records(), 5), MIB, mend_names=False)
    )
    assert name == UNREADABLE
    assert rest == read(batch(records(), 5))


def test_an_answer_unpacks_to_little_more_than_was_asked_for() -> None:
    """Else 4 MiB of batches that keep to the limit make gigabytes of one poll."""
    one = bomb(ZSTD, 10 * MIB)
    assert len(read(readable(one * 100, 4 * MIB, mend_names=False))) == 1
    small = batch(PACK[ZSTD](records()), 5, ZSTD)
    assert len(read(readable(small * 100, 4 * MIB, mend_names=False))) == 500


def test_a_batch_that_the_broker_cut_off_is_left_for_the_next_answer() -> None:
    whole = batch(PACK[ZSTD](records()), 5, ZSTD)
    for end in range(len(whole)):
        assert len(read(readable(whole + whole[:end], MIB, mend_names=False))) == 5


@pytest.mark.parametrize("name", [b"\xff\xfe", b"h\xe9", b"caf\xc3\xa9", b"\xed\xa0\x80"])
def test_a_name_that_is_not_utf8_is_mended_and_costs_no_other_record(name: bytes) -> None:
    bad = batch(records(2) + record(2, b"k", b"v" * 300, [(name, b"x")] * 3) + record(3, b"z"), 4)
    found = read(readable(bad, MIB, mend_names=True))
    expected = (
        "café" if name == b"caf\xc3\xa9" else "".join(chr(b) if b < 128 else "?" for b in name)
    )
    assert found[2] == (2, b"k", b"v" * 300, ((expected, b"x"),) * 3)
    assert found[:2] == read(batch(records(2), 2))
    assert found[3][:2] == (3, b"z")


def test_attributes_that_the_client_would_misread_are_mended() -> None:
    """It would take the fields behind them for others, and pass over offsets without a word."""
    sound = [record(0, b"a", b"v" * 40), record(1, b"b", b"w" * 40), record(2, b"c")]
    odd = bytearray(sound[1])
    odd[1] = 0x80
    hostile = batch(sound[0] + bytes(odd) + sound[2], 3)
    assert any_misread(hostile)
    assert not any_misread(batch(b"".join(sound), 3))
    for made in (hostile, batch(PACK[ZSTD](sound[0] + bytes(odd) + sound[2]), 3, ZSTD)):
        mended = readable(made, MIB, mend_names=False)
        assert read(mended) == read(batch(b"".join(sound), 3))
        assert not any_misread(mended)


def test_bytes_that_are_no_records_are_left_alone() -> None:
    for broken in (b"\xff" * 9, b"\x01" * 40, b"\x10\0\0\0\1\1\xff\xff\xff\xff\x0f", b"\0" * 30):
        made = batch(broken, 1)
        assert readable(made, MIB, mend_names=True) == made


def test_older_formats_are_left_to_aiokafka() -> None:
    builder = LegacyRecordBatchBuilder(1, 0, 2**20)
    builder.append(0, timestamp=1000, key=None, value=b"old")
    old = bytes(builder.build()) * 2
    assert look(old) == (False, 0)
    assert readable(old, MIB, mend_names=True) == old


def test_the_head_is_kafkas() -> None:
    assert HEAD.format == batches._HEAD.format
    assert HEAD.size == 61


def read_from(records: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    while records.has_next():
        made: Any = records.next_batch()
        found += [(r.offset, r.key, r.value, tuple(r.headers), r.timestamp) for r in made]
    return found


def test_a_view_is_read_as_the_bytes_are() -> None:
    old = LegacyRecordBatchBuilder(1, 0, 1024)
    old.append(0, timestamp=5, key=b"old", value=b"value")
    for whole in (batch(records(), 5) + batch(records(3), 3), bytes(old.build()) * 2):
        for end in range(len(whole) + 1):
            made = record_set(memoryview(bytearray(b"before" + whole[:end]))[6:])
            assert isinstance(made, batches.RecordSet)
            assert made.size_in_bytes() == end
            assert read_from(made) == read_from(record_set(whole[:end]))


@pytest.mark.parametrize("length", [-(2**31), -13, -12, -1, 0, 13, 48])
def test_a_length_that_no_batch_has_is_an_error_also_in_a_view(length: int) -> None:
    """And not the end of what was fetched, behind which the client would go on."""
    broken = bytearray(batch(records(), 5))
    struct.pack_into(">i", broken, 8, length)
    made = record_set(memoryview(broken))
    assert made.has_next()
    with pytest.raises(CorruptRecordException):
        made.next_batch()
