"""Directories that end with their process: who holds one, and what a sweeper may take."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitferry_consumer.targets.owner import Owner


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def owner(parent: int) -> Iterator[Owner]:
    created = Owner.create(parent)
    yield created
    created.release()


@pytest.fixture
def same_descriptors() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    # Others of this process may have gone meanwhile, with what the collector found.
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def left_by_the_dead(parent: int, *files: str) -> str:
    owner = Owner.create(parent)
    for name in files:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=owner.directory))
    owner.release()
    return owner.name


@pytest.mark.parametrize("prefix", [[], ["before-"]])
def test_nobody_else_can_look_into_it_or_guess_its_name(
    parent: int, tmp_path: Path, prefix: list[str]
) -> None:
    umask = os.umask(0)
    owners = [Owner.create(parent, *prefix) for _ in range(2)]
    os.umask(umask)
    assert {*os.listdir(tmp_path)} == {owner.name for owner in owners}
    for owner in owners:
        assert owner.name.startswith("".join(prefix))
        assert len(bytes.fromhex(owner.name.removeprefix("".join(prefix)))) == 8
        assert stat.S_IMODE((tmp_path / owner.name).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / owner.name / "lock").stat().st_mode) == 0o600
        assert os.path.samestat(os.fstat(owner.directory), (tmp_path / owner.name).stat())
        assert os.path.samestat(os.fstat(owner.lock), (tmp_path / owner.name / "lock").stat())
        owner.release()


def test_the_living_are_left_alone(parent: int, owner: Owner) -> None:
    """A second look, too: the first one has not taken the lock away."""
    for _ in range(2):
        assert Owner.lives(parent, owner.name)
        with Owner.dead(parent, owner.name) as dead:
            assert dead is None
    assert owner.files() == []


@pytest.mark.usefixtures("same_descriptors")
def test_whoever_ends_is_dead_and_one_sweeper_holds_what_is_left(parent: int) -> None:
    name = left_by_the_dead(parent, "0", "1")
    assert not Owner.lives(parent, name)
    with Owner.dead(parent, name) as dead:
        assert dead is not None
        assert dead.name == name
        assert sorted(dead.files()) == ["0", "1"]
        assert Owner.lives(parent, name)
        with Owner.dead(parent, name) as other:
            assert other is None
    assert not Owner.lives(parent, name)


@pytest.mark.usefixtures("same_descriptors")
def test_a_sweep_that_fails_gives_the_lock_back(parent: int) -> None:
    name = left_by_the_dead(parent, "0")
    with pytest.raises(OSError, match="ill"), Owner.dead(parent, name):
        raise OSError(errno.EIO, "ill")
    with Owner.dead(parent, name) as dead:
        assert dead is not None


def test_a_directory_goes_when_nothing_is_left_in_it(parent: int, tmp_path: Path) -> None:
    name = left_by_the_dead(parent, "0")
    with Owner.dead(parent, name) as dead:
        assert dead is not None
        dead.remove()
        assert sorted(os.listdir(tmp_path / name)) == ["0", "lock"]
        (tmp_path / name / "0").unlink()
        dead.remove()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_go_yet_is_no_error(owner: Owner, tmp_path: Path) -> None:
    """NFS gives the lock, which is open, another name in it."""
    unlink = os.unlink

    def renamed(name: str, *, dir_fd: int) -> None:
        os.link(name, ".nfs0001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        unlink(name, dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", renamed)
        owner.remove()
    assert os.listdir(tmp_path / owner.name) == [".nfs0001"]


@pytest.mark.usefixtures("same_descriptors")
def test_without_a_lock_only_an_empty_directory_goes(parent: int, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_bytes(b"bytes")
    for name in ("empty", "full", "none"):
        assert not Owner.lives(parent, name)
    for name in ("empty", "full", "none"):
        with Owner.dead(parent, name) as dead:
            assert dead is None
    assert os.listdir(tmp_path) == ["full"]
    assert os.listdir(tmp_path / "full") == ["file"]


@pytest.mark.usefixtures("same_descriptors")
def test_a_lock_is_no_link(parent: int, tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "planted/lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links") as refused:
        Owner.lives(parent, "planted")
    assert refused.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="symbolic links"), Owner.dead(parent, "planted"):
        pass


def before_the_lock(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let it happen once, between the making or opening of the lock file and its lock."""
    flock = fcntl.flock

    def late(lock: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        happens()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)


@pytest.mark.usefixtures("same_descriptors")
@pytest.mark.parametrize("sweeper", ["has removed it", "holds it"])
def test_an_owner_that_was_swept_at_birth_takes_another_directory(
    parent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweeper: str
) -> None:
    held: list[Owner] = []

    def swept() -> None:
        (name,) = os.listdir(tmp_path)
        if sweeper == "holds it":
            held.append(Owner._locked(name, parent, 0) or pytest.fail("not ours"))
            return
        with Owner.dead(parent, name) as dead:
            assert dead is not None
            dead.remove()

    before_the_lock(monkeypatch, swept)
    owner = Owner.create(parent)
    assert {*os.listdir(tmp_path)} == {owner.name, *(other.name for other in held)}
    with Owner.dead(parent, owner.name) as dead:
        assert dead is None
    for one in (owner, *held):
        one.release()


@pytest.mark.usefixtures("same_descriptors")
def test_a_directory_that_another_sweeper_removed_meanwhile_is_gone(
    parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Callable[[int, str], bool]]
    looks = [Owner.lives, lambda *where: Owner.dead(*where).__enter__() is not None]
    for look in looks:
        name = left_by_the_dead(parent)

        def swept(name: str = name) -> None:
            with Owner.dead(parent, name) as dead:
                assert dead is not None
                dead.remove()

        before_the_lock(monkeypatch, swept)
        assert not look(parent, name)


@pytest.mark.usefixtures("same_descriptors")
def test_a_lock_that_cannot_be_had_costs_no_descriptor(
    parent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No locks on this file system, say: whoever starts hears of it."""

    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(OSError, match="no locks"):
        Owner.create(parent)
    (name,) = os.listdir(tmp_path)
    with pytest.raises(OSError, match="no locks"):
        Owner.lives(parent, name)
    with pytest.raises(OSError, match="no locks"), Owner.dead(parent, name):
        pass


def test_a_program_that_is_started_does_not_keep_it_alive(owner: Owner) -> None:
    """A child that has the lock open would hold it when its owner is long dead."""
    assert not os.get_inheritable(owner.lock)
    assert not os.get_inheritable(owner.directory)
