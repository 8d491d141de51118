"""What a program may import: a name that comes or goes here is a promise made or broken."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PUBLIC = {
    "splitferry_protocol": """
        Abort Accepted BatchTransferError BatchTransferFailed BatchTransferNotFound Block Input
        InvalidRecord RequestId RequestKey Result Split SplitTaskFailed Status VersionMismatch
        WriteDataFailed WsDataError crc_header decode_outcome decode_record encode_abort
        encode_accepted encode_result encode_split error_from_wire partition_for path_problem
    """,
    "splitferry_producer": """
        ConnectionSettings DataItemSource DeliveryFailed FileSource FolderFile InvalidItem
        ItemTooLarge Listing LoginRefused MemorySource MissingRights NoBroker Producer
        ProducerError Result ResultFeed Right Sent SourceChanged SourceError SplitTooLarge
        StateError Status StreamSource TimedOut TooFewPartitions UnknownTopic list_folder
    """,
    "splitferry_consumer": """
        ConnectionSettings Consumer Handler ReceivedItem Result Settings StartError Status attach
    """,
}
EXPORTED = PUBLIC | {"splitferry_cli": ""}
NAMES = [(package, name) for package in PUBLIC for name in PUBLIC[package].split()]


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


def folder(package: str) -> Path:
    return Path(str(importlib.import_module(package).__file__)).parent


def functions(exported: Any) -> Iterator[tuple[str, Any]]:
    """The function itself; or the class's public methods and properties, inherited ones too."""
    if inspect.isfunction(exported):
        yield exported.__name__, exported
    elif inspect.isclass(exported):
        for name, value in inspect.getmembers_static(exported):
            if not name.startswith("_"):
                function = value.fget if isinstance(value, property) else value
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function):
                    yield name, function


def text_after(package: str, name: str) -> bool:
    """Whether a string follows the assignment to `name`, wherever below the package it stands."""
    told = re.compile(rf'^{name} = .*\n"""\S', re.MULTILINE)
    return any(told.search(file.read_text()) for file in folder(package).rglob("*.py"))


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


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_exported_name_says_what_it_is(package: str, name: str) -> None:
    exported = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(exported) or inspect.isfunction(exported)):
        assert text_after(package, name)
        return
    # Neither what a base says, nor what the dataclass and enum machinery writes by itself.
    said = vars(exported).get("__doc__") if inspect.isclass(exported) else exported.__doc__
    assert said
    assert not said.startswith((f"{name}(", "An enumeration."))
    if inspect.isclass(exported):
        # What overrides a documented method is documented by it.
        silent = [
            one for one, _ in functions(exported) if not inspect.getdoc(getattr(exported, one))
        ]
        assert silent == []


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_what_a_signature_names_can_be_imported_from_a_public_package(
    package: str, name: str
) -> None:
    def parts(hint: Any) -> Iterator[Any]:
        yield hint
        for part in hint if isinstance(hint, list) else typing.get_args(hint):
            yield from parts(part)

    exported = getattr(importlib.import_module(package), name)
    public = {getattr(importlib.import_module(where), one) for where, one in NAMES}
    signatures = list(functions(exported))
    if inspect.isclass(exported):
        signatures += [(name, exported), ("__init__", vars(exported).get("__init__", exported))]
    hidden = {
        f"{function}: {part}"
        for function, annotated in signatures
        for hint in typing.get_type_hints(annotated, localns={"Hash": object}).values()
        for part in parts(hint)
        if getattr(part, "__module__", "").startswith("splitferry_") and part not in public
    }
    assert hidden == set()


@pytest.mark.parametrize("package", EXPORTED)
def test_a_package_is_marked_as_typed(package: str) -> None:
    assert (folder(package) / "py.typed").is_file()
