"""The sending side: `Producer` and the sources of what it sends."""

from splitferry_protocol.connection import ConnectionSettings

from .errors import (
    DeliveryFailed,
    InvalidItem,
    ItemTooLarge,
    LoginRefused,
    MissingRights,
    NoBroker,
    ProducerError,
    SourceChanged,
    SourceError,
    SplitTooLarge,
    StateError,
    TimedOut,
    TooFewPartitions,
    UnknownTopic,
)
from .folder import FolderFile, Listing, list_folder
from .producer import Producer, Sent
from .sources import DataItemSource, FileSource, MemorySource, StreamSource

__all__ = [
    "ConnectionSettings",
    "DataItemSource",
    "DeliveryFailed",
    "FileSource",
    "FolderFile",
    "InvalidItem",
    "ItemTooLarge",
    "Listing",
    "LoginRefused",
    "MemorySource",
    "MissingRights",
    "NoBroker",
    "Producer",
    "ProducerError",
    "Sent",
    "SourceChanged",
    "SourceError",
    "SplitTooLarge",
    "StateError",
    "StreamSource",
    "TimedOut",
    "TooFewPartitions",
    "UnknownTopic",
    "list_folder",
]
