"""Rights on a broker, as Kafka's ACLs have them: which one an answer says is missing.

The broker tells the kind of resource and nothing more; the operation and the name are known
only to who asked.
"""

from __future__ import annotations

from typing import NamedTuple

TOPIC, GROUP, CLUSTER, TRANSACTIONAL_ID = "topic", "group", "cluster", "transactional id"

_REFUSED = {29: TOPIC, 30: GROUP, 31: CLUSTER, 53: TRANSACTIONAL_ID}
"""Kinds of resource by Kafka's error codes."""


class Right(NamedTuple):
    """An operation on a resource. A name that ends with `/` stands for all that begin so.

    Attributes:
        operation: as Kafka calls it: Read, Write, Describe and so on.
        resource: topic, group, cluster or transactional id.
        name: of the resource; empty for the cluster.
    """

    operation: str
    resource: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.operation} on {self.resource} {self.name}".rstrip()

    @property
    def missing(self) -> str:
        """One line for people: that it is missing, and what grants it."""
        option = "--" + self.resource.replace(" ", "-")
        value = f" {self.name}" if self.name else ""
        pattern = " --resource-pattern-type prefixed" if self.name.endswith("/") else ""
        return (
            f"this user has no right to {self}: grant it, as with `kafka-acls.sh --add "
            f"--allow-principal User:NAME --operation {self.operation} {option}{value}{pattern}`"
        )


def missing_right(error: BaseException | None, *asked: Right) -> Right | None:
    """That of the rights `asked` for which `error`, or what caused it, says is missing.

    Where several fit, as for two topics, it is the one that the error names, else the first.
    """
    while error is not None:
        # The errno of an OSError is another list.
        code = None if isinstance(error, OSError) else getattr(error, "errno", None)
        kind = _REFUSED.get(code or 0)
        fitting = [right for right in asked if right.resource == kind]
        named = [right for right in fitting if any(_names(told, right) for told in error.args)]
        if fitting:
            return (named or fitting)[0]
        error = error.__cause__
    return None


def _names(told: object, right: Right) -> bool:
    """aiokafka tells one topic, or a set of them."""
    return right.name in told if isinstance(told, (set, frozenset)) else right.name == told
