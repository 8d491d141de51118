"""The bytes of an item on a descriptor: partial calls, what is reserved, what is given back."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from failing import failing
from splitferry_consumer.targets import Refused
from splitferry_consumer.targets.inode import (
    DESCRIPTOR_RESERVE,
    OFFSET_MAX,
    STEP,
    WRITE_BACK,
    Descriptors,
    Inode,
)
from splitferry_protocol.errors import BatchTransferFailed
from splitferry_protocol.ids import RequestId

PAGE = 4096


class Room:
    """Grants up to `limit` bytes."""

    def __init__(self) -> None:
        self.limit = 2**63
        self.taken = 0
        self.refusal: Exception = OSError(errno.ENOSPC, "no room")

    def admit(self, size: int) -> None:
        if self.taken + size > self.limit:
            raise self.refusal
        self.taken += size

    def release(self, size: int) -> None:
        assert size >= 0
        self.taken -= size


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def opened(tmp_path: Path, room: Room) -> Iterator[Inode]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    one = Inode(descriptor, room.admit, room.release)
    yield one
    one.close()
    assert room.taken == 0


def size(one: Inode) -> int:
    return os.fstat(one.descriptor).st_size


def test_partial_calls_are_carried_on(opened: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:3], at))
    monkeypatch.setattr(os, "pread", lambda file, most, at: read(file, min(most, 3), at))
    opened.write_at(5, b"0123456789")
    assert opened.read_at(6, 8) == b"12345678"
    assert opened.read_at(5, 10) == b"0123456789"


def test_a_write_of_nothing_is_an_error(opened: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried for ever, it would hold the thread; taken for written, it would be a hole."""
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match=r"] a write wrote nothing$") as failed:
        opened.write_at(0, b"bytes")
    assert failed.value.errno == errno.EIO


def test_what_ends_too_early_cannot_be_read(opened: Inode) -> None:
    opened.write_at(0, b"bytes")
    with pytest.raises(OSError, match="ends before byte 5") as failed:
        opened.read_at(3, 3)
    assert failed.value.errno == errno.EIO


def test_the_last_offset_that_a_file_can_have(
    opened: Inode, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="large") as failed:
        opened.write_at(OFFSET_MAX - 4, b"bytes")
    assert failed.value.errno == errno.EFBIG
    assert room.taken == 0
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    monkeypatch.setattr(os, "pwrite", lambda _, data, __: len(data))
    opened.write_at(OFFSET_MAX - 5, b"bytes")
    assert 0 < room.taken <= PAGE


def test_pages_are_taken_once(opened: Inode, room: Room) -> None:
    opened.write_at(10, b"bytes")
    assert (room.taken, opened.charged, size(opened)) == (PAGE, PAGE, 15)
    opened.write_at(0, b"0123456789")
    opened.write_at(PAGE - 5, b"bytes")
    assert room.taken == PAGE
    opened.write_at(3 * PAGE - 1, b"ab")
    assert (room.taken, size(opened)) == (3 * PAGE, 3 * PAGE + 1)


