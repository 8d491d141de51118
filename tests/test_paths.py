"""Finding and replacing files below a root, with links and obstacles in the way."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitferry_consumer.paths import Obstructed, Tree, open_directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    below = tmp_path / "root"
    below.mkdir()
    return below


@pytest.fixture
def source(root: Path) -> Iterator[int]:
    (root / "incoming").mkdir()
    (root / "incoming" / "0").write_bytes(b"new")
    above = os.open(root, os.O_RDONLY)
    descriptor = open_directory("incoming", above)
    os.close(above)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def tree(root: Path) -> Iterator[Tree]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    yield Tree(descriptor, 0o640)
    os.close(descriptor)


def test_place_makes_the_directories(tree: Tree, root: Path, source: int) -> None:
    tree.place("0", source, "a/b/c.bin")
    assert (root / "a/b/c.bin").read_bytes() == b"new"
    assert not (root / "incoming/0").exists()
    assert (root / "a").stat().st_mode & 0o777 & ~0o750 == 0
    assert tree.sync(["a/b/c.bin"]) == {}


def test_place_goes_over_an_older_file(tree: Tree, root: Path, source: int) -> None:
    (root / "c.bin").write_bytes(b"old")
    tree.place("0", source, "c.bin")
    assert (root / "c.bin").read_bytes() == b"new"


@pytest.mark.parametrize("unique_id", ["", "/x", "a//b", "../x", "a/./b", ".splitferry/catalog.db"])
def test_a_bad_path_is_refused_and_nothing_is_made(
    tree: Tree, root: Path, source: int, unique_id: str
) -> None:
    with pytest.raises(Obstructed):
        tree.check(unique_id)
    with pytest.raises(Obstructed):
        tree.place("0", source, unique_id)
    assert [path.name for path in root.parent.rglob("*")] == ["root", "incoming", "0"]


@pytest.mark.parametrize(
    ("unique_id", "cause"),
    [
        ("link/x", "link"),
        ("directory/link/x", "link"),
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("directory", "directory"),
        ("file/x", "file"),
        ("file/x/y", "file"),
    ],
)
def test_what_stands_in_the_way_is_refused(
    tree: Tree, root: Path, source: int, unique_id: str, cause: str
) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "directory").mkdir()
    (root / "file").write_bytes(b"old")
    (root / "link").symlink_to(outside)
    (root / "directory/link").symlink_to(outside)
    (root / "dangling").symlink_to(outside / "nothing")
    with pytest.raises(Obstructed, match=cause):
        tree.check(unique_id)
    with pytest.raises(Obstructed, match=cause):
        tree.place("0", source, unique_id)
    assert list(outside.iterdir()) == []
    assert (root / "incoming/0").read_bytes() == b"new"


def test_check_makes_nothing(tree: Tree, root: Path) -> None:
    tree.check("a/b/c")
    assert list(root.iterdir()) == []


def test_a_missing_source_is_told_apart(tree: Tree, root: Path, source: int) -> None:
    with pytest.raises(FileNotFoundError):
        tree.place("1", source, "a/b")
    assert not (root / "a/b").exists()


def test_holds_compares_every_byte(tree: Tree, root: Path) -> None:
    (root / "a").mkdir()
    (root / "a/file").write_bytes(b"bytes")
    digest = hashlib.sha256(b"bytes").digest()
    assert tree.holds("a/file", 5, digest)
    assert not tree.holds("a/file", 4, digest)
    assert not tree.holds("a/file", 5, hashlib.sha256(b"other").digest())
    assert not tree.holds("a/none", 5, digest)
    assert not tree.holds("b/file", 5, digest)
    assert not tree.holds("a", 5, digest)
    (root / "link").symlink_to("a/file")
    assert not tree.holds("link", 5, digest)
    os.mkfifo(root / "fifo")
    assert not tree.holds("fifo", 0, hashlib.sha256().digest())


def test_sync_tells_which_names_are_not_durable(tree: Tree, root: Path) -> None:
    (root / "a").mkdir()
    failed = tree.sync(["a/x", "gone/x", "y"])
    assert {name: error.errno for name, error in failed.items()} == {"gone/x": errno.ENOENT}


def test_sync_syncs_each_directory_once(
    tree: Tree, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a/b").mkdir(parents=True)
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert tree.sync(["a/b/x", "a/b/y", "a/z"]) == {}
    assert synced == [".", "a", "a/b"]
