"""What went wrong, in one line that names the remedy, and the exit code to go with it."""

from __future__ import annotations

import errno
import ssl

import click
from aiokafka import errors as kafka

from splitferry_consumer.service import StartError
from splitferry_consumer.transport import TransportError
from splitferry_producer import ProducerError

NO_BROKER = (
    "no Kafka broker answers at {servers}: start one with `splitferry broker`, "
    "or name yours with --bootstrap-servers"
)


class Failure(click.ClickException):
    """Something failed that the user can be told in one line. Exit code 1."""

    def format_message(self) -> str:
        return " ".join(self.message.split())


def usage(error: click.UsageError) -> str:
    """One line for wrong usage: what is wrong, and where the right one is explained."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if error.ctx is None:
        return message
    return f"{message} (see `{error.ctx.command_path} --help`)"


def first(error: BaseException) -> BaseException:
    """What went wrong first, where a group of tasks tells it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def explain(error: BaseException, servers: str) -> str | None:
    """One line about `error` for people; None for one that nobody foresaw.

    Args:
        servers: the bootstrap servers in use.
    """
    error = first(error)
    match error:
        case ProducerError():
            return error.message
        case TransportError() | StartError():
            return str(error)
        case kafka.SaslAuthenticationFailed() | kafka.AuthenticationFailedError():
            return "the broker refused the login: check --sasl-username and --sasl-password-file"
        case kafka.UnsupportedSaslMechanismError() | kafka.AuthenticationMethodNotSupported():
            return f"the broker does not take this --sasl-mechanism: {error}"
        case (
            kafka.KafkaConnectionError()
            | kafka.NodeNotReadyError()
            | kafka.NoBrokersAvailable()
            | kafka.KafkaUnavailableError()
            | ConnectionError()
        ):
            return NO_BROKER.format(servers=servers)
        case kafka.UnknownTopicOrPartitionError():
            return f"{_said(error, 'a topic does not exist')}: `splitferry topics create` makes it"
        case (
            kafka.TopicAuthorizationFailedError()
            | kafka.GroupAuthorizationFailedError()
            | kafka.ClusterAuthorizationFailedError()
            | kafka.TransactionalIdAuthorizationFailed()
        ):
            return (
                f"the broker does not allow this ({_said(error, type(error).__name__)}): "
                "give the user the rights to the topics, the group and its transactional ids"
            )
        case kafka.InvalidTopicError():
            return f"{_said(error, 'a topic name is not valid')}: use letters, digits, . _ and -"
        case kafka.MessageSizeTooLargeError():
            return "a split is larger than the splits topic takes: see `splitferry topics check`"
        case kafka.KafkaTimeoutError() | kafka.RequestTimedOutError() | TimeoutError():
            return f"the broker at {servers} did not answer in time"
        case kafka.KafkaError():
            return f"Kafka: {_said(error, str(error))}"
        case ssl.SSLError():
            return f"TLS: {error}: check --ssl-cafile, --ssl-certfile and --ssl-keyfile"
        case OSError():
            return _system(error)
    return None


def told(error: BaseException, servers: str) -> str:
    """One line about `error`, also where nobody foresaw it."""
    error = first(error)
    said = explain(error, servers)
    if said is None:
        said = f"unexpected {type(error).__name__}: {error} (--verbose shows where)"
    return " ".join(said.split())


def _said(error: BaseException, otherwise: str) -> str:
    return str(error.args[0]) if error.args else otherwise


def _system(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{name}the disk is full ({reason}): make room and run the command again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{name}{reason}: give this user the right, or choose another place"
    return f"{name}{reason}"
