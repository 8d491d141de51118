"""Dead letters as values, and how their bytes are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_transport import DEAD_LETTERS, RESULTS, SPLITS, TOPIC_IDS, Kafka, MemoryTransport
from splitferry_cli.dump import SHOWN, brief, cut, hex_dump
from splitferry_cli.output import local_time
from splitferry_cli.requeue import impossible, useless
from splitferry_consumer import ledger
from splitferry_consumer.dead_letters import (
    PREFIX,
    REQUEUED,
    REQUEUED_TO,
    Letter,
    Position,
    Requeued,
    read_letter,
)
from splitferry_consumer.publisher import Publisher
from splitferry_consumer.transport import Outgoing, Record
from splitferry_protocol.codec import crc_header, encode_split
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Input, Result, Split, Status
from workload import origin

AT = Position(3, 12)
SPLIT = Split(RequestId(7, 42), "a", 1, Block.FILE, 0, 0, 4, b"abcd")
VALUE = encode_split(SPLIT)


async def published(stubs: int = 0, **record: Any) -> Record:
    """What a consumer writes for a record at offset 9 of partition 0."""
    dead = Record(9, **{"key": b"7-42", "value": b"?", "timestamp": 77, **record})
    letter = ledger.DeadLetter(9, RequestId(7, 42), dead, "SomeCode", "some cause")
    writer = await MemoryTransport(Kafka()).writer(0)
    publisher = Publisher(writer, (SPLITS, 0), RESULTS, DEAD_LETTERS, {9: stubs}, TOPIC_IDS)
    out = publisher._dead_letter(letter)
    return Record(AT.offset, out.key, out.value, out.headers, timestamp=88)


async def letter(**record: Any) -> Letter:
    found = read_letter(AT.partition, await published(**record))
    assert isinstance(found, Letter)
    return found


async def test_what_the_consumer_writes_is_read_back() -> None:
    own = [("crc32c", b"\1\2\3\4"), ("twice", b"a"), ("twice", b"b")]
    found = await letter(headers=own, value=b"value")
    assert found == Letter(
        AT, 88, SPLITS, Position(0, 9), "SomeCode", "some cause", 77, b"7-42", b"value", own
    )
    assert found.request == RequestId(7, 42)
    assert found.outgoing == Outgoing(SPLITS, 0, b"7-42", b"value", own)


async def test_headers_of_the_sender_that_look_like_ours_are_its_own() -> None:
    forged = [(PREFIX + "topic", b"elsewhere"), (PREFIX + "offset", b"1"), (REQUEUED, b"3:12")]
    found = await letter(headers=forged)
    assert found.topic == SPLITS
    assert found.source == Position(0, 9)
    assert found.headers == forged


@pytest.mark.parametrize("stubs", [1, 2])
async def test_a_stub_has_nothing_to_send(stubs: int) -> None:
    found = await letter(stubs=stubs)
    assert found.is_stub
    assert "was not kept" in (impossible(found, SPLITS, 1) or "")


async def test_a_key_that_is_no_request_names_none() -> None:
    assert (await letter(key=b"\xff")).request is None
    assert (await letter(key=None)).request is None


def test_a_note_is_read_back_and_names_its_letter() -> None:
    note = Requeued(AT, Position(1, 99), 5)
    out = note.outgoing("letters")
    assert (out.topic, out.partition, out.key, out.value) == ("letters", 3, None, b"")
    assert read_letter(3, Record(50, out.key, out.value, out.headers, timestamp=5)) == note


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(PREFIX + "topic", b"t")],
        [(REQUEUED, b"3:12")],
        [(REQUEUED, b"3:12"), (REQUEUED_TO, b"1:")],
        [(REQUEUED, b"\xff"), (REQUEUED_TO, b"1:2")],
        origin(SPLITS, -1, 5),
        origin(SPLITS, 1, -5),
        [
            *[(PREFIX + name, b"x") for name in ("topic", "partition", "offset")],
            *[(PREFIX + f"exception.{name}", b"x") for name in ("class.name", "message")],
            (PREFIX + "timestamp", b"x"),
        ],
    ],
)
def test_what_others_wrote_is_neither(headers: list[tuple[str, bytes]]) -> None:
    assert read_letter(0, Record(1, b"k", b"v", headers)) is None


@pytest.mark.parametrize(
    "text", ["", "1", ":", "1:", ":1", "-1:2", "1:-2", "1:2:3", "a:1", "1: 2", "٣:1", f"0:{2**63}"]
)
def test_a_place_has_one_form(text: str) -> None:
    with pytest.raises(ValueError, match="PARTITION:OFFSET"):
        Position.parse(text)


def test_a_place_is_read_as_it_is_written() -> None:
    assert Position.parse(str(AT)) == AT


# ---- what cannot be sent again, and what need not be


async def test_only_what_came_from_this_topic_and_its_partitions_is_sent() -> None:
    valid = await letter(value=VALUE, headers=[crc_header(VALUE)])
    assert impossible(valid, SPLITS, 1) is None
    assert "--splits-topic" in (impossible(valid, "other", 1) or "")
    moved = replace(valid, source=Position(5, 1))
    assert "has 5 now" in (impossible(moved, SPLITS, 5) or "")


async def test_what_is_valid_and_open_is_worth_sending() -> None:
    valid = await letter(value=VALUE, headers=[crc_header(VALUE)])
    assert useless(valid, None) is None


async def test_what_is_invalid_still_would_die_again() -> None:
    damaged = await letter(value=VALUE[:-1] + b"?", headers=[crc_header(VALUE)])
    assert "CRC-32C" in (useless(damaged, None) or "")


async def test_a_request_that_has_ended_hears_no_record() -> None:
    ended = Result(
        SPLIT.request, "a", 1, Block.FILE, None, "g", Status.COMPLETED, None, 4, bytes(32),
        {"path": "a"}, 1, 0, Input(SPLITS, 0, 0, 0), None, False, 1,
    )  # fmt: skip
    valid = await letter(value=VALUE, headers=[crc_header(VALUE)])
    assert "request 7-42 has ended as completed" in (useless(valid, ended) or "")


# ---- bytes on a terminal


@pytest.mark.parametrize("moment", [10**15, -(10**15), 10**40])
def test_a_time_that_is_in_no_calendar_is_told_as_its_number(moment: int) -> None:
    assert local_time(moment) == str(moment)


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_a_dump_shows_every_byte_once_and_steers_nothing(value: bytes, most: int) -> None:
    rows = list(hex_dump(value, most))
    assert all(row.isprintable() for row in rows)
    shown = b"".join(bytes.fromhex(row[10:58]) for row in rows if row[0] != "…")
    assert shown == value[:most]
    left = [row for row in rows if row[0] == "…"]
    assert left == ([f"… {len(value) - most} bytes more"] if len(value) > most else [])


@given(st.binary(max_size=3000) | st.none())
def test_a_brief_form_is_one_short_line_that_steers_nothing(value: bytes | None) -> None:
    assert brief(value).isprintable()
    assert len(brief(value)) < SHOWN + 30


def test_a_brief_form_is_text_where_it_can_be() -> None:
    assert brief(b"7-42") == "7-42"
    assert brief(b"\x1b[2J") == "hex 1b5b324a"
    assert brief(b"") == "empty"
    assert brief(None) == "none"
    assert cut("\x1b]0;", "4") == "\\x1b]0;"
