"""Which partition a request opens in (WIRE, "Topics")."""

from __future__ import annotations

from aiokafka.partitioner import murmur2


def partition_for(key: bytes, partitions: int) -> int:
    """Kafka's default choice for a record with a key: a number from 0 to `partitions` - 1.

    Raises:
        ValueError: there is no partition to choose.
    """
    if partitions < 1:
        raise ValueError(f"a topic has at least one partition, not {partitions}")
    hash_of_key: int = murmur2(key)
    return (hash_of_key & 0x7FFFFFFF) % partitions
