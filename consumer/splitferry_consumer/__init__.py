"""The receiving side: `Consumer`, its settings, and what a handler is given."""

from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.records import Result, Status

from .consumer import Consumer
from .segment import attach
from .service import Settings, StartError
from .targets.handler import Handler, ReceivedItem

__all__ = [
    "ConnectionSettings",
    "Consumer",
    "Handler",
    "ReceivedItem",
    "Result",
    "Settings",
    "StartError",
    "Status",
    "attach",
]
