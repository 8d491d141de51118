"""Finding and replacing files below a root, with links and obstacles in the way."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from failing import failing
from splitferry_consumer.paths import (
    Obstructed,
    Tree,
    folds_names,
    leads_to,
    open_directory,
)
from splitferry_protocol.paths import path_problem


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
    ways: list[Callable[[str], None]]
    ways = [tree.check, lambda path: tree.place("0", source, path)]
    for refusing in ways:
        with pytest.raises(Obstructed) as refused:
            refusing(unique_id)
        assert str(refused.value) == path_problem(unique_id)
    assert [path.name for path in root.parent.rglob("*")] == ["root", "incoming", "0"]


@pytest.mark.parametrize(
    ("unique_id", "cause"),
    [
        ("link/x", "the path leads through a file or a symbolic link"),
        ("directory/link/x", "the path leads through a file or a symbolic link"),
        ("link", "a symbolic link stands there"),
        ("dangling", "a symbolic link stands there"),
        ("directory", "a directory stands there"),
        ("file/x", "the path leads through a file or a symbolic link"),
        ("file/x/y", "the path leads through a file or a symbolic link"),
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
    ways: list[Callable[[str], None]]
    ways = [tree.check, lambda path: tree.place("0", source, path)]
    for refusing in ways:
        with pytest.raises(Obstructed) as refused:
            refusing(unique_id)
        assert str(refused.value) == cause
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


def test_a_file_that_cannot_be_read_now_may_have_the_bytes(
    tree: Tree, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is not said that it has not."""
    (root / "file").write_bytes(b"bytes")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            tree.holds("file", 5, hashlib.sha256(b"bytes").digest())


def test_what_may_heal_is_no_obstacle(
    tree: Tree, root: Path, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            tree.check("item")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            tree.place("0", source, "item")


def test_whether_the_root_stands_where_it_did(tree: Tree, root: Path) -> None:
    assert tree.stands_at(str(root))
    root.rename(root.parent / "moved")
    assert not tree.stands_at(str(root))
    root.mkdir()
    assert not tree.stands_at(str(root))
    assert tree.stands_at(str(root.parent / "moved"))


def test_whether_anything_is_below_the_root_besides_what_is_ours(tree: Tree, root: Path) -> None:
    assert not tree.used()
    (root / ".splitferry").mkdir()
    assert not tree.used()
    (root / "file").write_bytes(b"")
    assert tree.used()


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


@pytest.fixture
def above(root: Path) -> Iterator[int]:
    descriptor = os.open(root, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=[0o000, 0o077], ids="umask {:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(descriptor: int) -> int:
    return stat.S_IMODE(os.fstat(descriptor).st_mode)


@pytest.mark.usefixtures("umask")
def test_a_directory_is_made_with_its_mode_and_never_with_more(
    above: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = os.fchmod

    def changed(descriptor: int, wanted: int) -> None:
        assert mode(descriptor) & ~wanted == 0
        change(descriptor, wanted)

    monkeypatch.setattr(os, "fchmod", changed)
    for number, wanted in enumerate((0o700, 0o750)):
        made = open_directory(f"{number}", above, wanted)
        assert mode(made) == wanted
        os.close(made)
    (root / "0").chmod(0o711)
    there = open_directory("0", above, 0o700)
    assert mode(there) == 0o711  # Somebody's choice, which is not ours to change.
    os.close(there)


@pytest.mark.usefixtures("umask")
def test_a_directory_keeps_the_set_group_id_bit_of_its_parent(above: int, root: Path) -> None:
    root.chmod(0o2750)
    made = open_directory("made", above, 0o750)
    assert mode(made) == 0o2750
    os.close(made)


def test_a_directory_that_cannot_get_its_mode_costs_no_descriptor(
    above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ill(*_: object) -> None:
        raise OSError(errno.EIO, "ill")

    monkeypatch.setattr(os, "fchmod", ill)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="ill"):
        open_directory("made", above, 0o750)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


@pytest.mark.parametrize("how", ["case", "composition", "not at all"])
def test_names_that_are_folded_are_found_by_trying(
    above: int, root: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    look = os.stat
    fold: Callable[[str], str] = {
        "case": lambda name: name.casefold(),
        "composition": lambda name: unicodedata.normalize("NFC", name),
        "not at all": lambda name: name,
    }[how]

    def folding(name: str, *, dir_fd: int) -> os.stat_result:
        for there in os.listdir(dir_fd):
            if fold(there) == fold(name):
                return look(there, dir_fd=dir_fd)
        raise FileNotFoundError(name)

    (root / "other").write_bytes(b"")
    monkeypatch.setattr(os, "stat", folding)
    assert folds_names(above) is (how != "not at all")
    assert os.listdir(above) == ["other"]


def test_whether_a_path_leads_to_a_directory(above: int, root: Path) -> None:
    (root / "directory").mkdir()
    (root / "file").write_bytes(b"")
    (root / "link").symlink_to("directory")
    directory = open_directory("directory", above)
    assert leads_to("directory", directory, above)
    assert leads_to(str(root / "link"), directory)
    for other in (".", "none", "file/below"):
        assert not leads_to(other, directory, above)
    os.close(directory)


def test_nothing_is_left_open(tree: Tree, root: Path, source: int) -> None:
    (root / "file").write_bytes(b"")
    (root / "a/b/c").mkdir(parents=True)
    before = os.listdir("/proc/self/fd")
    tree.check("a/b/c/d")
    tree.check("a/none/c/d")
    for path in ("a/b/c", "file/a/b", "a/b/c/d/" + "n" * 255 + "/" + "n" * 255):
        with suppress(Obstructed):
            tree.place("0", source, path)
    assert set(tree.sync(["a/b/c/d", "a/b/none/e"])) == {"a/b/none/e"}
    assert not tree.holds("a/b/c", 0, b"")
    assert not tree.holds("a/b/none", 0, b"")
    assert len(os.listdir("/proc/self/fd")) <= len(before)
