"""Fetched record batches, made safe to read before aiokafka reads them. Pure: bytes to bytes.

Three things in a batch would stop its partition. aiokafka unpacks a compressed batch whole, and
16 kB of zstd can hold 512 MiB: here no batch unpacks to more than `UNPACKED_MAX`, and no answer
to much more than what was asked for. And it raises for a header's name that is not UTF-8, which
would lose all other records of the poll: such a name is mended. And it reads a record's byte of
attributes, which brokers do not look at, as a varint: where its high bit is set the fields behind
it shift, perhaps unnoticed, to a far offset that passes over the records of others. That bit is
taken away. A batch that cannot be unpacked becomes one record, which says so, at its first offset;
its other offsets hold nothing.

Checksums of batches are not kept up: the consumer does not check them (`check_crcs`), since the
contract's own covers every value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import mmap
from typing import Any
from uuid import uuid4

import cramjam
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import decode_varint

UNPACKED_MAX = 32 * 1024 * 1024
"""Bytes that a compressed batch may unpack to: two splits of the largest size. Clients gather
less in a batch unless they are told to. Each partition may hold so much, fetched ahead."""
UNREADABLE = f"unreadable {uuid4()}"
"""Name of the header with the cause in a record that stands for an unreadable batch. Nobody
outside this process knows it, so nobody can send such a record."""

Buffer = bytes | bytearray | memoryview

_HEAD = struct.Struct(">qiibIhiqqqhii")
"""Base offset, length, leader epoch, magic, CRC, attributes, last offset delta, first and last
timestamp, producer id and epoch, base sequence, number of records."""
_AFTER_LENGTH = 12
"""Bytes of a batch that its length does not count."""
_LEAST = 26
"""Bytes of the smallest message of the formats before this one."""
_MAGIC, _ATTRIBUTES = 16, 22
"""Where these bytes stand."""
_CODEC = 7

_XERIAL = b"\x82SNAPPY\x00"
_XERIAL_HEAD = 16


class RecordSet:
    """What aiokafka's MemoryRecords is for bytes, for a view; its batches are views again."""

    def __init__(self, records: memoryview) -> None:
        self._size = len(records)
        self._left = records

    def size_in_bytes(self) -> int:
        return self._size

    def has_next(self) -> bool:
        """Whether another whole batch follows: the broker cuts the last one off."""
        return len(self._left) >= max(_AFTER_LENGTH, self._next)

    @property
    def _next(self) -> int:
        return _AFTER_LENGTH + int.from_bytes(self._left[8:_AFTER_LENGTH], signed=True)

    def next_batch(self) -> Any:
        size = self._next
        batch, self._left = self._left[:size], self._left[size:]
        if size < _LEAST or (batch[_MAGIC] >= 2 and size < _HEAD.size):
            raise CorruptRecordException(f"a batch of {size} bytes")
        if batch[_MAGIC] >= 2:
            return DefaultRecordBatch(batch)
        return LegacyRecordBatch(bytes(batch), batch[_MAGIC])


def record_set(records: bytes | memoryview) -> Any:
    """A reader of fetched batches, as aiokafka makes it."""
    return RecordSet(records) if isinstance(records, memoryview) else MemoryRecords(records)


def look(records: Buffer) -> tuple[bool, int]:
    """Whether a fetched batch is compressed, and how many records they all say that they have.

    Cheap: looks at heads only.
    """
    compressed, count = False, 0
    for batch in _batches(records):
        if batch[_MAGIC] == 2 and len(batch) >= _HEAD.size:
            compressed = compressed or _codec(batch) != 0
            count += int(_HEAD.unpack_from(batch)[-1])
    return compressed, count


def any_misread(records: Buffer) -> bool:
    """Whether aiokafka would misread a record of the fetched batches that are not compressed, for
    its attributes. Goes from record to record by their lengths."""
    return any(_misread(batch) for batch in _batches(records) if not _codec(batch))


def _misread(batch: Any) -> bool:
    at = _HEAD.size
    with suppress(IndexError, ValueError):
        while batch[_MAGIC] == 2 and at < len(batch):
            length, at = decode_varint(batch, at)
            if length < 1:
                return False  # no record: left to aiokafka to complain of
            if batch[at] > 0x7F:
                return True
            at += length
    return False


