"""The small worlds: what lies in the log, and which faults may come, in any order.

Tokens are single letters; `w` is a whole item of one split, `h` and `t` its two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from model.oracle import Log
from splitferry_protocol.codec import InvalidRecord
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import Block, Split, Status
from world import Content, abort, poison, split


@dataclass(frozen=True)
class World:
    """What may happen, and how often."""

    name: str
    logs: Sequence[Log]
    """By partition."""
    horizon: int = 1000
    takes: int = 1
    """Times that a partition is given to a second owner, while the first does not know it."""
    crashes: int = 0
    unsure: int = 0
    """Commits whose fate the owner does not hear."""
    decisions: int = 0
    """Owners' decisions that come before there is nothing left to read."""
    decides: Status = Status.EXPIRED
    timeouts: int = 0
    """Transactions that the coordinator aborts, with a new epoch."""
    foreign: int = 0
    """Transactions of somebody else that hang in the results."""
    resets: int = 0
    """Times that the group's offset is set to 0 by hand, or deleted."""
    segments: bool = False
    """Shared memory is kept account of."""
    apart: bool = False
    """The markers of one transaction are written one by one."""
    passes: int = 0
    """Times that Kafka takes a transaction for complete without its last markers."""
    changed: Log | None = None
    """The log of partition 0 after the topic was made anew."""
    truncated: int = 0
    """Where the log of partition 0 begins after records were deleted."""


def w(request: int, reply: str = "", **more: Any) -> Split:
    return _item(request, 0, b"ab", reply, **more)


def h(request: int, reply: str = "", **more: Any) -> Split:
    return _item(request, 0, b"a", reply, **more)


def t(request: int, reply: str = "", **more: Any) -> Split:
    return _item(request, 1, b"b", reply, **more)


def _item(request: int, offset: int, data: bytes, reply: str, **more: Any) -> Split:
    made = split(request, offset, data, total=2, reply=reply.encode() or None)
    return made._replace(**more)


def bad(request: int) -> InvalidRecord:
    """A record that is tied to its request, and breaks the contract."""
    return InvalidRecord("damaged", RequestId(1, request), 1, damaged=True)


FILE: dict[str, Any] = {"block": Block.FILE, "unique_id": "item"}
NEWER: dict[str, Any] = {**FILE, "version": 2, "payload": b"AB"}
X = poison()

_ONE = World("", [])


def _world(name: str, *log: Content | None, **faults: Any) -> World:
    return replace(_ONE, name=name, logs=[log], **faults)


STORM = {"crashes": 1, "takes": 1, "unsure": 1}
ZOMBIE = {"takes": 1, "crashes": 1}
OTHER_DIGEST: dict[str, Any] = {"sha256": b"?" * 32}

AFTER = {"takes": 0, "crashes": 1}
"""One owner after another: small enough to see all of it in no time."""

SMALL = [
    _world("poison", h(1), X, t(1), **AFTER),
    _world("below P", h(1), w(2), X, takes=0, crashes=2),
    _world("token in flight", h(1), w(2, "a"), w(2, "b"), w(2, "a"), **AFTER),
    _world("event behind P", h(1), h(1), h(2, "a"), t(2, "b"), **AFTER),
    _world("decision", h(1, "a"), t(1, "b"), X, **AFTER, decisions=1),
    _world(
        "decision over a queue",
        h(1, "a"),
        h(1),
        bad(1),
        t(1, "b"),
        **AFTER,
        decisions=1,
        decides=Status.FAILED,
    ),
    _world("comparison", h(1), h(1)._replace(payload=b"?"), w(2), **AFTER),
    _world("late digest", w(1), w(1, **OTHER_DIGEST), w(1), **AFTER),
    _world("edge of the horizon", w(1), w(2), w(1), horizon=2, **AFTER),
    _world("end at the horizon", h(1), w(2), t(1), horizon=2, **AFTER),
    _world("token at the horizon", h(1), h(2, "a"), h(1), X, h(2, "b"), horizon=3, **AFTER),
    _world("files", w(1, **FILE), w(2, **NEWER), **AFTER),
    _world("file given up", w(1, **FILE), **AFTER, decisions=1),
    _world("offsets by hand", h(1), w(2, "a"), t(1), w(2, "b"), **AFTER, resets=1),
    _world("topic made anew", w(1), **AFTER, changed=[w(3)]),
    _world("passed over", w(1), w(2, "a"), w(2, "b"), **AFTER, apart=True, passes=1),
]

