"""One transaction per batch: results, what is told besides them, and the offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import structlog

from splitferry_protocol.codec import encode_accepted, encode_result
from splitferry_protocol.records import Accepted

from .bookmark import TopicIds
from .dead_letters import PREFIX
from .ledger import Batch, DeadLetter, Ledger, Told
from .transport import Outgoing, TooLarge, TopicUnusable, Writer

log = structlog.get_logger(__name__)


class Publisher:
    """Speaks for one splits partition, in the order in which its ledger gathers."""

    def __init__(
        self,
        writer: Writer,
        source: tuple[str, int],
        results_topic: str,
        dead_letters_topic: str,
        stubs: dict[int, int],
        topics: TopicIds,
    ) -> None:
        """`stubs`: how often the dead letter of an offset was too large; it outlives the
        publisher, since a refused transaction makes the partition be taken again.
        `topics`: what the committed offsets are offsets in."""
        self._writer = writer
        self._source = source
        self._results_topic = results_topic
        self._dead_letters_topic = dead_letters_topic
        self._stubs = stubs
        self._topics = topics

    async def publish(self, ledger: Ledger, batch: Batch) -> None:
        """Publish `batch` and tell the ledger. Every exception means: retake the partition."""
        partition = self._source[1]
        records = [
            Outgoing(self._results_topic, partition, result.request.key, value)
            for result, value in zip(batch.results, batch.values, strict=True)
        ]
        records += [self._event(event) for event in batch.events]

        def results(offsets: Sequence[int]) -> Sequence[int]:
            # Events follow them, and dead letters lie in another topic.
            return offsets[: len(batch.results)]

        def commit(offsets: Sequence[int]) -> tuple[int, str]:
            bookmark = replace(ledger.bookmark(batch, results(offsets)), topics=self._topics)
            return bookmark.watermark, bookmark.metadata

        try:
            offsets = await self._writer.publish(records, commit)
        except TooLarge as refusal:
            letters = [self._note_refused(batch, index) for index in refusal.indexes]
            if all(letters):
                raise
            raise TopicUnusable(
                f"results are larger than topic {self._results_topic} takes: raise its "
                "max.message.bytes to 256 KiB or more"
            ) from refusal
        ledger.published(batch, results(offsets))

    async def settle(self) -> None:
        """As `Writer.settle`."""
        await self._writer.settle()

    async def close(self) -> None:
        await self._writer.close()

    def _event(self, event: Told | DeadLetter) -> Outgoing:
        if isinstance(event, DeadLetter):
            return self._dead_letter(event)
        told = event.event
        value = encode_accepted(told) if isinstance(told, Accepted) else encode_result(told)
        return Outgoing(self._results_topic, self._source[1], told.request.key, value)

    def _dead_letter(self, letter: DeadLetter) -> Outgoing:
        record = letter.record
        about = {
            "topic": self._source[0],
            "partition": str(self._source[1]),
            "offset": str(letter.offset),
            "exception.class.name": letter.code,
            "exception.message": letter.message,
            "timestamp": str(record.timestamp),
        }
        headers = [
            *record.headers,
            *((PREFIX + name, text.encode("utf-8", "replace")) for name, text in about.items()),
        ]
        match self._stubs.get(letter.offset, 0):
            case 0:
                # aiokafka sends no record that has neither key nor value.
                value = b"" if record.key is None and record.value is None else record.value
                return Outgoing(self._dead_letters_topic, None, record.key, value, headers)
            case 1:
                return Outgoing(self._dead_letters_topic, None, record.key, b"", headers)
            case _:  # its own headers, or its key, are too much
                bare = headers[len(record.headers) :]
                return Outgoing(self._dead_letters_topic, None, None, b"", bare)

    def _note_refused(self, batch: Batch, index: int) -> bool:
        """Whether it is a dead letter, for which there is a stub."""
        event = batch.events[index - len(batch.results)] if index >= len(batch.results) else None
        if isinstance(event, DeadLetter):
            log.warning(
                "dead letter too large for its topic, a stub takes its place",
                topic=self._dead_letters_topic,
                partition=self._source[1],
                offset=event.offset,
                size=len(event.record.value or b""),
                remedy="raise its max.message.bytes 64 KiB above that of the splits topic",
            )
            self._stubs[event.offset] = self._stubs.get(event.offset, 0) + 1
        return isinstance(event, DeadLetter)
