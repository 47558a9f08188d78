"""Imports go down only, a class name stands for one thing, the command line loads nothing heavy."""

import ast
import sys
from pathlib import Path

import pytest

import flexalign

SOURCE = Path(flexalign.__file__).parent
GRADING = ("evaluation.grading", "evaluation.answers", "evaluation.equality")
"""Files of a higher part that stand low: training grades the student's answers too."""
LAYERS = (
    {"errors", "_version", "_spelling"},
    {"fusion", "lambdas", "statistics"},
    {"heads"},
    {"losses"},
    {"data", "models", *GRADING},
    {"generation"},
    {"inra", "lora_dial"},
    {"systems"},
    {"analysis"},
    {"training"},
    {"evaluation"},
    {"calibration"},
    {"serving"},
    {"miniature"},
    {"cli", "__main__"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
HELPERS = LEVEL["errors"]
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
COMMANDS = sorted((SOURCE / "cli").glob("[!_]*.py"))
LIGHT = {"typer", "rich", "yaml", "flexalign"} | sys.stdlib_module_names


class _Imports(ast.NodeVisitor):
    """Collect (line, dotted name) of the imports that run, not of those for types alone."""

    def __init__(self, *, in_functions: bool) -> None:
        self.found: list[tuple[int, str]] = []
        self._in_functions = in_functions

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: write the import absolutely"
        assert node.module is not None
        if node.module == "flexalign":
            self.found += [(node.lineno, f"flexalign.{alias.name}") for alias in node.names]
        else:
            self.found.append((node.lineno, node.module))

    def visit_If(self, node: ast.If) -> None:
        typing_only = ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in [*([] if typing_only else node.body), *node.orelse]:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self._in_functions:
            self.generic_visit(node)


def _imports(source: str, *, in_functions: bool = True) -> list[tuple[int, str]]:
    visitor = _Imports(in_functions=in_functions)
    visitor.visit(ast.parse(source))
    return visitor.found


def _level(module: str) -> int:
    """The level of a module, by its dotted name inside the package."""
    part = ".".join(module.split(".")[:2])
    part = part if part in LEVEL else module.split(".")[0]
    return LEVEL.get(part, HELPERS) if part.startswith("_") else LEVEL[part]


def _upward(part: str, source: str) -> list[str]:
    found = []
    for line, name in _imports(source):
        package, _, rest = name.partition(".")
        if package != "flexalign" or rest in ("", "__version__"):
            continue
        if _level(rest) > _level(part):
            found.append(f"line {line}: {part} imports {name}, which lies above it")
    return found


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_every_part_has_a_layer():
    parts = {_part(path) for path in MODULES}
    assert {part for part in parts if not part.startswith("_")} <= set(LEVEL)
    for name in GRADING:
        assert (SOURCE / f"{name.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_down(path: Path):
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    assert _upward(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", COMMANDS, ids=_name)
def test_commands_load_nothing_heavy_at_import(path: Path):
    found = _imports(path.read_text(encoding="utf-8"), in_functions=False)
    assert {name.split(".")[0] for _, name in found} - LIGHT == set()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_no_logic_rests_on_an_assert(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert lines == []  # python -O leaves them out


def test_fusion_stands_on_torch_and_errors():
    found = _imports((SOURCE / "fusion.py").read_text(encoding="utf-8"))
    names = {name for _, name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert names == {"torch", "flexalign.errors"}


def test_the_rule_catches_what_it_should():
    hidden = "def f():\n    if True:\n        from flexalign.cli import app\n"
    typing_only = "if TYPE_CHECKING:\n    from flexalign.cli import app\n"
    above = "line 3: training imports flexalign.cli, which lies above it"
    assert _upward("training", hidden) == [above]
    assert _upward("training", typing_only) == []
    assert _upward("cli", "from flexalign import training") == []
    assert _upward("fusion", "from flexalign import training") != []
    assert _upward("training.callbacks", "from flexalign.evaluation.grading import grade") == []
    assert _upward("training.callbacks", "from flexalign.evaluation import sweep") != []
    assert _upward("evaluation.grading", "from flexalign.evaluation.sweep import x") != []
    assert _imports(hidden, in_functions=False) == []


def test_a_class_name_stands_for_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(_name(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
