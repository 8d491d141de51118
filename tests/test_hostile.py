"""Hostile records: each is read, or refused as it is written in the corpus, at little cost."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import pytest

from hostile import Case, cases
from splitferry_protocol.codec import InvalidRecord, decode_record
from splitferry_protocol.errors import TEXT_MAX
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Abort, Split

REQUEST = RequestId(7, 42)
MEMORY_MAX = 256 * 1024
"""Bytes: a header of 8 KiB in which each byte is an object."""
TIME_MAX = 1.0
"""Seconds, on a busy machine; the slowest takes some milliseconds."""


def read(case: Case) -> tuple[str | None, bool]:
    """The code (None: the record was read) and whether it is tied."""
    told: Split | Abort | InvalidRecord
    try:
        told = decode_record(case.key, case.value, case.headers)
    except InvalidRecord as invalid:
        told = invalid
    assert told.request in (None, REQUEST)
    if isinstance(told, InvalidRecord):
        assert told.error().code == told.code
        # It travels in a header of the dead letter, which also a stub keeps.
        assert len(told.message.encode()) <= TEXT_MAX
    code = told.code if isinstance(told, InvalidRecord) else None
    return code, told.request == REQUEST


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_each_is_what_the_corpus_says(large: bool) -> None:
    wrong = [
        f"{case.name}: {said}"
        for case in cases(REQUEST)
        if case.large is large and (said := read(case)) != (case.code, case.tied)
    ]
    assert wrong == []


def test_each_costs_little_time_and_memory() -> None:
    for case in cases(REQUEST):
        read(case)
        tracemalloc.start()
        began = time.thread_time()
        read(case)
        seconds = time.thread_time() - began
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_MAX, case.name
        assert seconds < TIME_MAX, case.name


def test_every_kind_is_there_under_a_name_of_its_own() -> None:
    names = Counter(case.name for case in cases(REQUEST))
    assert max(names.values()) == 1, names.most_common(3)
    kinds = Counter((case.code, case.tied) for case in cases(REQUEST))
    assert len(names) > 500
    assert set(kinds) == {
        (None, True),
        ("BatchTransferError", True),
        ("BatchTransferError", False),
        ("SplitTaskFailed", True),
    }
