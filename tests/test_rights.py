"""Which right an error says is missing, and what follows for who is excluded from a group."""

from __future__ import annotations

import pytest
from aiokafka import errors as kafka

from splitferry_protocol.rights import GROUP, TOPIC, TRANSACTIONAL_ID, Right, missing_right

READ = Right("Read", TOPIC, "splits")
RESULTS = Right("Write", TOPIC, "results")
LETTERS = Right("Write", TOPIC, "letters")
MEMBER = Right("Read", GROUP, "group")
FENCE = Right("Write", TRANSACTIONAL_ID, "group/splits/")
ASKED = (READ, RESULTS, LETTERS, MEMBER, FENCE)


def caused(error: Exception) -> Exception:
    """As aiokafka tells what it did not foresee."""
    told = kafka.KafkaError("Unexpected error during batch delivery")
    told.__cause__ = error
    return told


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (kafka.TopicAuthorizationFailedError("letters"), LETTERS),
        (kafka.TopicAuthorizationFailedError({"results"}), RESULTS),
        (kafka.TopicAuthorizationFailedError(), READ),
        (caused(kafka.TopicAuthorizationFailedError()), READ),
        (caused(kafka.TopicAuthorizationFailedError("results")), RESULTS),
        (kafka.GroupAuthorizationFailedError("group"), MEMBER),
        (kafka.TransactionalIdAuthorizationFailed("group/splits/0"), FENCE),
        (kafka.ClusterAuthorizationFailedError(), None),
        (kafka.KafkaTimeoutError(), None),
        (OSError(29, "Illegal seek"), None),
    ],
    ids=repr,
)
def test_the_right_is_found_behind_what_the_client_makes_of_it(
    error: Exception, missing: Right | None
) -> None:
    assert missing_right(error, *ASKED) == missing


def test_a_message_says_what_grants_the_right() -> None:
    assert READ.missing.endswith("--operation Read --topic splits`")
    assert FENCE.missing.startswith("this user has no right to Write on transactional id group/")
    assert "--transactional-id group/splits/ --resource-pattern-type prefixed" in FENCE.missing
    assert Right("IdempotentWrite", "cluster").missing.endswith("--cluster`")
