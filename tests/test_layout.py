"""The rooms of the house, and who may enter where (DESIGN, "Which file does what")."""

from __future__ import annotations

import ast
import gc
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockingError

from console import spans
from splitferry_cli.kafka_jars import KAFKA_VERSION, kafka_jars

ROOT = Path(__file__).parent.parent
ROOMS = ["producer", "consumer", "protocol", "cli"]
PACKAGES = {room: ROOT / room / f"splitferry_{room}" for room in ROOMS}


def imported(file: Path) -> Iterator[str]:
    """The full names of what `file` imports from other packages."""
    # Some releases of Python 3.11 take a finalizer that runs meanwhile, and parses something
    # itself, for a fault of their own (SystemError: recursion depth mismatch).
    gc.disable()
    try:
        tree = ast.parse(file.read_bytes(), file)
    finally:
        gc.enable()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            yield node.module


def imports_of(folder: Path) -> set[str]:
    files = list(folder.rglob("*.py"))
    assert files, folder
    return {name for file in files for name in imported(file)}


@pytest.mark.parametrize("folder", [*ROOMS, "tests", "benchmarks"])
def test_nobody_imports_a_room_by_its_bare_name(folder: str) -> None:
    bare = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / folder).rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in ROOMS
    }
    assert not bare


@pytest.mark.parametrize("room", ROOMS)
def test_the_linter_bans_the_bare_name(room: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    sample = f"import {room}\n\n{room}.run()\n"
    checked = subprocess.run(
        [*ruff, "--stdin-filename", "cli/splitferry_cli/sample.py", "-"],
        input=sample,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert checked.returncode == 1, checked.stderr
    assert f"TID251 `{room}` is banned: import splitferry_{room}" in checked.stdout


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("producer", {"splitferry_consumer", "splitferry_cli"}),
        ("consumer", {"splitferry_producer", "splitferry_cli"}),
        ("protocol", {"splitferry_producer", "splitferry_consumer", "splitferry_cli"}),
    ],
)
def test_sides_meet_only_in_the_protocol(room: str, others: set[str]) -> None:
    assert not {name.split(".")[0] for name in imports_of(PACKAGES[room])} & others


def test_the_protocol_does_no_io() -> None:
    names = imports_of(PACKAGES["protocol"])
    doing_io = {"asyncio", "io", "os", "pathlib", "shutil", "socket", "subprocess", "threading"}
    assert not {name.split(".")[0] for name in names} & doing_io
    kafka = {name for name in names if name.split(".")[0] == "aiokafka"}
    assert kafka <= {"aiokafka.partitioner"}


def test_the_wheel_holds_every_room() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(packages) == sorted(f"{room}/splitferry_{room}" for room in ROOMS)


def test_what_contributors_are_sent_to_is_there() -> None:
    page = ROOT / "CONTRIBUTING.md"
    rooms = (*ROOMS, "tests", "docs", "deploy", "benchmarks")
    files = [f"/{file.relative_to(ROOT)}" for room in rooms for file in (ROOT / room).rglob("*")]
    files += [f"/{file.name}" for file in ROOT.iterdir()]
    named = [one for one in spans(page) if re.fullmatch(r"[\w./-]+/|[\w./-]+\.[a-z]+", one)]
    assert len(named) > 40
    assert [one for one in named if not any(f.endswith(f"/{one.rstrip('/')}") for f in files)] == []
    source = "".join((ROOT / f[1:]).read_text() for f in files if f.endswith(".py"))
    names = {one for one in spans(page) if re.fullmatch(r"[A-Z]\w+|\w*_\w+|[A-Z]\w+\.\w+", one)}
    names -= {one for one in named if one.endswith(".py")}
    assert len(names) > 15
    assert [one for one in names if not re.search(rf"\b{one.split('.')[-1]}\b", source)] == []


async def test_a_blocking_call_in_the_loop_fails(tmp_path: Path) -> None:
    (tmp_path / f"kafka-{KAFKA_VERSION}").mkdir()
    with pytest.raises(BlockingError):
        kafka_jars(tmp_path)
