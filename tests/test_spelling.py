"""What a message says of a name that is not known."""

import ast
from pathlib import Path

import pytest

import flexalign
from flexalign._spelling import misspelt, nearest

FEW = ["lambda", "effort", "control"]
MANY = [f"field_{number}" for number in range(30)]


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (nearest("lamda", FEW), "; did you mean 'lambda'?"),
        (nearest("LAMBDA", FEW), "; did you mean 'lambda'?"),
        (nearest("λ", FEW), "; did you mean 'lambda'?"),
        (nearest("λ", ["effort"]), "; known are effort."),
        (nearest("efort", FEW, prefix="dial."), "; did you mean 'dial.effort'?"),
        (nearest("zzz", FEW), "; known are lambda, effort, control."),
        (nearest("zzz", FEW, otherwise="leave it out"), "; leave it out."),
        (nearest("fie", MANY), "; did you mean 'field_9'?"),
        (nearest("zzz", MANY), "; none of the 30 known is like it."),
        (nearest(3, FEW), "; known are lambda, effort, control."),
    ],
)
def test_the_nearest_is_asked_for_or_the_known_are_told(ending: str, expected: str):
    assert ending == expected


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lamda", "lambda"), ("Lambda", "lambda"), ("lam", "lambda"), ("lab", None), ("n", None)],
)
def test_a_slip_is_told_from_another_name(name: str, meant: str | None):
    assert misspelt(name, FEW) == meant


def test_names_are_compared_in_one_place():
    source = Path(flexalign.__file__).parent
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in source.rglob("*.py")}
    comparing = {
        path.name
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and "difflib" in ast.unparse(node)
    }
    assert comparing == {"_spelling.py"}