def test_as_much_again_as_is_there_from_the_start_is_reserved_and_no_more_than_a_step(
    opened: Inode, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    monkeypatch.setattr(os, "pwrite", lambda _, data, __: len(data))
    opened.write_at(0, bytes(2 * PAGE))
    assert room.taken == 2 * PAGE
    opened.write_at(2 * PAGE, bytes(PAGE))  # carries on 2 pages
    assert room.taken == 5 * PAGE
    opened.write_at(7 * PAGE, bytes(PAGE))
    assert room.taken == 6 * PAGE
    opened.write_at(8 * PAGE, bytes(PAGE))  # carries on a page that is not there from the start
    assert room.taken == 7 * PAGE
    opened.write_at(3 * PAGE, bytes(2 * STEP))  # and 3 pages ahead
    before = room.taken
    opened.write_at(3 * PAGE + 2 * STEP, bytes(4 * PAGE))
    assert room.taken == before + PAGE + STEP


@pytest.mark.parametrize(
    "refusal",
    [
        OSError(errno.ENOSPC, "no room"),
        Refused(BatchTransferFailed(RequestId(1, 1), "no room")),
    ],
    ids=["disk", "quota"],
)
def test_without_room_to_go_ahead_the_bytes_alone_are_taken(
    opened: Inode, room: Room, refusal: Exception
) -> None:
    room.refusal = refusal
    opened.write_at(0, bytes(4 * PAGE))
    room.limit = 5 * PAGE
    opened.write_at(4 * PAGE, bytes(PAGE))
    assert (room.taken, size(opened)) == (5 * PAGE, 5 * PAGE)
    with pytest.raises(type(refusal), match="no room"):
        opened.write_at(5 * PAGE, b"x")
    assert room.taken == 5 * PAGE


def test_trim_keeps_the_pages_of_exactly_the_item(opened: Inode, room: Room) -> None:
    opened.write_at(0, bytes(2 * PAGE))
    opened.write_at(2 * PAGE, b"bytes")
    assert room.taken == 5 * PAGE  # Two pages ahead, and what makes the fifth byte a page.
    for other in (2 * PAGE + 4, 2 * PAGE + 6):
        assert not opened.trim(other)
    assert room.taken == 5 * PAGE
    assert opened.trim(2 * PAGE + 5)
    assert (room.taken, opened.charged, size(opened)) == (3 * PAGE, 3 * PAGE, 2 * PAGE + 5)
    opened.release()
    opened.release()
    assert (room.taken, opened.charged) == (0, 0)


def test_a_hole_is_not_the_item(opened: Inode) -> None:
    opened.write_at(1, b"bytes")
    assert not opened.trim(6)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve_is_written_to(
    opened: Inode, room: Room, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    opened.write_at(0, b"bytes")
    assert (opened.read_at(0, 5), room.taken) == (b"bytes", PAGE)


def test_what_a_failed_reservation_got_is_given_back(
    opened: Inode, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.write_at(0, b"bytes")
    reserve = os.posix_fallocate

    def full(file: int, offset: int, wanted: int) -> None:
        reserve(file, offset, wanted // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        opened.write_at(4 * PAGE, bytes(4 * PAGE))
    assert (room.taken, size(opened)) == (PAGE, 5)
    monkeypatch.undo()
    opened.write_at(4 * PAGE, bytes(4 * PAGE))
    assert room.taken == 5 * PAGE


def test_a_failed_reservation_that_cannot_be_given_back_says_its_own_cause(
    opened: Inode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    monkeypatch.setattr(os, "ftruncate", failing(errno.EIO))
    with pytest.raises(OSError, match="No space"):
        opened.write_at(0, b"bytes")


def test_the_disk_is_set_to_work_on_what_crosses_a_border(
    opened: Inode, monkeypatch: pytest.MonkeyPatch
) -> None:
    hints: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, size, __: hints.append((at, size)))
    half = WRITE_BACK // 2
    opened.write_at(0, bytes(half))
    assert hints == []
    opened.write_at(half, bytes(half))
    assert hints == [(0, WRITE_BACK)]
    opened.write_at(WRITE_BACK, bytes(1))
    opened.write_at(WRITE_BACK + 1, bytes(1))
    assert len(hints) == 1
    opened.write_at(2 * WRITE_BACK - 5, bytes(10))
    assert hints[1:] == [(WRITE_BACK, WRITE_BACK + 5)]
    opened.write_out()
    assert hints[2:] == [(0, 0)]


def test_a_hint_that_is_not_taken_does_no_harm(
    opened: Inode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ill(*_: object) -> None:
        raise OSError(errno.EIO, "ill")

    monkeypatch.setattr(os, "posix_fadvise", ill)
    opened.write_out()
    monkeypatch.delattr(os, "posix_fadvise")
    opened.write_out()


# ---- descriptors


FULL = (
    r"^\[Errno 24\] 2 items are on their way in, as many as may be open; raise the limit of open "
    r"files \(ulimit -n\)$"
)


def test_as_many_are_open_as_the_process_may_have_less_a_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = (DESCRIPTOR_RESERVE + 2, 10**6)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: {resource.RLIMIT_NOFILE: limit}[kind])
    directory = os.open(tmp_path, os.O_RDONLY)
    descriptors = Descriptors()
    opened = [descriptors.open(name, directory) for name in ("a", "b")]
    try:
        with pytest.raises(OSError, match=FULL):
            descriptors.open("c", directory)
        descriptors.give()
        # What cannot be opened takes none.
        with pytest.raises(FileExistsError):
            descriptors.open("a", directory)
        opened.append(descriptors.open("c", directory))
        for _ in range(2):
            with pytest.raises(OSError, match=FULL):
                descriptors.open("d", directory)
            descriptors.give()
            descriptors.give()
            opened += [descriptors.open(f"{name}{len(opened)}", directory) for name in "ef"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "a",
            "b",
            "c",
            "e3",
            "e5",
            "f3",
            "f5",
        ]
        found = os.fstat(opened[-1])
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert not os.get_inheritable(opened[-1])
        os.pwrite(opened[-1], b"bytes", 0)
        assert os.pread(opened[-1], 5, 0) == b"bytes"
    finally:
        for descriptor in (*opened, directory):
            os.close(descriptor)


def test_one_may_always_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (DESCRIPTOR_RESERVE - 5, 10**6))
    directory = os.open(tmp_path, os.O_RDONLY)
    descriptors = Descriptors()
    opened = descriptors.open("a", directory)
    try:
        with pytest.raises(OSError, match="1 items are on their way in"):
            descriptors.open("b", directory)
    finally:
        os.close(opened)
        os.close(directory)


def test_what_lies_at_the_name_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="File exists"):
            Descriptors().open("link", directory)
    finally:
        os.close(directory)
    assert not (tmp_path / "elsewhere").exists()