WORLDS = [
    # A request around another, and a late duplicate of that one.
    _world("smallest", h(1), w(2), t(1), w(2), **STORM, timeouts=1),
    _world("two inside", h(1), w(2), w(3), w(2), t(1), w(3), takes=1, unsure=1),
    _world("never complete", h(1), w(2), w(2), **STORM, decisions=1),
    _world("abort", h(1), abort(1), t(1), w(2), **STORM),
    _world("poison, two owners", h(1), X, None, w(2), X, t(1), **ZOMBIE),
    _world("contradiction", h(1, "a"), w(2), h(1, "b")._replace(payload=b"?"), t(1, "c"), **ZOMBIE),
    _world("damaged", h(1), bad(1), t(1), bad(1), w(2), **ZOMBIE),
    _world("tokens", h(1), h(2, "a"), t(2, "b"), w(2, "c"), X, t(1), **ZOMBIE),
    _world("tokens in turn", w(1, "a"), w(1, "b"), w(1, "a"), X, takes=1, unsure=1),
    _world("comparisons", h(1, "a"), h(1, "b"), w(2), w(1, "c"), t(1, "d"), **ZOMBIE),
    _world("owner's decisions", h(1, "a"), w(2), X, t(1, "b"), **ZOMBIE, decisions=1),
    _world(
        "decisions over comparisons",
        h(1, "a"),
        h(1, "b"),
        bad(1),
        w(2),
        t(1, "c"),
        takes=1,
        decisions=1,
        decides=Status.FAILED,
    ),
    _world("late digest, two owners", w(1), w(1, **OTHER_DIGEST), w(1), **ZOMBIE),
    _world("digest of another", h(1), w(2), w(2, "a", **OTHER_DIGEST), w(2, "b"), t(1), takes=1),
    _world("file", h(1, **FILE), w(2, **NEWER), t(1, **FILE), **ZOMBIE),
    _world("file, unwritable", w(1, **FILE), w(2), **STORM, decisions=1),
    _world("file, three versions", w(1, **FILE), w(2, **NEWER), w(3, **FILE), takes=1, crashes=1),
    replace(
        _world("two partitions, one file", **ZOMBIE),
        logs=[[w(1, **FILE)], [w(2, **NEWER)]],
    ),
    _world("segments", h(1), w(2), t(1), w(2), **STORM, segments=True),
    _world("horizon", h(1), w(2), w(3), w(2), t(1), horizon=3, **ZOMBIE),
    _world("horizon, edge", w(1), w(2), w(1), w(3), horizon=2, **ZOMBIE),
    _world("horizon, again", w(1), w(2), w(3), w(1), w(1), horizon=2, **ZOMBIE),
    _world("horizon, marker", h(1), None, None, w(2), t(1), horizon=2, **ZOMBIE),
    _world("horizon, no company", h(1), w(2), horizon=0, **ZOMBIE),
    _world("hanging transaction", h(1), w(2), t(1), foreign=1, **ZOMBIE),
    _world("markers apart", h(1), w(2), t(1), **STORM, apart=True),
    _world("passed over", h(1), w(2), t(1), **STORM, apart=True, passes=1),
    _world("made anew", w(1), w(2), w(1), crashes=1, takes=1, changed=[w(3), h(4)]),
    _world("truncated", h(1), w(2), t(1), w(3), crashes=1, takes=1, truncated=2),
]

ALL = {"takes": 3, "crashes": 2, "unsure": 2, "decisions": 1, "timeouts": 1, "foreign": 1}

LARGE = [
    _world("large", h(1, "a"), h(2), w(3), t(2), h(1, "b"), X, w(3), t(1, "c"), w(2), **ALL),
    _world("large, tokens", h(1), w(2, "a"), w(2, "b"), X, w(2, "a"), bad(1), w(3), w(3), **ALL),
    _world(
        "large, horizon",
        h(1),
        w(2),
        w(3),
        X,
        w(2),
        t(1),
        w(4),
        w(3),
        w(5),
        horizon=4,
        **ALL,
    ),
    _world(
        "large, files",
        h(1, **FILE),
        w(2, **NEWER),
        w(3),
        t(1, **FILE),
        w(4, **FILE),
        w(2, **NEWER),
        apart=True,
        **ALL,
    ),
    replace(
        _world("large, two partitions", segments=True, **ALL),
        logs=[[h(1, **FILE), w(2), t(1, **FILE)], [w(3, **NEWER), w(4), w(3, **NEWER)]],
    ),
]
"""For random ways only."""
