"""What people expect of a command: examples that hold, completion, a file of all its options."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from splitferry_cli.app import splitferry
from splitferry_cli.command import COMMON, Command, Group
from splitferry_cli.options import Option, defaults_from, options_of, read_config

PAGES: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "pages.py"))
ALL: list[tuple[tuple[str, ...], Command | Group]] = list(PAGES["commands"]())
EXAMPLES = [
    pytest.param(path, line, id=line)
    for path, command in ALL
    for line in textwrap.dedent(command.examples).strip().splitlines()
]


# ---- examples


@pytest.mark.parametrize(("path", "line"), EXAMPLES)
def test_every_example_of_a_help_page_parses(
    path: tuple[str, ...], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = _of_splitferry(line)
    _make_paths(words)
    for word in _assignments(line):
        monkeypatch.setenv(*word.split("=", 1))
    context = splitferry.make_context("splitferry", words)
    called: list[str] = []
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert name is not None
        assert command is not None
        called.append(name)
        context = command.make_context(name, rest, parent=context)
    assert tuple(called[: len(path)]) == path


def _of_splitferry(line: str) -> list[str]:
    """The arguments of the one call of the command in a line for a shell."""
    call = re.search(r"\bsplitferry ([^|>&;]*)", line)
    assert call is not None, line
    return shlex.split(call[1], comments=True)


def _assignments(line: str) -> Iterator[str]:
    for word in shlex.split(line):
        if not re.fullmatch(r"SPLITFERRY_\w+=.*", word):
            return
        yield word


def _make_paths(words: list[str]) -> None:
    """Those that an example takes for granted."""
    for word in words:
        if word.endswith("/"):
            Path(word).mkdir()
        elif re.fullmatch(r"\w[\w-]*\.\w+", word):
            Path(word).touch()


# ---- completion


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """With the command of this environment first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("splitferry co", ["consume", "completion"]),
        ("splitferry topics ", ["create", "check"]),
        ("splitferry completion ", ["bash", "fish", "zsh"]),
        ("splitferry consume --quo", ["--quota"]),
        ("splitferry consume --security-protocol sasl_s", ["sasl_ssl"]),
    ],
)
def test_bash_is_offered_what_can_follow(
    environment: dict[str, str], typed: str, offered: list[str]
) -> None:
    script = textwrap.dedent(f"""
        eval "$(splitferry completion bash)"
        function_of=$(complete -p splitferry | sed -E 's/.*-F ([^ ]+).*/\\1/')
        COMP_WORDS=({typed} {'""' if typed.endswith(" ") else ""})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        $function_of splitferry
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """)
    ran = run(environment, "bash", "--norc", "-c", script)
    assert ran.stderr == ""
    assert sorted(ran.stdout.split()) == sorted(offered)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_given_theirs(environment: dict[str, str], shell: str) -> None:
    ran = run(environment, "splitferry", "completion", shell)
    assert ran.returncode == 0
    assert f"_SPLITFERRY_COMPLETE={shell}_complete" in ran.stdout


# ---- the example of a --config file


@pytest.fixture(scope="module")
def example() -> str:
    return Path(PAGES["EXAMPLE"]).read_text()


def test_the_example_is_what_the_commands_say_now(example: str) -> None:
    assert example == PAGES["example_config"](), "python docs/pages.py writes it anew"


def test_the_example_loads_and_changes_nothing(tmp_path: Path, example: str) -> None:
    path = tmp_path / "splitferry.toml"
    path.write_text(example)
    assert not any(defaults_from(read_config(path), splitferry, words) for words, _ in ALL)


def test_the_example_names_every_option_with_its_real_default(example: str) -> None:
    live = tomllib.loads(re.sub(r"^#(?=\S)", "", example, flags=re.MULTILINE))
    for path, command in ALL:
        defaults = defaults_from(live, splitferry, path)
        table = live
        for word in path:
            table = table.get(word, {})
        for option in command.params:
            if not isinstance(option, Option) or option.key == "config":
                continue
            name = option.key.replace("_", "-")
            assert name in (live if option in COMMON else table), (path, name)
            if PAGES["_default"](option) is None or option.multiple:
                continue
            with click.Context(command) as context:
                shown, real = (
                    option.type_cast_value(context, value)
                    for value in (defaults[str(option.name)], option.get_default(context))
                )
                assert shown == real, (path, name)


@pytest.mark.parametrize("option", options_of(splitferry).values(), ids=lambda option: option.key)
def test_every_option_is_explained_in_one_line(option: Option) -> None:
    assert option.help
    assert len(f"# {option.help}") <= 100
    assert option.help.endswith(".")
    assert "\n" not in option.help
