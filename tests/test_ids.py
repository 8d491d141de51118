from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitferry_protocol.ids import U32_MAX, U64_MAX, RequestId

node_ids = st.integers(0, U32_MAX)
sequences = st.integers(0, U64_MAX)


@settings(deadline=None)
@given(node_ids, sequences)
def test_every_id_comes_back_from_its_key_and_from_its_wire_form(node: int, sequence: int) -> None:
    request = RequestId(node, sequence)
    assert RequestId.from_key(request.key) == request
    assert RequestId.parse(str(request)) == request
    assert RequestId.from_wire(list(request)) == request


def test_the_key_is_the_two_numbers_in_plain_decimals() -> None:
    assert RequestId(7, 42).key == b"7-42"
    assert RequestId(U32_MAX, U64_MAX).key == b"4294967295-18446744073709551615"


@pytest.mark.parametrize(
    "key",
    [
        None,
        b"",
        b"7",
        b"7-",
        b"-42",
        b"7-42-1",
        b"07-42",
        b"7-042",
        b"+7-42",
        b"7--42",
        b"7- 42",
        b" 7-42",
        b"7-42\n",
        b"7_0-42",
        b"0x7-42",
        b"4294967296-0",
        b"0-18446744073709551616",
        b"\xef\xbc\x97-42",
        b"7-\xe0\xa5\xaa",
        b"7-42\xff",
    ],
)
def test_any_other_form_of_a_key_is_refused(key: bytes | None) -> None:
    with pytest.raises(ValueError, match=r"key|request id"):
        RequestId.from_key(key)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "7-42",
        7,
        [],
        [7],
        [7, 42, 1],
        (7, 42),
        {0: 7, 1: 42},
        [True, 42],
        [7, False],
        [7.0, 42],
        ["7", "42"],
        [-1, 42],
        [7, -1],
        [U32_MAX + 1, 0],
        [0, U64_MAX + 1],
        [[7], 42],
    ],
)
def test_any_other_wire_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="request"):
        RequestId.from_wire(value)
