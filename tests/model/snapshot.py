"""Copies of the program's live objects, and keys that say whether two of them are the same.

Both walk whatever they meet, by attributes: a field that is added to the ledger takes part
without a word here. What is never changed in place is a leaf, shared by all copies.
"""

from __future__ import annotations

from array import array
from collections import deque
from enum import Enum
from typing import Any, TypeVar, cast

from splitferry_consumer.bookmark import Bookmark
from splitferry_consumer.catalogue import Row
from splitferry_consumer.request import Arrival
from splitferry_consumer.targets import Verdict
from splitferry_consumer.transport import Record
from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.errors import WsDataError
from splitferry_protocol.ids import RequestId, RequestKey
from splitferry_protocol.records import Abort, Accepted, Input, Result, Split

T = TypeVar("T")

_LEAVES = (
    str, bytes, int, float, type(None), Enum, RequestId, RequestKey, Input, Split, Abort,
    InvalidRecord, Record, Arrival, Result, Accepted, Verdict, Row, Bookmark, WsDataError,
)  # fmt: skip


_slots: dict[type, tuple[str, ...]] = {}


def _attributes(value: object) -> tuple[str, ...]:
    kind = type(value)
    if kind not in _slots:
        named = (name for base in kind.__mro__ for name in getattr(base, "__slots__", ()))
        _slots[kind] = tuple(named)
    return (*_slots[kind], *getattr(value, "__dict__", ()))


def copied(value: T) -> T:
    """A copy that shares nothing that can change."""
    return cast("T", _copy(value, {}))


def _copy(value: Any, made: dict[int, Any]) -> Any:
    if isinstance(value, _LEAVES):
        return value
    twin: Any = made.get(id(value))
    if twin is not None:
        return twin
    match value:
        case bytearray() | array():
            made[id(value)] = twin = value[:]
        case tuple():
            parts = [_copy(item, made) for item in value]
            twin = type(value)._make(parts) if hasattr(value, "_make") else tuple(parts)
        case list() | deque():
            made[id(value)] = twin = type(value)()
            twin.extend(_copy(item, made) for item in value)
        case set():
            made[id(value)] = twin = set()
            twin.update(_copy(item, made) for item in value)
        case dict():
            made[id(value)] = twin = {}
            twin.update((_copy(key, made), _copy(item, made)) for key, item in value.items())
        case _:
            made[id(value)] = twin = object.__new__(type(value))
            for name in _attributes(value):
                object.__setattr__(twin, name, _copy(getattr(value, name), made))
    return twin


def frozen(value: object) -> str:
    """Equal for two values that no one can tell apart, sharing of parts included."""
    numbers: dict[int, int] = {}
    sets: list[set[Any]] = []
    said: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, _LEAVES):
            said.append(_leaf(value))
            return
        number = numbers.get(id(value))
        if number is not None:
            said.append(f"#{number}")
            return
        if not isinstance(value, tuple):
            numbers[id(value)] = len(numbers)
        match value:
            case bytearray() | array():
                said.append(repr(value))
            case tuple() | list() | deque():
                said.append(f"{type(value).__name__} of {len(value)}")
                for item in value:
                    walk(item)
            case dict():
                said.append(f"dict of {len(value)}")
                for key, item in value.items():
                    walk(key)
                    walk(item)
            case set():
                said.append("set")
                sets.append(value)
            case _:
                said.append(type(value).__name__)
                for name in _attributes(value):
                    walk(getattr(value, name))

    walk(value)
    # A set has no order of its own: its members, all seen elsewhere by now, have.
    said.extend(str(sorted(numbers[id(member)] for member in members)) for members in sets)
    return ";".join(said)


def _leaf(value: object) -> str:
    if isinstance(value, (InvalidRecord, WsDataError)):
        return f"{value!r} {vars(value)!r}"
    return repr(value)
