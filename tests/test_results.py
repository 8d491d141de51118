"""Reading results: who waits for them, and what is passed over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition

from splitferry_producer import results
from splitferry_protocol.codec import encode_result
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Input, Result, Status

NAME = RequestId(7, 42)
RESULT = Result(
    NAME, "x", 1, Block.FILE, None, "g", Status.COMPLETED, None, 0, bytes(32), {"path": "x"},
    1, 0, Input("s", 0, 0, 0), None, False, 1,
)  # fmt: skip


class Log:
    """A consumer of one partition. What is None there cannot be decoded."""

    def __init__(self, *values: bytes | None) -> None:
        self.values = [*values]
        self.at = 0

    async def end_offsets(self, wanted: Any) -> Any:
        return dict.fromkeys(wanted, 0)

    def assign(self, wanted: Any) -> None: ...

    def seek(self, where: TopicPartition, offset: int) -> None:
        self.at = offset

    async def getmany(self, *_: Any, timeout_ms: int, max_records: int = 500) -> Any:
        found: list[Any] = []
        while self.at < len(self.values) and len(found) < max_records:
            value, offset, self.at = self.values[self.at], self.at, self.at + 1
            if value is None:
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            found.append(ConsumerRecord("r", 0, offset, 1, 0, NAME.key, value, None, 3, 3, ()))
        await asyncio.sleep(0 if found else 0.01)
        return {TopicPartition("r", 0): found} if found else {}

    async def stop(self) -> None: ...


async def test_two_may_wait_for_the_result_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender, and who aborts it by the same producer."""
    log = Log()
    monkeypatch.setattr(results, "_reader", lambda *_, **__: log)
    reader = results.ResultReader({"bootstrap_servers": "127.0.0.1:1"}, "r")
    both = [await reader.expect(NAME, 0) for _ in range(2)]
    log.values.append(encode_result(RESULT))
    try:
        assert await asyncio.wait_for(asyncio.gather(*both), 20) == [RESULT, RESULT]
    finally:
        await reader.close()


async def test_a_result_behind_a_record_that_cannot_be_decoded_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log()
    monkeypatch.setattr(results, "_reader", lambda *_, **__: log)
    reader = results.ResultReader({"bootstrap_servers": "127.0.0.1:1"}, "r")
    result = await reader.expect(NAME, 0)
    log.values += [b"garbage", None, encode_result(RESULT)]
    try:
        assert await asyncio.wait_for(result, 20) == RESULT
    finally:
        await reader.close()
