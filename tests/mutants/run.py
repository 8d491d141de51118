"""Change the program in many small ways, and see which changes no test notices (docs/MUTANTS.md).

    .venv/bin/python tests/mutants/run.py NAME [PATTERN…]

NAME is one of `MODULES`; a pattern takes only the mutants whose names fit it, such as
`*gather*`. mutmut works in build/mutants/NAME, a copy that stays for its own commands
(`show`, `browse`). A mutant that survives is printed as a difference: exit code 1.
"""

from __future__ import annotations

import ast
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("protocol", "producer", "consumer", "cli")
CONSUMER, PROTOCOL = "splitferry_consumer", "splitferry_protocol"
MEMORY = 4 << 30
"""Bytes that a mutant which never ends may take."""


@dataclass(frozen=True)
class Module:
    files: Sequence[str]
    tests: Sequence[str]
    """What judges it, as arguments of pytest: fast tests."""


def _files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


SLOW_OF_FILES = (
    "death or follow_the_rules or while_others_sweep or disk_is_not or file_system_folds"
)
"""Tests of files that take seconds, or would leave a file system mounted when they are ended."""

MODULES = {
    "codec": Module(
        [f"{PROTOCOL}/codec.py", f"{PROTOCOL}/validation.py"],
        [
            *_files("codec", "vectors", "hostile"),
            "-k",
            "not costs_little_time and not corpus_says[large]",
        ],
    ),
    "coverage": Module(
        [f"{CONSUMER}/coverage.py"], [*_files("coverage"), "-k", "not costs_a_few_bytes"]
    ),
    "ledger": Module(
        [f"{CONSUMER}/{name}.py" for name in ("ledger", "request", "responder")],
        [*_files("ledger", "request", "responder"), "-k", "not more_requests_than_fit"],
    ),
    "publisher": Module([f"{CONSUMER}/publisher.py"], _files("publisher")),
    "owner": Module([f"{CONSUMER}/targets/owner.py"], _files("targets_owner")),
    "paths": Module([f"{CONSUMER}/paths.py"], _files("paths")),
    "catalogue": Module([f"{CONSUMER}/catalogue.py"], _files("catalogue")),
    "inode": Module([f"{CONSUMER}/targets/inode.py"], _files("targets_inode")),
    "settling": Module(
        [f"{CONSUMER}/targets/settling.py"],
        [*_files("targets_file"), "-k", f"not ({SLOW_OF_FILES})"],
    ),
    "file": Module(
        [f"{CONSUMER}/targets/file.py"],
        [*_files("targets_file", "modes"), "-k", f"not ({SLOW_OF_FILES})"],
    ),
}


def without_decorators(source: str) -> str:
    """The same program, with `name = decorator(name)` behind each function.

    mutmut leaves decorated functions alone, and properties are many here.
    """
    lines = source.splitlines()
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.decorator_list
    ]
    for node in sorted(functions, key=lambda node: node.lineno, reverse=True):
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if {"classmethod", "staticmethod"} & {*decorators}:
            continue
        assert node.end_lineno is not None
        decorated = node.name
        for decorator in reversed(decorators):
            decorated = f"{decorator}({decorated})"
        indent = " " * node.col_offset
        lines.insert(node.end_lineno, f"{indent}{node.name} = {decorated}")
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def set_up(stage: Path, module: Module) -> None:
    """A copy with the packages side by side, where mutmut takes their names for the modules'."""
    shutil.rmtree(stage, ignore_errors=True)
    for room in ROOMS:
        shutil.copytree(ROOT / room, stage, dirs_exist_ok=True)
    for folder in ("tests", "docs"):
        shutil.copytree(ROOT / folder, stage / folder)
    for name in module.files:
        file = stage / name
        file.write_text(without_decorators(file.read_text()))
    configured = {
        "source_paths": [f"splitferry_{room}" for room in ROOMS],
        "only_mutate": [*module.files],
        "also_copy": ["docs"],
        "pytest_add_cli_args": ["-p", "tests.mutants.judging", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": [*module.tests],
        "timeout_multiplier": 2.0,
        "timeout_constant": 5.0,
        "use_git_change_detection": False,
    }
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in configured.items())
    text = (ROOT / "pyproject.toml").read_text()
    (stage / "pyproject.toml").write_text(f"{text}\n[tool.mutmut]\n{settings}")


def mutmut(stage: Path, *words: str) -> str:
    command = [sys.executable, "-m", "mutmut", *words]
    return subprocess.run(command, cwd=stage, check=True, stdout=subprocess.PIPE, text=True).stdout


def verdicts(stage: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Of each mutant, by its name."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *patterns]
    subprocess.run(command, cwd=stage, check=True)
    told = (
        line.strip().rpartition(": ")
        for line in mutmut(stage, "results", "--all", "true").splitlines()
    )
    return {name: verdict for name, _, verdict in told if verdict != "not checked"}


def main(words: Sequence[str]) -> int:
    if not words or words[0] not in MODULES:
        print(f"usage: run.py {{{','.join(MODULES)}}} [PATTERN…]", file=sys.stderr)
        return 2
    module = MODULES[words[0]]
    stage = ROOT / "build" / "mutants" / words[0]
    set_up(stage, module)
    found = verdicts(stage, words[1:])
    # One that never ends is noticed: every test has a time limit.
    noticed = {"killed", "timeout", "segfault"}
    survivors = [name for name, verdict in found.items() if verdict not in noticed]
    for name in survivors:
        print(mutmut(stage, "show", name))
    for file in module.files:
        prefix = file.removesuffix(".py").replace("/", ".") + "."
        names = [name for name in found if name.startswith(prefix)]
        left = sum(name in survivors for name in names)
        print(f"{file}: {len(names)} mutants, {len(names) - left} killed, {left} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
