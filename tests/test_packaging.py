"""The pins satisfy the ranges, and what is built holds what is needed."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flexalign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SHOW_VERSION = "import flexalign.cli.app as app; print(app.__file__); app.main()"


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("line", sorted({*PROJECT["dependencies"], *EXTRAS["dev"]}))
def test_pin_satisfies_range(line: str):
    requirement = Requirement(line)
    pin = _pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt does not pin {requirement.name}"
    assert pin in requirement.specifier


@pytest.mark.parametrize(
    "line", sorted({line for name, lines in EXTRAS.items() if name != "dev" for line in lines})
)
def test_pin_of_an_extra_satisfies_its_range(line: str):
    requirement = Requirement(line)
    pin = _pins().get(canonicalize_name(requirement.name))
    assert pin is None or pin in requirement.specifier


def test_pins_reach_what_the_dependencies_depend_on():
    queue = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS["dev"]]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name == "torch":  # what its CUDA build asks for depends on the build
            continue
        for line in importlib.metadata.requires(name) or ():
            child = Requirement(line)
            chosen = [{"extra": extra} for extra in ("", *extras)]
            if child.marker is None or any(map(child.marker.evaluate, chosen)):
                queue.append(child)
    assert {name for name, _ in seen} - set(_pins()) == set()


def test_pins_are_exact_and_portable():
    for name, version in _pins().items():
        assert Version(version).local is None, f"{name}=={version} exists on one platform alone"


def test_every_bound_has_a_floor():
    for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]:
        operators = {part.operator for part in Requirement(line).specifier}
        assert ">=" in operators, line


@pytest.mark.full
def test_wheel_holds_the_package_and_works(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    source = Path(flexalign.__file__).parent
    wanted = {
        f"flexalign/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == wanted
        archive.extractall(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, "-c", SHOW_VERSION, "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    where, version = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "installed")
    assert version == f"flexalign {flexalign.__version__}"
