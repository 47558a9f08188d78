"""Every function, test, command and file that docs/paper.md names exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(flexalign(?:\.\w+)+)`", PAGE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
SCRIPTS = sorted(set(re.findall(r"`python ((?:benchmarks|examples)/[\w/]+\.py)", PAGE)))


@pytest.mark.parametrize("name", NAMES)
def test_a_named_function_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("file", "test"), TESTS)
def test_a_named_test_exists(file: str, test: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert f"def {test}(" in text if test else "def test_" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_named_script_exists(script: str) -> None:
    assert (ROOT / script).is_file()


def test_the_page_names_enough_to_be_checked() -> None:
    assert min(len(NAMES), len(TESTS), len(SCRIPTS)) >= 3
