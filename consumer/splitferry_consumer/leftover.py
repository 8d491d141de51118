"""What Kafka can leave of a transaction that it takes for complete.

A partition that has no leader at the moment when a transaction ends is passed over, as those of a
broker are while it shuts down (KAFKA-20734; seen with Kafka 4.3). Its records are then neither
committed nor aborted: an offset stays pending, results stay hidden, and every later owner would
wait for an end that never comes. The coordinator has forgotten them, so no new epoch ends them.
A further transaction of the same producer id does, in each partition that it is told of.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from .inquiry import Inquiry, Unstable


@dataclass(frozen=True, slots=True)
class Leftover:
    """What is open of a producer's transactions while none is under way."""

    offset: bool
    """The committed offset is pending."""
    results: bool
    """Records in the results partition are hidden."""

    def __bool__(self) -> bool:
        return self.offset or self.results

    @property
    def commits(self) -> bool:
        """How to end it.

        Which end is right, only the ends that Kafka did write can tell. None of them is known, so
        this is the one that loses nothing:

        - A pending offset is aborted, with the results beside it. Committed, it would say that all
          below it is told, while those results may have been aborted. The offset from before leads
          to them once more, and of results that are visible none is told again.
        - Results alone are committed. The offset beside them may have been, and then nobody would
          come to tell them again. No other owner has told them: none can take the partition
          while it cannot read its results.
        """
        return not self.offset


async def leftover(
    inquiry: Inquiry,
    producer: AIOKafkaProducer,
    group: str,
    source: TopicPartition,
    results: TopicPartition,
) -> Leftover:
    """Ask for it. Raises TransportError."""
    hidden = await inquiry.transaction_open(results, producer._txn_manager.producer_id)
    try:
        await inquiry.committed(group, source)
    except Unstable:
        return Leftover(True, hidden)
    return Leftover(False, hidden)


async def end_leftover(
    left: Leftover,
    producer: AIOKafkaProducer,
    group: str,
    source: TopicPartition,
    results: TopicPartition,
) -> None:
    """End it. Afterwards only the logs can tell how things stand. Raises KafkaError."""
    await producer.begin_transaction()
    if left.results:
        producer._txn_manager.maybe_add_partition_to_txn(results)
    if left.commits:
        await producer.commit_transaction()
    else:
        # Only so aiokafka tells of the group; it is aborted whatever happens from here on.
        await producer.send_offsets_to_transaction({source: OffsetAndMetadata(0, "")}, group)
        await producer.abort_transaction()
