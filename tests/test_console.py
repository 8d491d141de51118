"""The runner of the documents' commands sees when a page and a run differ."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from console import REPOSITORY, Section, Step, agree, blocks, console, sections

UNIT = REPOSITORY / "deploy" / "systemd" / "splitferry-consume.service"
PAGE = REPOSITORY / "docs" / "PAGE.md"


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a  b"], ["a b"]),
        (["a … z"], ["a b c z"]),
        (["…", "z"], ["a", "b", "z"]),
        (["…"], []),
        (["done 1-1234567890123 v1795496150631"], ["done 77-3210987654321 v1795545851618"]),
        (["at 127.0.0.1:9092"], ["at 127.0.0.1:41234"]),
    ],
)
def test_what_agrees(shown: list[str], said: list[str]) -> None:
    assert agree(shown, said)


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ([], ["a"]),
        (["a"], []),
        (["a"], ["a", "b"]),
        (["a", "b"], ["a"]),
        (["a."], ["ab"]),
        (["a … z"], ["a b c"]),
        (["…", "z"], ["a", "z", "b"]),
        (["done 7-42"], ["done 7-43"]),
    ],
)
def test_what_does_not_agree(shown: list[str], said: list[str]) -> None:
    assert not agree(shown, said)


def test_blocks_below_one_heading_are_one_session(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n```console\n$ a \\\n  b\nsaid\n```\ntext\n```console\n$ c\n```\n"
        "## Two\n```python\n# no heading\n```\n```console\n$ d\n```\n"
    )
    one, two = sections(page)
    assert [one.title, two.title] == ["One", "Two"]
    assert one.steps == [Step(3, "a \\\n  b", ["said"]), Step(9, "c", [])]
    assert two.steps == [Step(16, "d", [])]


@pytest.mark.parametrize("begin", ["```console title", "  ```console"])
def test_no_block_escapes(tmp_path: Path, begin: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{begin}\n$ a\n```\n")
    with pytest.raises(AssertionError, match="line 1"):
        list(blocks(page))


async def run(directory: Path, *steps: Step) -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    async with console(directory, {"PATH": path}, UNIT) as shell:
        await shell.run(Section(PAGE, "a title", [*steps]))


async def test_a_session_keeps_its_variables_and_its_paths(tmp_path: Path) -> None:
    await run(
        tmp_path,
        Step(1, "mkdir -p /srv/here", []),
        Step(2, "NAME=/srv/here/file", []),
        Step(3, "echo said > $NAME; cat /srv/here/file", ["said"]),
        Step(4, "echo $NAME", ["/srv/here/file"]),
        Step(5, "echo 'Error: it failed' >&2; false", ["Error: it failed"]),
    )
    assert (tmp_path / "srv/here/file").read_text() == "said\n"


@pytest.mark.parametrize(
    "step",
    [
        Step(1, "false", []),
        Step(1, "echo 'Error: none'", ["Error: none"]),
        Step(1, "echo other", ["said"]),
        Step(1, "splitferry consume --no-such-option", ["said"]),
    ],
)
async def test_another_outcome_fails(tmp_path: Path, step: Step) -> None:
    with pytest.raises(AssertionError, match=r"PAGE\.md:1"):
        await run(tmp_path, Step(0, "true", []), step)


async def test_what_runs_on_must_end_well(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("print('ready', flush=True)\ninput()\n")
    with pytest.raises(AssertionError, match="1"):
        await run(tmp_path, Step(1, "python service.py", ["ready"]))
