"""The wheel and the sdist: the same bytes each time, whole, and of one version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv

ROOT = Path(__file__).parent.parent
PROJECT: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION: str = PROJECT["project"]["version"]
DISTRIBUTIONS = (f"splitferry-{VERSION}-py3-none-any.whl", f"splitferry-{VERSION}.tar.gz")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout tells which files belong to it")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def builds(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of the same files, which differ in whatever may not show."""
    made = []
    with DefaultIsolatedEnv() as environment, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1750000000")
        for number, mask in enumerate((0o022, 0o077)):
            source = tmp_path_factory.mktemp(f"checkout-{number}")
            for name in tracked if number else reversed(tracked):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, source / name)
                (source / name).chmod((ROOT / name).stat().st_mode & 0o777 & ~mask)
                os.utime(source / name, (1_700_000_000 + number,) * 2)
            patch.setenv("PYTHONHASHSEED", str(number))
            builder = ProjectBuilder.from_isolated_env(environment, source)
            if not number:
                environment.install(builder.build_system_requires)
            for kind in ("sdist", "wheel"):
                builder.build(kind, source / "dist")
            made.append(source / "dist")
    return made[0], made[1]


@pytest.fixture(scope="module")
def wheel(builds: tuple[Path, Path]) -> dict[str, bytes]:
    with zipfile.ZipFile(builds[0] / DISTRIBUTIONS[0]) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


@pytest.mark.registry
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_two_builds_are_the_same_bytes(builds: tuple[Path, Path], name: str) -> None:
    one, other = ((build / name).read_bytes() for build in builds)
    assert one == other


@pytest.mark.registry
def test_the_wheel_is_the_packages_and_the_licence(
    wheel: Mapping[str, bytes], tracked: list[str]
) -> None:
    packages: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    about = f"splitferry-{VERSION}.dist-info/"
    sources = {
        name.partition("/")[2]
        for name in tracked
        if name.startswith(tuple(f"{p}/" for p in packages))
    }
    assert {name for name in wheel if not name.startswith(about)} == sources
    assert wheel[f"{about}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert {name for name in wheel if name.endswith("py.typed")} == {
        f"{Path(package).name}/py.typed" for package in packages
    }


@pytest.mark.registry
def test_the_sdist_is_the_checkout(builds: tuple[Path, Path], tracked: list[str]) -> None:
    with tarfile.open(builds[0] / DISTRIBUTIONS[1]) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names == {*tracked, "PKG-INFO"}
    assert "LICENSE" in names


@pytest.mark.registry
def test_the_metadata_is_complete(wheel: Mapping[str, bytes]) -> None:
    told: Message = BytesParser().parsebytes(wheel[f"splitferry-{VERSION}.dist-info/METADATA"])
    project = PROJECT["project"]
    assert told["Version"] == VERSION
    assert told["Summary"] == project["description"]
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == project["requires-python"]
    assert told["Keywords"]
    assert told["Description-Content-Type"] == "text/markdown"
    said = told.get_payload(decode=True)
    assert isinstance(said, bytes)
    assert said.strip() == (ROOT / "README.md").read_bytes().strip()
    assert set(told.get_all("Classifier", [])) == set(project["classifiers"])
    assert set(told.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])


def test_whatever_tells_the_version_tells_this_one() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.yaml")]
    told = [
        (page.name, version)
        for page in (*pages, ROOT / "Dockerfile", ROOT / "docker-compose.yml")
        for version in re.findall(
            r"splitferry(?:\[\w+\])?(?:, version |==|:|-)(\d+\.\d+\.\d+)", page.read_text()
        )
    ]
    assert {name for name, _ in told} == {"START.md", "OPERATIONS.md", "consumer.yaml"}
    assert {version for _, version in told} == {VERSION}
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changes, re.MULTILINE)
    assert released[0] == VERSION


def test_every_dependency_has_its_licence_told() -> None:
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    named = {
        re.split(r"[^\w.-]", requirement)[0].lower()
        for requirements in (
            PROJECT["build-system"]["requires"],
            project["dependencies"],
            *project["optional-dependencies"].values(),
            *groups.values(),
        )
        for requirement in requirements
        if isinstance(requirement, str)  # the others name groups
    }
    page = (ROOT / "docs" / "LICENSES.md").read_text()
    listed = dict(re.findall(r"^\| ([\w.-]+) \| [^|]+ \| ([^|]+) \|", page, re.MULTILINE))
    assert named <= listed.keys()
    assert all(listed.values())
