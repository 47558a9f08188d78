"""The documentation's site builds without a warning; the tree names every room."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_tree_names_every_room_and_every_module_speaks() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "flexalign"
    rooms = [
        path
        for path in source.iterdir()
        if not path.name.startswith("_") and path.suffix != ".typed"
    ]
    names = [path.name + "/" * path.is_dir() for path in rooms]
    assert [name for name in names if f"\n  {name} " not in page] == []
    modules = {path: path.read_text(encoding="utf-8") for path in source.rglob("*.py")}
    documented = {path: ast.get_docstring(ast.parse(text)) for path, text in modules.items()}
    assert [path for path, doc in documented.items() if modules[path] and not doc] == []


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert all(
        f'id="{name}"' in page
        for name in ("flexalign.fusion.fuse", "flexalign.inra.modeling.InRaModel")
    )
    assert "https://fonts." not in (tmp_path / "index.html").read_text(encoding="utf-8")
