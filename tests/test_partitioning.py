from __future__ import annotations

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from splitferry_protocol.partitioning import partition_for

# Apache Kafka, clients/src/test/java/org/apache/kafka/common/utils/UtilsTest.java, testMurmur2.
JAVA = [
    (b"21", -973932308),
    (b"foobar", -790332482),
    (b"a-little-bit-long-string", -985981536),
    (b"a-little-bit-longer-string", -1486304829),
    (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
    (b"abc", 479470107),
]


@pytest.mark.parametrize(("key", "murmur2"), JAVA)
@pytest.mark.parametrize("partitions", [1, 2, 3, 12, 50, 1000, 2**31 - 1])
def test_the_partition_is_the_one_that_java_chooses(
    key: bytes, murmur2: int, partitions: int
) -> None:
    # BuiltInPartitioner.partitionForKey: toPositive(murmur2(key)) % numPartitions
    assert partition_for(key, partitions) == (murmur2 & 0x7FFFFFFF) % partitions


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(1, 200))
def test_it_agrees_with_the_default_partitioner_of_the_client(key: bytes, partitions: int) -> None:
    every = list(range(partitions))
    assert partition_for(key, partitions) == DefaultPartitioner()(key, every, every)


@pytest.mark.parametrize("partitions", [0, -1])
def test_there_must_be_a_partition(partitions: int) -> None:
    with pytest.raises(ValueError, match="at least one partition"):
        partition_for(b"7-42", partitions)
