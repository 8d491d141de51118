"""Batches and requests as the producer makes them: read by aiokafka's own code."""

from __future__ import annotations

import time

import pytest
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.protocol.produce import ProduceRequest_v7
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from splitferry_producer.client import RecordBatch, _Produce

_RECORDS = st.lists(
    st.tuples(
        st.binary(max_size=80),
        st.binary(max_size=300) | st.integers(0, 2**17).map(bytes),
        st.lists(st.tuples(st.text(max_size=9), st.binary(max_size=130)), max_size=3),
    ),
    min_size=1,
    max_size=200,
)


def filled(records: list[tuple[bytes, bytes, list[tuple[str, bytes]]]]) -> RecordBatch:
    batch = RecordBatch(2**30)
    for number, (key, value, headers) in enumerate(records):
        place = batch.append(timestamp=None, key=key, value=value, headers=headers)
        assert place is not None
        assert place.offset == number
    batch._set_producer_state(2**40 + 1, 7, 2**31 - 1)
    return batch


@given(_RECORDS)
def test_a_batch_is_what_aiokafka_reads(
    records: list[tuple[bytes, bytes, list[tuple[str, bytes]]]],
) -> None:
    batch = filled(records)
    value = b"".join(batch.parts())
    assert len(value) == batch.size()
    read = DefaultRecordBatch(value)
    assert read.validate_crc()
    assert (read.producer_id, read.producer_epoch, read.base_sequence) == (
        2**40 + 1,
        7,
        2**31 - 1,
    )
    assert not read.is_transactional
    assert abs(read.first_timestamp - time.time() * 1000) < 60_000
    assert read.max_timestamp == read.first_timestamp
    assert read.next_offset == len(records) == batch.record_count()
    told = [(record.key, record.value, list(record.headers)) for record in read]
    assert told == records


def test_a_request_is_aiokafkas_byte_for_byte() -> None:
    batch, other = filled([(b"7-1", b"value", [])]), filled([(b"7-2", bytes(2**20), [])])
    topics = [("splits", [(0, batch), (63, other)])]
    whole = [("splits", [(number, b"".join(made.parts())) for number, made in topics[0][1]])]
    ours = _Produce(None, -1, 40_000, topics)
    assert ours.encode() == ProduceRequest_v7(None, -1, 40_000, whole).encode()


def test_a_retry_sends_the_same_bytes() -> None:
    batch = filled([(b"7-1", b"value", [("crc32c", b"1234")])])
    first = b"".join(batch._build().parts())
    assert b"".join(batch._build().parts()) == first
    assert batch.append(timestamp=None, key=b"7-1", value=b"late") is None


@pytest.mark.parametrize("value", [b"", bytes(100), bytes(1000)])
def test_a_batch_fills_up_as_aiokafkas_does(value: bytes) -> None:
    ours, theirs = RecordBatch(700), BatchBuilder(700, 0)
    for _ in range(50):
        told = [
            batch.append(timestamp=None, key=b"7-42", value=value, headers=[("crc32c", b"1234")])
            for batch in (ours, theirs)
        ]
        assert (told[0] is None) == (told[1] is None)
        assert ours.closed() == theirs.closed()
    assert ours.record_count() == theirs.record_count()
