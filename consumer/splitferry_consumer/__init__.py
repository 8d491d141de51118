"""The receiving side: `Service`, its settings, and what a handler is given."""

from splitferry_protocol.connection import ConnectionSettings

from .segment import attach
from .service import Phase, Service, Settings, StartError
from .targets.handler import Handler, ReceivedItem

__all__ = [
    "ConnectionSettings",
    "Handler",
    "Phase",
    "ReceivedItem",
    "Service",
    "Settings",
    "StartError",
    "attach",
]
