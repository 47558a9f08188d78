"""The pins satisfy the ranges, and what is built holds what is needed."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import flexalign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = {
    "flexalign/py.typed",
    "flexalign/evaluation/report/page/report.html",
    "flexalign/evaluation/report/page/main.js",
    "flexalign/miniature/weights/aligned/model.safetensors",
    "flexalign/miniature/weights/fast/inra_adapter.safetensors",
    "flexalign/miniature/weights/reference/chat_template.jinja",
    "flexalign/miniature/weights/reference/model.safetensors",
    "flexalign/miniature/weights/reference/tokenizer.json",
    "flexalign/serving/playground/page/index.html",
    "flexalign/serving/playground/page/playground.css",
}
WHERE = """
import importlib.metadata, flexalign
print(flexalign.__file__)
named = importlib.metadata.entry_points(group="vllm.general_plugins")["flexalign"]
named.load()
print(named.dist.locate_file("flexalign"))
"""


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


def test_the_version_stands_in_one_place_and_the_changelog_has_it():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert headings[0] in ("Unreleased", flexalign.__version__)
    assert flexalign.__version__ in headings


def test_every_python_that_is_named_is_one_that_is_permitted():
    permitted = SpecifierSet(PROJECT["requires-python"])
    begin = "Programming Language :: Python :: 3."
    minors = [int(line[len(begin) :]) for line in PROJECT["classifiers"] if line.startswith(begin)]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert all(f"3.{minor}" in permitted for minor in minors)
    assert f"3.{minors[0] - 1}" not in permitted


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel that was built out of that archive."""
    folder = tmp_path_factory.mktemp("dist")
    _build(folder, ROOT)
    return folder


def _build(folder: Path, *what: str | Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *what]
    subprocess.run(command, check=True, capture_output=True)


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.full
def test_wheel_holds_the_package_and_nothing_else(archives: Path):
    source = Path(flexalign.__file__).parent
    wanted = {
        f"flexalign/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = _contents(_only(archives, "*.whl"))
    assert {name for name in held if ".dist-info/" not in name} == wanted
    assert wanted >= NEEDED
    info = f"flexalign-{flexalign.__version__}.dist-info"
    assert held[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"\n[vllm.general_plugins]\nflexalign = " in held[f"{info}/entry_points.txt"]
    metadata = held[f"{info}/METADATA"].decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text("utf-8"))


@pytest.mark.full
def test_wheel_of_the_archive_is_the_wheel_of_the_checkout(archives: Path, tmp_path: Path):
    _build(tmp_path, "--wheel", ROOT)
    assert _contents(_only(tmp_path, "*.whl")) == _contents(_only(archives, "*.whl"))


@pytest.mark.full
def test_source_archive_holds_every_file_of_the_checkout(archives: Path):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no git checkout: what belongs into the archive is not known")
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    with tarfile.open(_only(archives, "*.tar.gz")) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert held == wanted | {"PKG-INFO"}


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_built_installs_and_runs_outside_the_checkout(
    pattern: str, archives: Path, tmp_path: Path
):
    python = _environment(tmp_path / "environment")
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    archive = _only(archives, pattern)
    _run(tmp_path, sys.executable, "-m", "pip", "--python", python, "install", *flags, archive)
    where = _run(tmp_path, python, "-c", WHERE).splitlines()
    assert len(where) == 2
    assert all(Path(line).is_relative_to(tmp_path / "environment") for line in where)
    home = tmp_path / "home"
    home.mkdir()
    command = python.with_name("flexalign")
    assert _run(home, command, "--version") == f"flexalign {flexalign.__version__}\n"
    assert "demo" in _run(home, command, "--help")
    shown = json.loads(_run(home, command, "inspect", "miniature", "--json"))
    assert shown["has_chat_template"]
    assert shown["gib"] > 0
    dial = ("--adapter", "miniature:fast", "--lambda", "0,1", "--max-new-tokens", "200", "--json")
    answers = json.loads(_run(home, command, "generate", "miniature", "9+3+6?", *dial))
    assert [answer["lambda"] for answer in answers] == [0, 1]
    assert answers[0]["thinking_tokens"] > answers[1]["thinking_tokens"]
    _run(home, command, "demo", "--questions", "10", "--steps", "1", "--json")
    assert {path.name for path in (home / "out" / "demo").iterdir()} == {"demo.json", "pareto.png"}


def _environment(folder: Path) -> Path:
    """Make an empty environment that finds this one's packages after its own; give its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = Path(_run(folder, python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def _run(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder, with nothing of the checkout in its way."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