def readable(records: Buffer, wanted: int, mend_names: bool) -> bytes:
    """The same batches, not compressed, and readable each.

    Args:
        wanted: bytes after which further batches are left out; the client asks for them again,
            since its position is behind the last batch that it was given.
        mend_names: also look at all names of headers; see `_mended`.
    """
    made: list[Buffer] = []
    size = 0
    # Anonymous memory: the system gives its pages as they are written, and each only once.
    room = mmap(-1, UNPACKED_MAX)
    for batch in _batches(records):
        if made and size >= wanted:
            break
        plain: Buffer = _unpacked(batch, room) if _codec(batch) else batch
        if batch[_MAGIC] == 2 and (mend_names or _misread(plain)):
            plain = _mended(bytearray(plain))
        made.append(plain)
        size += len(plain)
    return b"".join(made)


def _batches(records: Buffer) -> Iterator[memoryview]:
    """Whole batches only: the broker cuts the last one off where it likes."""
    view, start = memoryview(records), 0
    while start + _LEAST <= len(view):
        (length,) = struct.unpack_from(">i", view, start + 8)
        end = start + _AFTER_LENGTH + length
        if end < start + _LEAST or end > len(view):
            break
        yield view[start:end]
        start = end


def _codec(batch: memoryview) -> int:
    known = batch[_MAGIC] == 2 and len(batch) >= _HEAD.size
    return batch[_ATTRIBUTES] & _CODEC if known else 0


def _unpacked(batch: memoryview, room: mmap) -> bytes:
    head = _HEAD.unpack_from(batch)
    try:
        size = _UNPACK[_codec(batch)](batch[_HEAD.size :], room)
    except KeyError:
        return _stub(head, f"codec {_codec(batch)} is not known")
    except cramjam.DecompressionError as error:
        return _stub(
            head,
            f"the batch of offsets {head[0]} to {head[0] + head[6]} does not unpack within "
            f"{UNPACKED_MAX} bytes: {error}",
        )
    return _packed(head, head[-1], memoryview(room)[:size])


def _stub(head: tuple[int, ...], cause: str) -> bytes:
    """One record without key and value at the base offset, in the place of all."""
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, 0, 2**20)
    headers: list[tuple[str, bytes | None]] = [(UNREADABLE, cause.encode())]
    builder.append(0, timestamp=head[7], key=None, value=None, headers=headers)
    return _packed(head, 1, memoryview(builder.build())[_HEAD.size :])


def _packed(head: tuple[int, ...], count: int, records: Buffer) -> bytes:
    """A batch with the facts of `head` (offsets, transaction) that is not compressed."""
    length = _HEAD.size - _AFTER_LENGTH + len(records)
    made = _HEAD.pack(head[0], length, *head[2:5], head[5] & ~_CODEC, *head[6:-1], count)
    return b"".join((made, records))


def _unpack_snappy(packed: memoryview, room: mmap) -> int:
    """Raw, or in the blocks of the Java library. Returns the bytes unpacked."""
    size: int
    if packed[: len(_XERIAL)] != _XERIAL:
        size = cramjam.snappy.decompress_raw_into(packed, room)
        return size
    at, size = _XERIAL_HEAD, 0
    while at < len(packed):
        end = at + 4 + int.from_bytes(packed[at : at + 4])
        size += cramjam.snappy.decompress_raw_into(packed[at + 4 : end], memoryview(room)[size:])
        at = end
    return size


_UNPACK: dict[int, Callable[[memoryview, mmap], int]] = {
    1: cramjam.gzip.decompress_into,
    2: _unpack_snappy,
    3: cramjam.lz4.decompress_into,
    4: cramjam.zstd.decompress_into,
}


def _mended(batch: bytearray) -> bytearray:
    """Put `?` for every byte above 127 of a header's name that is not UTF-8, and take the high
    bit of attributes away.

    Java's client reads such names too, with replacements of its own; that the length stays
    leaves the rest of the batch as it is. What is no record is left to aiokafka to complain of.
    """
    at = _HEAD.size
    with suppress(IndexError, ValueError):
        while at < len(batch):
            length, at = decode_varint(batch, at)
            end, attributes = at + length, at
            at += 1
            for _ in range(2):  # deltas of timestamp and offset
                _, at = decode_varint(batch, at)
            for _ in range(2):  # key and value
                size, at = decode_varint(batch, at)
                at += max(0, size)
            count, at = decode_varint(batch, at)
            for _ in range(count):
                size, at = decode_varint(batch, at)
                if size < 0 or at + size > end:
                    return batch
                name = batch[at : at + size]
                try:
                    name.decode()
                except UnicodeDecodeError:
                    batch[at : at + size] = bytes(byte if byte < 128 else 0x3F for byte in name)
                size, at = decode_varint(batch, at + size)
                at += max(0, size)
            if at != end:
                return batch
            batch[attributes] &= 0x7F
    return batch
