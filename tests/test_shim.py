"""The tools of the storage tests do what they say: faults in calls, the clock, a small disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim import Shim, needs_shim
from small_disk import needs_mount, small_disk

pytestmark = needs_shim


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "below").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def shim(root: Path, tmp_path: Path) -> Shim:
    return Shim(root, tmp_path / "shim")


def python(shim: Shim, root: Path, code: str) -> subprocess.CompletedProcess[str]:
    setup = "import os, time\nf = os.open('below/file', os.O_RDWR | os.O_CREAT)\n"
    return subprocess.run(
        [sys.executable, "-c", setup + code],
        cwd=root,
        env={**os.environ, **shim.environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("write", "os.pwrite(f, b'x', 0)"),
        ("read", "os.pread(f, 1, 0)"),
        ("fsync", "os.fsync(f)"),
        ("fsync", "os.fdatasync(f)"),
        ("fsync directory", "os.fsync(os.open('below', os.O_RDONLY))"),
        ("rename", "os.rename('below/file', 'below/other')"),
        ("rename", "d = os.open('below', 0)\nos.rename('file', 'x', src_dir_fd=d, dst_dir_fd=d)"),
        ("fallocate", "os.posix_fallocate(f, 0, 10)"),
        ("truncate", "os.ftruncate(f, 10)"),
        ("open", "os.open('below/file', os.O_RDONLY)"),
        ("open", "open('below/other', 'w')"),
        ("mkdir", "os.mkdir(f'below/{os.getpid()}')"),
        ("unlink", "os.unlink('below/file')"),
        ("unlink", "os.unlink('file', dir_fd=os.open('below', 0))"),
    ],
)
def test_a_call_fails_only_below_the_root_and_until_it_is_healed(
    shim: Shim, root: Path, call: str, code: str
) -> None:
    (root / "below" / "file").touch()
    shim.fail(call, errno.EDQUOT, where="below", skip=call == "open")
    done = python(shim, root, code)
    assert f"[Errno {errno.EDQUOT}]" in done.stderr, done
    assert shim.hits(call) == 1
    shim.fail(call, errno.EDQUOT, where="elsewhere")
    assert python(shim, root, code).stderr == ""
    assert (shim.hits(call), shim.calls(call)) == (0, 0)
    (root / "below" / "file").touch()
    shim.fail(call, errno.EDQUOT)
    shim.heal()
    assert python(shim, root, code).stderr == ""


def test_times_and_skip_count_calls_of_all_processes(shim: Shim, root: Path) -> None:
    shim.fail("fsync", errno.EIO, times=2, skip=1)
    code = "try: os.fsync(f)\nexcept OSError: print('failed')"
    said = [python(shim, root, code).stdout.strip() for _ in range(4)]
    assert said == ["", "failed", "failed", ""]
    assert (shim.calls("fsync"), shim.counts()["fsync"]) == (4, 2)


def test_short_lost_and_late(shim: Shim, root: Path) -> None:
    shim.short("write", times=1)
    shim.delay("read", 0.5)
    shim.lose(times=1)
    done = python(
        shim,
        root,
        "print(os.pwrite(f, b'12345678', 0), os.pwrite(f, b'5678', 4))\n"
        "t = time.monotonic(); print(os.pread(f, 10, 0), time.monotonic() - t >= 0.5)\n"
        "try: os.fsync(f)\nexcept OSError: os.fsync(f)\n"
        "print(os.pread(f, 10, 0))",
    )
    assert done.stdout.splitlines() == ["4 4", "b'12345678' True", str(bytes(8))], done


def test_a_kill_comes_before_the_call(shim: Shim, root: Path) -> None:
    shim.kill("rename")
    done = python(shim, root, "os.rename('below/file', 'below/other')")
    assert done.returncode == -signal.SIGKILL
    assert (root / "below" / "file").exists()


@pytest.mark.parametrize("step", [3600.0, -365 * 86400.0, -0.75])
def test_the_wall_clock_steps_and_no_other(shim: Shim, root: Path, step: float) -> None:
    shim.step_clock(step)
    code = "os.utime(f); print(time.time(), time.monotonic(), os.fstat(f).st_mtime)"
    wall, steady, written = map(float, python(shim, root, code).stdout.split())
    assert abs(wall - step - time.time()) < 20
    assert abs(steady - time.monotonic()) < 20
    assert abs(written - wall) < 20


@needs_mount
async def test_a_disk_is_filled_and_freed_and_taken_away(root: Path) -> None:
    async with small_disk(root, 2**20) as disk:
        (root / "file").write_bytes(b"x")
        disk.fill(leave=2**16)
        with pytest.raises(OSError, match="No space left"):
            (root / "large").write_bytes(bytes(2**17))
        (root / "large").unlink()
        disk.free()
        (root / "large").write_bytes(bytes(2**19))
        await disk.take_away()
        assert not (root / "file").exists()
        await disk.give_back()
        assert (root / "file").read_bytes() == b"x"
    assert list(root.iterdir()) == [root / "below"]
