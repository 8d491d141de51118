"""The sending side: `Producer`, the sources of what it sends, and `ResultFeed`."""

from splitferry_protocol.connection import ConnectionSettings
from splitferry_protocol.records import Result, Status
from splitferry_protocol.rights import Right

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
from .results import ResultFeed
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
    "Result",
    "ResultFeed",
    "Right",
    "Sent",
    "SourceChanged",
    "SourceError",
    "SplitTooLarge",
    "StateError",
    "Status",
    "StreamSource",
    "TimedOut",
    "TooFewPartitions",
    "UnknownTopic",
    "list_folder",
]
