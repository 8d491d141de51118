"""What each package exports: a name that comes or goes here is a promise made or broken."""

from __future__ import annotations

import importlib
import pkgutil
import types

import pytest

EXPORTED = {
    "splitferry_protocol": """
        Abort Accepted BatchTransferError BatchTransferFailed BatchTransferNotFound Block Input
        InvalidRecord RequestId RequestKey Result Split SplitTaskFailed Status VersionMismatch
        WriteDataFailed WsDataError crc_header decode_outcome decode_record encode_abort
        encode_accepted encode_result encode_split error_from_wire partition_for path_problem
    """,
    "splitferry_producer": """
        ConnectionSettings DataItemSource DeliveryFailed FileSource FolderFile InvalidItem
        ItemTooLarge Listing LoginRefused MemorySource MissingRights NoBroker Producer
        ProducerError Result ResultFeed Sent SourceChanged SourceError SplitTooLarge StateError
        Status StreamSource TimedOut TooFewPartitions UnknownTopic list_folder
    """,
    "splitferry_consumer": """
        ConnectionSettings Consumer Handler ReceivedItem Result Settings StartError Status attach
    """,
    "splitferry_cli": "",
}


def modules() -> list[str]:
    """All modules of the distribution; `__main__` modules run, so they are left out."""
    return [
        module.name
        for package in EXPORTED
        for module in pkgutil.walk_packages(
            importlib.import_module(package).__path__, f"{package}."
        )
        if not module.name.endswith("__main__")
    ]


@pytest.mark.parametrize("package", EXPORTED)
def test_what_a_package_exports(package: str) -> None:
    module = importlib.import_module(package)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert list(getattr(module, "__all__", [])) == EXPORTED[package].split()
    assert public == set(EXPORTED[package].split())


@pytest.mark.parametrize("name", modules())
def test_every_module_can_be_imported_and_has_what_it_exports(name: str) -> None:
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    assert [one for one in exported if not hasattr(module, one)] == []
    assert len(exported) == len(set(exported))
