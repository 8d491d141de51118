"""The rules of docs/DESIGN.md in every order of events that a small world has (docs/MODEL.md).

SPLITFERRY_MODEL=full explores without a bound, which takes a while: `make model`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from model.explore import Found, Model, explore, walks
from model.owner import Tenancy
from model.snapshot import copied, frozen
from model.storage import Disk, File
from model.worlds import LARGE, SMALL, WORLDS, World
from splitferry_consumer.paths import Tree
from splitferry_protocol.ids import RequestId, RequestKey

FULL = os.environ.get("SPLITFERRY_MODEL") == "full"
STATES = 10_000_000 if FULL else 8_000
WAYS = 20_000 if FULL else 100


def told(found: Found) -> str:
    return f"{found.violation}: {' > '.join(found.trace)}"


@pytest.mark.timeout(None if FULL else 120)
@pytest.mark.parametrize("world", SMALL, ids=lambda world: world.name)
def test_one_owner_after_another_breaks_no_rule_in_any_order_of_events(world: World) -> None:
    found = explore(world)
    assert found.violation is None, told(found)
    assert found.complete


@pytest.mark.timeout(None if FULL else 120)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_no_order_of_events_breaks_a_rule(world: World) -> None:
    found = explore(world, STATES)
    assert found.violation is None, told(found)
    assert found.complete or found.states >= STATES


@pytest.mark.timeout(None if FULL else 120)
@pytest.mark.parametrize("world", [*WORLDS, *LARGE], ids=lambda world: world.name)
def test_no_random_way_breaks_a_rule(world: World) -> None:
    found = walks(world, range(WAYS // 3 if world in LARGE else WAYS))
    assert found.violation is None, told(found)
    assert found.complete, "no way came to an end"


# ---- what the model itself stands on


def test_a_copy_is_the_same_and_shares_nothing_that_changes() -> None:
    model = Model(WORLDS[0])
    walks(WORLDS[0], range(5), model)
    assert len(model.owners) > 50
    for owner in model.owners.values:
        twin = copied(owner)
        assert frozen(twin) == frozen(owner)
    holding = (owner for owner in model.owners.values if isinstance(owner, Tenancy))
    tenancy = next(owner for owner in holding if owner.ledger.position)
    before = frozen(tenancy)
    twin = copied(tenancy)
    twin.read(tenancy.ledger.position, WORLDS[0].logs[0][-1])
    assert frozen(tenancy) == before != frozen(twin)


def test_the_disk_of_the_model_does_what_the_real_one_does(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_DIRECTORY)
    try:
        tree, disk = Tree(root, 0o640), Disk()
        for version, data in enumerate((b"one", b"two"), 1):
            key = RequestKey("group", "splits", 0, RequestId(1, version), version)
            disk.temporary[f"{version}"] = File(data, key, version)
            (tmp_path / f"{version}").write_bytes(data)
        for source in ("1", "2", "2"):
            for place in (tree.place, disk.place):
                try:
                    place(source, root, "item")
                except FileNotFoundError:
                    assert source == "2"
                    assert disk.places["item"].data == b"two"
        assert (tmp_path / "item").read_bytes() == disk.places["item"].data
        assert tree.sync(["item"]) == disk.sync(["item"]) == {}
        for name, data in (("item", b"two"), ("item", b"one"), ("none", b"")):
            sha256 = hashlib.sha256(data).digest()
            assert tree.holds(name, len(data), sha256) is disk.holds(name, len(data), sha256)
    finally:
        os.close(root)
