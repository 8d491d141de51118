"""The walks of docs/DESIGN.md lead through the code as it is."""

from __future__ import annotations

import ast
import gc
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES_MAX = 8
STEP = re.compile(r"^(\d+)\. \*\*[^*]+\.\*\* `([\w/]+\.py)`: (.+)$", re.MULTILINE)
Definition = ast.FunctionDef | ast.AsyncFunctionDef

WALKS = {
    title: [(file, re.findall(r"`([\w.]+)`", chain)) for _, file, chain in STEP.findall(text)]
    for title, text in re.findall(
        r"^## (The life of one split|One crash)\n(.*?)(?=^## )",
        (ROOT / "docs/DESIGN.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
}
STEPS = [(title, *step) for title, steps in WALKS.items() for step in steps]


def functions(file: str) -> dict[str, Definition]:
    """By their names, of methods with that of the class; the last one of overloads."""
    (path,) = [
        path
        for room in ("producer", "consumer")
        if (path := ROOT / room / f"splitferry_{room}" / file).exists()
    ]
    gc.disable()  # as in test_layout
    try:
        tree = ast.parse(path.read_bytes(), path)
    finally:
        gc.enable()
    found: dict[str, Definition] = {}
    for node in tree.body:
        if isinstance(node, Definition):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            inner = (method for method in node.body if isinstance(method, Definition))
            found.update((f"{node.name}.{method.name}", method) for method in inner)
    return found


def called(function: Definition) -> set[str]:
    nodes = list(ast.walk(function))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize(("title", "steps"), [("The life of one split", 11), ("One crash", 7)])
def test_a_walk_needs_few_files(title: str, steps: int) -> None:
    assert len(WALKS[title]) == steps, "a step is not written as the others are"
    files = {file for file, _ in WALKS[title]}
    assert len(files) <= FILES_MAX, files


@pytest.mark.parametrize(("title", "file", "chain"), STEPS)
def test_a_step_calls_what_it_names_and_reads_from_top_to_bottom(
    title: str, file: str, chain: list[str]
) -> None:
    there = functions(file)
    assert [name for name in chain if name not in there] == []
    for caller, callee in pairwise(chain):
        assert callee.split(".")[-1] in called(there[caller]), f"{caller} does not call {callee}"
    lines = [there[name].lineno for name in chain]
    assert lines == sorted(lines)


def test_whoever_follows_a_reference_finds_the_place() -> None:
    places = {
        page: (ROOT / f"docs/{page}.md").read_text() for page in ("DESIGN", "WIRE", "RELIABILITY")
    }
    named = {
        (page, re.sub(r"\s+(# )?", " ", place))
        for room in ("producer", "consumer", "protocol", "cli", "tests")
        for file in (ROOT / room).rglob("*.py")
        for page, place in re.findall(r'\b(DESIGN|WIRE|RELIABILITY), "(\w[^"]+)"', file.read_text())
    }
    assert len(named) > 10
    begins = r"^(?:#+ |\*\*|\d+\. \*\*)"
    assert {
        (page, place)
        for page, place in named
        if not re.search(begins + re.escape(place), places[page], re.MULTILINE)
    } == set()


def test_a_glossary_that_can_be_remembered() -> None:
    text = (ROOT / "docs/DESIGN.md").read_text()
    terms = text.split("\n## Terms\n")[1].split("\n## ")[0]
    assert 10 < terms.count("\n|") - 2 <= 20
