"""What can go wrong on the sending side, under one root. Each message is one line for people.

What becomes of a request at the consumer is told by its result, not by these.
"""

from __future__ import annotations

from splitferry_protocol.ids import RequestId
from splitferry_protocol.rights import Right


class ProducerError(Exception):
    """Root: one line that names the cause and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidItem(ProducerError, ValueError):
    """The unique id, labels, version or reply is not one that the contract allows."""


class NoBroker(ProducerError):
    """No broker answers, or none confirms what was sent."""


class LoginRefused(ProducerError):
    """The broker refused the user, the password or the mechanism."""


class UnknownTopic(ProducerError):
    """The topic does not exist.

    Attributes:
        topic: its name.
    """

    def __init__(self, topic: str) -> None:
        super().__init__(
            f"topic {topic} does not exist: create it with `splitferry topics create`, "
            "or give the name of yours"
        )
        self.topic = topic


class TooFewPartitions(ProducerError):
    """The results topic has fewer partitions than the splits topic (WIRE, "Topics")."""


class MissingRights(ProducerError):
    """The brokers do not allow this user what it takes.

    Attributes:
        right: what is missing; the message has the command that grants it.
    """

    def __init__(self, right: Right, note: str = "") -> None:
        super().__init__(right.missing + note)
        self.right = right


class DeliveryFailed(ProducerError):
    """The broker answered, but refused a record."""


class SplitTooLarge(ProducerError):
    """The configured split size is more than the splits topic takes."""


class ItemTooLarge(ProducerError):
    """The item would need more splits than fit safely below the horizon."""


class TimedOut(ProducerError, TimeoutError):
    """No result in time; the message tells whether an abort record was sent.

    Attributes:
        request: the request without a result.
        timeout: s that were waited.
    """

    def __init__(self, request: RequestId, timeout: float, state: str) -> None:
        super().__init__(f"request {request} has no result after {timeout:g} s; {state}")
        self.request = request
        self.timeout = timeout


class SourceError(ProducerError):
    """The item cannot be read.

    Attributes:
        name: what the source calls it.
    """

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name} {cause}")
        self.name = name


class SourceChanged(SourceError):
    """The item changed while it was read."""

    def __init__(self, name: str, change: str) -> None:
        super().__init__(name, f"changed while it was sent ({change}): send it again")


class StateError(ProducerError):
    """The state directory, where sequences are kept, cannot be used."""
